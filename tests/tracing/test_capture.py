"""The rows of layers against JAX's own gradients, for every shape a layer comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from woodfisher_jax.tracing.capture import (
    capture,
    input_rows,
    output_rows,
    weight_entries,
)
from woodfisher_jax.tracing.layers import Bias, Product, find_uses
from woodfisher_jax.trees.paths import leaves_by_path


def array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense(p, x):
    return x @ p["w"] + p["b"]


def equinox_style(p, x):
    return jax.vmap(lambda x: p["w"] @ x + p["b"])(x)


def grouped(p, x):
    return jnp.einsum("bgi,goi->bgo", x, p["w"]) + p["b"]


def two_axes(p, x):
    return jnp.einsum("bi,iho->bho", x, p["w"]) + p["b"]


def weight_first(p, x):
    return (jnp.einsum("hoi,tib->hotb", p["w"], x) + p["b"][..., None, None]).T


def placed(p, x):
    w = jnp.flip(p["w"].T.reshape(2, 2, 3), 0).transpose(2, 0, 1).reshape(3, 4)
    return jnp.tanh(jax.jit(jnp.matmul)(x, w))


def deep(p, x):
    hidden = jax.checkpoint(lambda x, w: jax.nn.relu(x @ w))(x, p["w"])
    return nn.relu(hidden) * hidden


DENSE = {
    "dense": (dense, {"w": (3, 4), "b": (4,)}, (2, 3)),
    "dense over positions": (dense, {"w": (3, 4), "b": (4,)}, (2, 5, 3)),
    "equinox style": (equinox_style, {"w": (4, 3), "b": (4,)}, (2, 3)),
    "grouped": (grouped, {"w": (2, 4, 3), "b": (2, 4)}, (5, 2, 3)),
    "two output axes": (two_axes, {"w": (3, 2, 4), "b": (2, 4)}, (5, 3)),
    "weight first": (weight_first, {"w": (2, 4, 3), "b": (2, 4)}, (5, 3, 2)),
    "placed otherwise": (placed, {"w": (3, 4)}, (2, 3)),
    "in remat": (deep, {"w": (3, 4)}, (2, 3)),
}

CONVOLUTIONS = {
    "strided, unequal padding": (
        nn.Conv(3, (3, 2), strides=(2, 3), padding=((0, 2), (3, 1))),
        (1, 7, 8, 2),
    ),
    "dilated": (
        nn.Conv(3, (3, 2), kernel_dilation=(2, 1), input_dilation=(1, 2), padding=1),
        (2, 5, 4, 2),
    ),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (1, 5, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), (1, 5, 5, 4)),
    "transposed": (
        nn.ConvTranspose(3, (3, 3), strides=(2, 2), transpose_kernel=True),
        (1, 4, 4, 2),
    ),
    "one axis": (nn.Conv(3, (4,), padding="CAUSAL", use_bias=False), (1, 9, 2)),
    "three axes": (nn.Conv(2, (2, 2, 2), strides=2), (1, 4, 5, 3, 2)),
}

QUICK = ("strided, unequal padding", "grouped", "transposed")


def check(f, params, x) -> None:
    """Gradients put together from rows are those of ``jax.grad``."""

    def loss(params, x):
        y = f(params, x)
        return jnp.sum(jnp.sin(y) * array(*y.shape, seed=9))

    uses = find_uses(loss, params, x)
    leaves = leaves_by_path(params)
    (product,) = (u for us in uses.values() for u in us if isinstance(u, Product))

    @jax.jit
    def rows_and_gradients(params, x):
        value, (activations,), (gradient,) = capture(loss, params, x, [product])
        rows = input_rows(product, activations), output_rows(product, gradient)
        return value, rows, jax.value_and_grad(loss)(params, x)

    value, rows, (expected_value, gradients) = rows_and_gradients(params, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    inputs, outputs = (np.asarray(a, np.float64) for a in rows)

    found = {}
    entries = weight_entries(product, leaves[product.path].shape)
    assert sorted(entries.reshape(-1)) == list(range(leaves[product.path].size))
    found[product.path] = np.empty(entries.size)
    found[product.path][entries] = np.einsum("gto,gti->goi", outputs, inputs)
    for (use,) in uses.values():
        if isinstance(use, Bias):
            assert use.position == product.position
            found[use.path] = np.empty(use.entries.size)
            found[use.path][use.entries] = outputs.sum(1).reshape(-1)
    assert set(found) == set(leaves)
    for path, expected in leaves_by_path(gradients).items():
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(
            found[path].reshape(expected.shape), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("case", DENSE)
def test_gradients_from_the_rows_of_dense_layers(case) -> None:
    f, shapes, shape = DENSE[case]
    params = {name: array(*size, seed=1) for name, size in shapes.items()}
    check(f, params, array(*shape, seed=2))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK))
        for case in CONVOLUTIONS
    ],
)
def test_gradients_from_the_rows_of_convolutions(case) -> None:
    model, shape = CONVOLUTIONS[case]
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))["params"]
    params = jax.tree.map(lambda leaf: array(*leaf.shape, seed=1), params)
    check(lambda p, x: model.apply({"params": p}, x), params, array(*shape, seed=2))


def test_patches_of_a_convolution_are_channel_after_channel() -> None:
    x = jnp.arange(18.0).reshape(1, 3, 3, 2)
    model = nn.Conv(1, (2, 2), padding="VALID", use_bias=False)
    params = {"kernel": jnp.ones((2, 2, 2, 1))}
    f = lambda p, x: jnp.sum(model.apply({"params": p}, x))  # noqa: E731
    (product,) = find_uses(f, params, x)["kernel"]
    rows = jax.jit(lambda x: input_rows(product, x))(x)
    assert rows.shape == (1, 4, 8)
    np.testing.assert_array_equal(rows[0, 0], [0, 2, 6, 8, 1, 3, 7, 9])


def test_derivative_rules_of_other_functions_are_kept() -> None:
    """jax.nn.relu has slope 0 at 0, but max(x, 0), which it is made of, one half."""
    params = {"w": jnp.zeros((3, 2))}
    f = lambda p, x: jnp.sum(jax.nn.relu(x @ p["w"]))  # noqa: E731
    (product,) = find_uses(f, params, jnp.ones((1, 3)))["w"]
    found = jax.jit(lambda p, x: capture(f, p, x, [product]))
    assert not np.any(found(params, jnp.ones((1, 3))).gradients[0])


def test_several_layers_at_once_under_vmap() -> None:
    params = {"w1": array(3, 4), "w2": array(4, 2, seed=1)}
    x = array(6, 3, seed=2)

    def f(p, x):
        return jnp.sum((jnp.tanh(x @ p["w1"]) @ p["w2"]) ** 2)

    uses = find_uses(f, params, x[:1])
    products = [uses["w2"][0], uses["w1"][0]]
    found = jax.jit(jax.vmap(lambda x: capture(f, params, x[None], products)))(x)
    x, w1, w2 = (np.asarray(a, np.float64) for a in (x, params["w1"], params["w2"]))
    hidden = np.tanh(x @ w1)
    last = 2 * hidden @ w2
    first = (last @ w2.T) * (1 - hidden**2)
    np.testing.assert_allclose(found.value, np.sum(last**2, 1) / 4, rtol=1e-5)
    for got, expected in zip(
        (*found.activations, *found.gradients), (hidden, x, last, first), strict=True
    ):
        np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4, atol=1e-5)


class TestErrors:
    def test_a_product_in_a_function_with_its_own_rule(self) -> None:
        @jax.custom_vjp
        def twice(x, w):
            return x @ w

        twice.defvjp(lambda x, w: (x @ w, w), lambda w, t: (t @ w.T, jnp.ones_like(w)))
        params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        f = lambda p, x: jnp.sum(twice(x, p["w"]))  # noqa: E731
        (product,) = find_uses(f, params, x)["w"]
        with pytest.raises(ValueError, match=r"'w' lies in .*custom_vjp_call"):
            capture(f, params, x, [product])

    def test_a_function_that_is_not_the_one_that_was_searched(self) -> None:
        params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        (product,) = find_uses(lambda p, x: jnp.sum(x @ p["w"]), params, x)["w"]
        with pytest.raises(ValueError, match="'w' is not where it was found"):
            capture(lambda p, x: jnp.sum(jnp.sin(x) @ p["w"]), params, x, [product])
