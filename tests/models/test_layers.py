import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import convolve, max_pool, torch_conv_norm
from random_weights import random_variables

from woodfisher_jax.models import layers


@pytest.mark.parametrize(
    ("size", "stride", "groups", "pixels"),
    [
        (1, 2, 1, 6),
        (3, 1, 1, 6),
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


def test_convolutions_start_from_he_normal_by_output():
    x = jnp.zeros((1, 1, 1, 64))
    model = layers.conv(64, 3, name="c")
    kernel = jax.jit(model.init)(jax.random.key(0), x)["params"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    # A truncated normal would end at about 2.3 standard deviations.
    assert np.abs(kernel).max() > 3.5 * np.std(kernel)


class ConvNorm(nn.Module):
    zero_scale: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        return layers.conv_norm(
            self,
            x,
            6,
            3,
            use_bias=self.use_bias,
            zero_scale=self.zero_scale,
            train=train,
            dtype=None,
            names=("conv", "bn"),
        )


X = np.random.default_rng(0).normal(1, 2, size=(4, 3, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("use_bias", [False, True])
def test_conv_norm_in_evaluation(use_bias):
    model = ConvNorm(use_bias=use_bias)
    variables, state = random_variables(model, X)
    assert ("conv.bias" in state) == use_bias
    # Small, so that epsilon shows.
    variables["batch_stats"]["bn"]["var"] *= 1e-4
    state["bn.running_var"] *= 1e-4
    expected = torch_conv_norm(np.float64(X), state, "conv", "bn", padding=1)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, X), expected, rtol=1e-3)


def test_statistics_move_a_tenth_of_the_way_in_training():
    model = ConvNorm()
    variables, _ = random_variables(model, X)
    y, updated = model.apply(variables, X, train=True, mutable=["batch_stats"])
    features = convolve(X, np.float64(variables["params"]["conv"]["kernel"]), 1, 1)
    scale = variables["params"]["bn"]["scale"]
    np.testing.assert_allclose(y.std((0, 1, 2)), scale, rtol=1e-3)
    moments = {"mean": features.mean((0, 1, 2)), "var": features.var((0, 1, 2))}
    for name, value in moments.items():
        expected = 0.9 * variables["batch_stats"]["bn"][name] + 0.1 * value
        np.testing.assert_allclose(updated["batch_stats"]["bn"][name], expected, 1e-4)


def test_a_zero_scale_starts_at_zero():
    y, _ = ConvNorm(zero_scale=True).init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(y, np.zeros_like(y))


@pytest.mark.parametrize("padding", [0, 1])
def test_max_pool(padding):
    # All below zero, so that padding with zeros would show.
    x = -1 - np.random.default_rng(0).random((2, 7, 8, 3))
    y = layers.max_pool(jnp.float32(x), 3, 2, padding)
    np.testing.assert_allclose(y, max_pool(x, 3, 2, padding), rtol=1e-6)


def test_pooled_and_flattened_features_are_in_pytorchs_order():
    pooled = layers.global_average_pool(jnp.asarray(X))
    np.testing.assert_allclose(pooled, X.mean((1, 2)), rtol=1e-5)
    flat = layers.flatten_channels_first(jnp.asarray(X))
    np.testing.assert_array_equal(flat, X.transpose(0, 3, 1, 2).reshape(4, -1))
