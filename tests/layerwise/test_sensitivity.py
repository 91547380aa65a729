"""What the outputs of layers mean to those of the network."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.layerwise.sensitivity import Sensitivity, sensitivities
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.tracing.segments import Program

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.standard_normal((5, 6)), RNG.standard_normal((6, 1))
X = RNG.standard_normal((12, 5)).astype(np.float32)


def net(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def by_path(batches: list[np.ndarray]) -> dict[str, Sensitivity]:
    params = {"first": jnp.float32(FIRST), "second": jnp.float32(SECOND)}
    program = Program(net, params, batches[0])
    products = [u for uses in program.uses.values() for u in uses]
    assert all(isinstance(p, Product) for p in products)
    found = sensitivities(
        program, products, params, [[jnp.asarray(b)] for b in batches], "identity", 0
    )
    assert list(found) == products
    return {product.path: own for product, own in found.items()}


@pytest.mark.parametrize(
    "size", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 12))]
)
def test_squares_over_all_examples(size: int) -> None:
    """E[x²] and E[g²] are those of all examples, in however many parts they pass.

    Of one output the projection is a sign, so that its gradient is known but for that.
    """
    found = by_path([X[i : i + size] for i in range(0, 12, size)])
    hidden = np.tanh(X @ FIRST)
    slopes = (1 - hidden**2) * SECOND[:, 0]
    for path, inputs, gradients in (
        ("first", X, slopes),
        ("second", hidden, np.ones((12, 1))),
    ):
        own = found[path]
        np.testing.assert_allclose(own.inputs[0], (inputs**2).mean(0), rtol=1e-5)
        np.testing.assert_allclose(own.outputs[0], (gradients**2).mean(0), rtol=1e-5)
