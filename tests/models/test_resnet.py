import numpy as np
import pytest
from numpy_layers import relu, torch_batch_norm, torch_convolution
from random_weights import random_variables, shapes_of, torch_shapes

from woodfisher_jax.models.resnet import BasicBlock, Bottleneck, ResNet


def residual_reference(state, x, strides, sizes):
    """Convolutions with batch norms; the shortcut has its own when the state has."""
    y = x
    for number, (stride, size) in enumerate(zip(strides, sizes, strict=True), start=1):
        y = torch_convolution(y, state, f"conv{number}", stride, size // 2)
        y = torch_batch_norm(y, state, f"bn{number}")
        y = relu(y) if number < len(sizes) else y
    if "downsample.0.weight" in state:
        x = torch_convolution(x, state, "downsample.0", max(strides), 0)
        x = torch_batch_norm(x, state, "downsample.1")
    return relu(x + y)


@pytest.mark.parametrize(
    ("block", "strides", "sizes", "projects"),
    [
        (BasicBlock(4), (1, 1), (3, 3), False),
        (BasicBlock(6, stride=2), (2, 1), (3, 3), True),
        (Bottleneck(4, 3), (1, 1, 1), (1, 3, 1), False),
        (Bottleneck(8, 3), (1, 1, 1), (1, 3, 1), True),
        (Bottleneck(8, 3, stride=2), (1, 2, 1), (1, 3, 1), True),
    ],
)
def test_blocks_equal_an_independent_forward_pass(block, strides, sizes, projects):
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)
    variables, state = random_variables(block, x)
    assert ("downsample.0.weight" in state) == projects
    expected = residual_reference(state, np.float64(x), strides, sizes)
    np.testing.assert_allclose(block.apply(variables, x), expected, atol=1e-4)


def test_resnet50_has_torchvisions_names():
    shapes = torch_shapes("resnet50")
    assert shapes["conv1.weight"] == (7, 7, 3, 64)
    assert shapes["layer1.0.conv1.weight"] == (1, 1, 64, 64)
    assert shapes["layer1.0.downsample.0.weight"] == (1, 1, 64, 256)
    assert shapes["layer3.5.conv2.weight"] == (3, 3, 256, 256)
    assert shapes["layer4.2.bn3.running_var"] == (2048,)
    assert shapes["fc.weight"] == (2048, 1000)
    # As counted for the original: 54 prunable tensors of 25,502,912 weights.
    kernels = [shape for shape in shapes.values() if len(shape) > 1]
    assert len(kernels) == 54
    assert sum(np.prod(shape) for shape in kernels) == 25_502_912


def test_wide_resnet_is_wide_inside_bottlenecks_only():
    wide, narrow = torch_shapes("wide_resnet50_2"), torch_shapes("resnet50")
    assert wide.keys() == narrow.keys()
    assert wide["layer2.1.conv2.weight"] == (3, 3, 256, 256)
    assert wide["layer2.1.conv3.weight"] == (1, 1, 256, 512)
    assert wide["layer2.0.downsample.0.weight"] == (1, 1, 256, 512)


def test_basic_blocks_have_no_shortcut_in_the_first_stage():
    shapes = torch_shapes("resnet18")
    assert "layer1.0.downsample.0.weight" not in shapes
    assert shapes["layer2.0.downsample.0.weight"] == (1, 1, 64, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 20}, "depth: expected one of 18, 34, 50, 101, 152, got 20"),
        ({"depth": 18, "widening": 2}, "widening: expected 1, since ResNet-18 .*got 2"),
    ],
)
def test_forms_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(ResNet(**settings), np.zeros((1, 32, 32, 3)))
