import jax
import numpy as np
import pytest
from numpy_layers import torch_residual
from random_weights import random_variables, shapes_of

from woodfisher_jax.models.resnet import CifarResNet, ResidualBlock, ResNet


@pytest.mark.parametrize(
    ("channels", "stride", "projects"),
    [
        ((4, 4), 1, False),
        ((5, 6), 2, True),
        ((3, 3, 4), 1, False),
        ((3, 3, 8), 1, True),
        ((3, 3, 8), 2, True),
    ],
)
def test_blocks_equal_an_independent_forward_pass(channels, stride, projects):
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)
    block = ResidualBlock(channels, stride)
    variables, state = random_variables(block, x)
    assert ("downsample.0.weight" in state) == projects
    # The stride is that of the first 3 x 3 convolution.
    layers = ((3, 3), (stride, 1))
    if len(channels) == 3:
        layers = ((1, 3, 1), (1, stride, 1))
    expected = torch_residual(np.float64(x), state, "", *layers)
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ResNet(depth=20), "depth: expected one of 18, 34, 50, 101, 152, got 20"),
        (ResNet(depth=18, widening=2), "widening: expected 1, since ResNet-18 .*got 2"),
        *[
            (CifarResNet(depth=depth), f"20, 32, 44, 56, 110.*6n.*got {depth}")
            for depth in (18, 21, 0)
        ],
    ],
)
def test_forms_that_do_not_exist(model, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(model, np.zeros((1, 32, 32, 3)))
