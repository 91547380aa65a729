"""The weight gradient of training against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.models.convolutions import convolve, fast_weight_gradients
from woodfisher_jax.models.layers import conv


@pytest.mark.parametrize(
    ("size", "stride", "groups", "examples"),
    [
        (3, 2, 1, 3),
        (3, 1, 4, 2),
        pytest.param(3, 1, 1, 8, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, 2, marks=pytest.mark.slow),
        pytest.param(7, 2, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_jax(
    size: int, stride: int, groups: int, examples: int
) -> None:
    rng = np.random.default_rng(size)
    images = jnp.asarray(rng.standard_normal((examples, 9, 8, 4)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 4 // groups, 8)), jnp.float32)
    module = conv(8, size, stride, groups=groups, name="conv")
    signs = jnp.sign(jnp.asarray(rng.standard_normal(8), jnp.float32))

    def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
        module = conv(8, size, stride, groups=groups, name="conv")
        outputs = module.apply({"params": {"kernel": kernel}}, images)
        return jnp.sum(jnp.sin(outputs) * signs)

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = gradient(kernel, images)
    with fast_weight_gradients():
        found = gradient(kernel, images)
        text = str(jax.make_jaxpr(gradient)(kernel, images))
    assert ("platform_index" in text) == (groups == 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert module.conv_general_dilated is jax.lax.conv_general_dilated


NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8, 4)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 4, 5)), jnp.float32)
PADS = ((1, 1), (1, 1))


def test_the_precision_is_that_of_every_product() -> None:
    def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
        found = convolve(
            images, kernel, (1, 1), PADS, dimension_numbers=NHWC, precision="highest"
        )
        return jnp.sum(jnp.sin(found))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(KERNEL, IMAGES))
    products = text.count("conv_general_dilated[") + text.count("dot_general[")
    # The images' gradient, the kernel's on a CPU and elsewhere, and the outputs.
    assert products == 4
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.mark.parametrize("which", ["lhs_dilation", "rhs_dilation"])
def test_dilations_are_those_of_jax(which: str) -> None:
    arguments = (IMAGES, KERNEL, (1, 1), PADS)
    options = {which: (2, 2), "dimension_numbers": NHWC}
    expected = jax.lax.conv_general_dilated(*arguments, **options)
    found = convolve(*arguments, **options)
    np.testing.assert_array_equal(found, expected)
