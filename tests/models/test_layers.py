import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import convolve, max_pool, torch_batch_norm

from woodfisher_jax.models import layers


@pytest.mark.parametrize(
    ("size", "stride", "groups", "pixels"),
    [
        (1, 2, 1, 6),
        (3, 1, 1, 6),
        (3, 2, 1, 6),
        (3, 2, 1, 7),
        (3, 2, 4, 6),
        (5, 1, 1, 6),
        (7, 2, 1, 6),
    ],
)
def test_convolutions_pad_both_sides(size, stride, groups, pixels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, pixels, pixels + 2, 4))
    channels = 8 if groups == 1 else 4
    kernel = rng.normal(size=(size, size, 4 // groups, channels))
    model = layers.conv(channels, size, stride, groups=groups, name="c")
    y = model.apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x))
    expected = convolve(x, kernel, stride, padding=size // 2)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_convolutions_may_have_a_bias():
    model = layers.conv(5, 3, use_bias=True, name="c")
    kernel, bias = jnp.zeros((3, 3, 3, 5)), jnp.arange(5.0)
    y = model.apply(
        {"params": {"kernel": kernel, "bias": bias}}, jnp.ones((1, 2, 2, 3))
    )
    np.testing.assert_array_equal(y, np.tile(bias, (1, 2, 2, 1)))


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (3, 2, 0)])
def test_max_pool(size, stride, padding):
    # All below zero, so that padding with zeros would show.
    x = -1 - np.random.default_rng(0).random((2, 7, 8, 3))
    y = layers.max_pool(jnp.float32(x), size, stride, padding)
    np.testing.assert_allclose(y, max_pool(x, size, stride, padding), rtol=1e-6)


def test_global_average_pool():
    x = np.random.default_rng(0).random((2, 3, 4, 5))
    pooled = layers.global_average_pool(jnp.float32(x))
    np.testing.assert_allclose(pooled, x.mean((1, 2)), rtol=1e-6)


def test_flatten_is_in_pytorchs_order():
    x = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    flat = layers.flatten_channels_first(jnp.asarray(x))
    np.testing.assert_array_equal(flat, x.transpose(0, 3, 1, 2).reshape(2, -1))


def test_batch_norm_in_evaluation():
    rng = np.random.default_rng(0)
    names = ("weight", "bias", "running_mean", "running_var")
    state = {f"bn.{name}": rng.uniform(0.5, 1.5, 6) for name in names}
    # Small, so that epsilon shows.
    state["bn.running_var"] *= 1e-4
    x = rng.normal(size=(2, 3, 3, 6))
    scale, bias, mean, var = (jnp.float32(a) for a in state.values())
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    y = layers.batch_norm(train=False, name="bn").apply(variables, jnp.float32(x))
    np.testing.assert_allclose(y, torch_batch_norm(x, state, "bn"), rtol=1e-4)


def test_batch_norm_in_training_moves_a_tenth_of_the_way():
    x = np.random.default_rng(0).normal(1, 2, size=(8, 3, 3, 6)).astype(np.float32)
    model = layers.batch_norm(train=True, zero_scale=True, name="bn")
    y, variables = model.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, np.zeros_like(x))
    _, updated = model.apply(variables, x, mutable=["batch_stats"])
    mean = updated["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
