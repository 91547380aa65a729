import jax
import numpy as np
import pytest
from random_weights import shapes_of

from woodfisher_jax.models.vgg import VGG, adaptive_average_pool

POOL = jax.jit(adaptive_average_pool, static_argnums=1)


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (8, 14), (16, 5), (7, 7)])
def test_adaptive_average_pool(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3))
    pooled = np.asarray(POOL(np.float32(x), 7))
    height, width = shape
    for i, j in np.ndindex(7, 7):
        rows = slice(i * height // 7, int(np.ceil((i + 1) * height / 7)))
        columns = slice(j * width // 7, int(np.ceil((j + 1) * width / 7)))
        mean = x[:, rows, columns].mean((1, 2))
        np.testing.assert_allclose(pooled[:, i, j], mean, atol=1e-5)


def test_depth_must_be_one_of_the_papers():
    with pytest.raises(ValueError, match=r"depth: expected .* 16, 19, got 12"):
        shapes_of(VGG(depth=12), np.zeros((1, 32, 32, 3)))
