"""The weight gradient of training and of fits against JAX's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.models.layers import conv
from woodfisher_jax.tracing.convolutions import convolve, fast_weight_gradients


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


@pytest.mark.parametrize(
    "layout", [None, ("NCHW", "HWIO", "NHWC"), ("CWHN", "IOWH", "HNWC")]
)
def test_any_layout_has_the_gradients_of_jax(layout: tuple[str, ...] | None) -> None:
    rng = np.random.default_rng(1)
    sizes = {"N": 4, "C": 3, "H": 8, "W": 7}, {"O": 5, "I": 3, "H": 3, "W": 2}
    images, kernel = (
        jnp.asarray(rng.standard_normal([size[axis] for axis in spec]), jnp.float32)
        for spec, size in zip(layout or ("NCHW", "OIHW"), sizes, strict=False)
    )

    def loss(function: Any, images: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = function(
            images, kernel, (2, 1), ((1, -1), (-1, 2)), dimension_numbers=layout
        )
        return jnp.sum(jnp.sin(outputs))

    gradient = jax.value_and_grad(loss, argnums=(1, 2))
    expected = gradient(jax.lax.conv_general_dilated, images, kernel)
    found = gradient(convolve, images, kernel)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    text = str(jax.make_jaxpr(partial(gradient, convolve))(images, kernel))
    assert "platform_index" in text


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 9, 4), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
        ((4, 9, 8, 4), {"dimension_numbers": NHWC, "batch_group_count": 2}),
        (
            (2, 9, 8, 4),
            {"dimension_numbers": NHWC, "preferred_element_type": jnp.float64},
        ),
    ],
)
def test_what_has_no_patches_is_that_of_jax(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    space = len(shape) - 2
    images, kernel = jnp.ones(shape), jnp.ones((*(3,) * space, 4, 6))
    window = {"window_strides": (1,) * space, "padding": ((1, 1),) * space}
    with jax.enable_x64(True):
        found, expected = (
            str(jax.make_jaxpr(partial(f, **window, **options))(images, kernel))
            for f in (convolve, jax.lax.conv_general_dilated)
        )
    assert found == expected


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


def test_float64_stays_so() -> None:
    def loss(function: Any, kernel: jax.Array) -> jax.Array:
        images = IMAGES.astype(jnp.float64)
        outputs = function(images, kernel, (1, 1), PADS, dimension_numbers=NHWC)
        return jnp.sum(jnp.sin(outputs))

    with jax.enable_x64(True):
        kernel = KERNEL.astype(jnp.float64)
        expected, found = (
            jax.grad(partial(loss, function))(kernel)
            for function in (jax.lax.conv_general_dilated, convolve)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
