"""An MLP of which masks empty some neurons, and a comparison of outputs."""

import jax
import jax.numpy as jnp
import numpy as np
from structure_zoo import normal


def assert_close(outputs, wanted) -> None:
    largest = np.max(np.abs(wanted))
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-5 * largest)


def mlp(params, x):
    return jnp.tanh(x @ params["a"] + params["p"]) @ params["c"] + params["q"]


compiled_mlp = jax.jit(mlp)

MLP = {
    "a": normal(0, 3, 6),
    "p": normal(1, 6),
    "c": normal(2, 6, 2),
    "q": normal(3, 2),
}
X = normal(4, 5, 3)


def without(params, path: str, *entries: int, axis: int = -1) -> dict:
    """A mask of a tensor that empties some entries along an axis."""
    mask = np.ones(params[path].shape, bool)
    np.moveaxis(mask, axis, 0)[[*entries]] = False
    return {path: mask}
