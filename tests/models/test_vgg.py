import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import shapes_of, torch_shapes

from woodfisher_jax.models.vgg import VGG, adaptive_average_pool


def test_vgg11_has_torchvisions_names():
    shapes = torch_shapes("vgg11_bn")
    kernels = [name for name, shape in shapes.items() if len(shape) > 1]
    convolutions = [0, 4, 8, 11, 15, 18, 22, 25]
    expected = [f"features.{place}.weight" for place in convolutions]
    expected += [f"classifier.{place}.weight" for place in (0, 3, 6)]
    assert set(kernels) == set(expected)
    assert shapes["features.4.bias"] == (128,)
    assert shapes["features.26.running_var"] == (512,)
    assert shapes["classifier.0.weight"] == (25088, 4096)


@pytest.mark.parametrize(
    ("name", "last"), [("vgg13_bn", 31), ("vgg16_bn", 40), ("vgg19_bn", 49)]
)
def test_places_of_the_last_convolutions(name, last):
    shapes = torch_shapes(name)
    assert shapes[f"features.{last}.weight"] == (3, 3, 512, 512)
    assert shapes[f"features.{last + 1}.running_mean"] == (512,)
    assert f"features.{last + 3}.weight" not in shapes


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (8, 14), (16, 5)])
def test_adaptive_average_pool(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3))
    pooled = adaptive_average_pool(jnp.float32(x), 7)
    height, width = shape
    for i, j in np.ndindex(7, 7):
        rows = slice(i * height // 7, int(np.ceil((i + 1) * height / 7)))
        columns = slice(j * width // 7, int(np.ceil((j + 1) * width / 7)))
        mean = x[:, rows, columns].mean((1, 2))
        np.testing.assert_allclose(pooled[:, i, j], mean, atol=1e-5)


def test_adaptive_average_pool_of_the_right_size_changes_nothing():
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    np.testing.assert_array_equal(adaptive_average_pool(jnp.asarray(x), 7), x)


def test_depth_must_be_one_of_the_papers():
    with pytest.raises(ValueError, match=r"depth: expected .* 16, 19, got 12"):
        shapes_of(VGG(depth=12), np.zeros((1, 32, 32, 3)))
