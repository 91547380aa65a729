import jax
import numpy as np
import pytest
from numpy_layers import relu, torch_batch_norm, torch_convolution
from random_weights import random_variables, shapes_of, torch_shapes

from woodfisher_jax.models import build_model
from woodfisher_jax.models.mobilenet import InvertedResidual, SeparableBlock

IMAGES = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)


def conv_norm(state, x, conv, norm, stride=1, padding=0):
    return torch_batch_norm(
        torch_convolution(x, state, conv, stride, padding), state, norm
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_block_equals_an_independent_forward_pass(stride):
    block = SeparableBlock(6, stride)
    variables, state = random_variables(block, IMAGES)
    y = relu(conv_norm(state, np.float64(IMAGES), "0", "1", stride, padding=1))
    expected = relu(conv_norm(state, y, "3", "4"))
    np.testing.assert_allclose(block.apply(variables, IMAGES), expected, atol=1e-4)


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
        y, place = relu6(conv_norm(state, y, "conv.0.0", "conv.0.1")), 1
    depthwise = f"conv.{place}.0", f"conv.{place}.1"
    y = relu6(conv_norm(state, y, *depthwise, stride, padding=1))
    assert y.max() == 6
    y = conv_norm(state, y, f"conv.{place + 1}", f"conv.{place + 2}")
    expected = x + y if stride == 1 and channels == 4 else y
    actual = block.apply(variables, np.float32(x))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_mobilenet_v1_has_the_names_of_the_str_checkpoints():
    shapes = torch_shapes("mobilenet_v1")
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {"model.0.0.weight", "fc.weight", "fc.bias"}
    expected |= {f"model.0.1.{leaf}" for leaf in norm}
    for block in range(1, 14):
        expected |= {f"model.{block}.{conv}.weight" for conv in (0, 3)}
        expected |= {f"model.{block}.{bn}.{leaf}" for bn in (1, 4) for leaf in norm}
    assert shapes.keys() == expected
    assert shapes["model.2.0.weight"] == (3, 3, 1, 64)
    assert shapes["model.2.3.weight"] == (1, 1, 64, 128)
    # As counted for the original: 28 prunable tensors of 4,209,088 weights.
    kernels = [shape for shape in shapes.values() if len(shape) > 1]
    assert len(kernels) == 28
    assert sum(np.prod(shape) for shape in kernels) == 4_209_088


def test_mobilenet_v2_has_torchvisions_names():
    shapes = torch_shapes("mobilenet_v2")
    assert shapes["features.0.0.weight"] == (3, 3, 3, 32)
    assert shapes["features.1.conv.0.0.weight"] == (3, 3, 1, 32)
    assert shapes["features.1.conv.1.weight"] == (1, 1, 32, 16)
    assert shapes["features.2.conv.0.1.running_mean"] == (96,)
    assert shapes["features.2.conv.1.0.weight"] == (3, 3, 1, 96)
    assert shapes["features.17.conv.2.weight"] == (1, 1, 960, 320)
    assert shapes["features.17.conv.3.bias"] == (320,)
    assert shapes["features.18.0.weight"] == (1, 1, 320, 1280)
    assert shapes["classifier.1.weight"] == (1280, 1000)


@pytest.mark.parametrize(
    ("name", "last"), [("mobilenet_v1", "model13"), ("mobilenet_v2", "features18")]
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
