"""Convolutions whose weight gradient is fast on a CPU, for training.

XLA's CPU backend computes the gradient of a convolution's weights as a convolution with
a kernel as large as the images, for which it has no fast code.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]

_NHWC = ("NHWC", "HWIO", "NHWC")

_CHUNK = 4
"""Images at a time: their patches stay in the cache."""

_convolution: contextvars.ContextVar[Callable[..., jax.Array]] = contextvars.ContextVar(
    "convolution", default=lax.conv_general_dilated
)


def convolution() -> Callable[..., jax.Array]:
    """What convolutions of models call: JAX's own, or :func:`convolve`."""
    return _convolution.get()


@contextlib.contextmanager
def fast_weight_gradients() -> Iterator[None]:
    """Lets models that are applied inside call :func:`convolve`.

    Their derivatives can then be taken in reverse mode only.
    """
    token = _convolution.set(convolve)
    try:
        yield
    finally:
        _convolution.reset(token)


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **others: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` with another weight gradient on CPUs.

    On a CPU ``∂L/∂W = Σ_images gᵀ X`` with patches X [positions, kernel entries] that
    are cut out of a few images at a time; on other platforms, and for groups of
    channels or dilations, what JAX computes.

    Args:
        lhs: Images [B, H, W, C].
        rhs: Kernel [h, w, C, K].
        window_strides: Of height and width.
        padding: (low, high) of height and width.
        **others: As in JAX; without groups and dilations only ``precision`` counts,
            for axes are as above.

    Returns:
        [B, H', W', K].
    """
    dilations = [
        *(others.get("lhs_dilation") or ()),
        *(others.get("rhs_dilation") or ()),
    ]
    if others.get("feature_group_count", 1) > 1 or any(d > 1 for d in dilations):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **others)
    strides, pads = tuple(window_strides), tuple(map(tuple, padding))
    return _convolve(lhs, rhs, strides, pads, others.get("precision"))


def _own(
    images: jax.Array, kernel: jax.Array, strides: Any, pads: Any, precision: Any
) -> jax.Array:
    return lax.conv_general_dilated(
        images, kernel, strides, pads, dimension_numbers=_NHWC, precision=precision
    )


_convolve = jax.custom_vjp(_own, nondiff_argnums=(2, 3, 4))


def _forward(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _own(images, kernel, strides, pads, precision), (images, kernel)


def _backward(
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    known: tuple[jax.Array, jax.Array],
    slope: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = known
    (of_images,) = jax.linear_transpose(
        lambda images: _own(images, kernel, strides, pads, precision), images
    )(slope)

    def transposed(images: jax.Array, slope: jax.Array) -> jax.Array:
        of_kernel = jax.linear_transpose(
            lambda kernel: _own(images, kernel, strides, pads, precision), kernel
        )
        return of_kernel(slope)[0]

    by_patches = functools.partial(_by_patches, kernel, strides, pads, precision)
    of_kernel = lax.platform_dependent(
        images, slope, cpu=by_patches, default=transposed
    )
    return of_images, of_kernel


_convolve.defvjp(_forward, _backward)


def _by_patches(
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    images: jax.Array,
    slope: jax.Array,
) -> jax.Array:
    """The gradient of the kernel, summed over chunks of images."""
    height, width, _, outputs = kernel.shape
    chunk = math.gcd(images.shape[0], _CHUNK)
    # Every k-th image: with several devices none moves.
    parts = [array.reshape(chunk, -1, *array.shape[1:]) for array in (images, slope)]

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        padded = jnp.pad(parts[0][:, number], ((0, 0), *pads, (0, 0)))
        slope = parts[1][:, number]
        ends = [1 + (n - 1) * s for n, s in zip(slope.shape[1:3], strides, strict=True)]
        patches = [
            padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(height)
            for j in range(width)
        ]
        inputs = jnp.concatenate(patches, axis=-1)
        inputs = inputs.reshape(-1, inputs.shape[-1])
        found = jnp.matmul(
            slope.reshape(-1, outputs).T,
            inputs,
            precision=precision,
            preferred_element_type=total.dtype,
        )
        return total + found, None

    zero = jnp.zeros((outputs, math.prod(kernel.shape[:3])), jnp.float32)
    total, _ = lax.scan(add, zero, jnp.arange(parts[0].shape[1]))
    return total.T.reshape(kernel.shape).astype(kernel.dtype)
