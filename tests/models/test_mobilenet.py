import jax
import numpy as np
import pytest
from numpy_layers import relu, torch_conv_norm
from random_weights import random_variables, shapes_of

from woodfisher_jax.models import build_model
from woodfisher_jax.models.mobilenet import InvertedResidual, SeparableBlock

IMAGES = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_block_equals_an_independent_forward_pass(stride):
    block = SeparableBlock(6, stride)
    variables, state = random_variables(block, IMAGES)
    y = relu(torch_conv_norm(np.float64(IMAGES), state, "0", "1", stride, padding=1))
    expected = relu(torch_conv_norm(y, state, "3", "4"))
    np.testing.assert_allclose(
        jax.jit(block.apply)(variables, IMAGES), expected, atol=1e-4
    )


def relu6(x):
    return np.clip(x, 0, 6)


@pytest.mark.parametrize(
    ("channels", "expansion", "stride"), [(4, 1, 1), (4, 3, 1), (6, 3, 1), (4, 3, 2)]
)
def test_inverted_residual_equals_an_independent_forward_pass(
    channels, expansion, stride
):
    block = InvertedResidual(channels, expansion, stride)
    variables, state = random_variables(block, IMAGES)
    # Large enough for the activation's upper end.
    x = 4 * np.float64(IMAGES)
    y, place = x, 0
    if expansion > 1:
        y, place = relu6(torch_conv_norm(y, state, "conv.0.0", "conv.0.1")), 1
    depthwise = f"conv.{place}.0", f"conv.{place}.1"
    y = relu6(torch_conv_norm(y, state, *depthwise, stride, padding=1))
    assert y.max() == 6
    y = torch_conv_norm(y, state, f"conv.{place + 1}", f"conv.{place + 2}")
    expected = x + y if stride == 1 and channels == 4 else y
    actual = jax.jit(block.apply)(variables, np.float32(x))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("mobilenet_v1", "model13"),
        pytest.param("mobilenet_v2", "features18", marks=pytest.mark.slow),
    ],
)
def test_strides_make_7_by_7_of_224(name, last):
    model = build_model(name)
    x = np.zeros((1, 224, 224, 3), np.float32)
    _, seen = jax.eval_shape(
        lambda v: model.apply(v, x, capture_intermediates=True, mutable=True),
        shapes_of(model, x),
    )
    features = seen["intermediates"][last]["__call__"][0]
    assert features.shape[1:3] == (7, 7)
