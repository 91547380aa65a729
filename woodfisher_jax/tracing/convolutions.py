"""Convolutions whose weight gradient is fast on a CPU, for training and for fits.

XLA's CPU backend computes the gradient of a convolution's weights as a convolution with
a kernel as large as the images, for which it has no fast code.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]

_CHUNK = 4
"""Images at a time: their patches stay in the cache."""

_convolution: contextvars.ContextVar[Callable[..., jax.Array]] = contextvars.ContextVar(
    "convolution", default=lax.conv_general_dilated
)


def convolution() -> Callable[..., jax.Array]:
    """What convolutions of models call: JAX's own, or :func:`convolve`."""
    return _convolution.get()


def are_fast() -> bool:
    """Whether :func:`fast_weight_gradients` is on."""
    return convolution() is convolve


@contextlib.contextmanager
def fast_weight_gradients() -> Iterator[None]:
    """Lets models and segments of programs traced inside call :func:`convolve`.

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
    are cut out of a few images at a time; on other platforms, and with groups,
    dilations, an output type of its own, or other than two axes of space, what JAX
    computes.

    Args:
        lhs: Images, by default [B, C, H, W] as in JAX.
        rhs: Kernel, by default [K, C, h, w].
        window_strides: Of height and width.
        padding: (low, high) of height and width.
        **others: As in JAX.

    Returns:
        By default [B, K, H', W'].
    """
    dilations = [
        *(others.get("lhs_dilation") or ()),
        *(others.get("rhs_dilation") or ()),
    ]
    if (
        lhs.ndim != 4
        or others.get("feature_group_count", 1) > 1
        or others.get("batch_group_count", 1) > 1
        or others.get("preferred_element_type") not in (None, lhs.dtype)
        or any(d > 1 for d in dilations)
    ):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **others)
    numbers = lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, others.get("dimension_numbers")
    )
    pads = tuple((low, high) for low, high in padding)
    how = _How(tuple(window_strides), pads, numbers, others.get("precision"))
    return _convolve(how, lhs, rhs)


class _How(NamedTuple):
    """What a convolution does with its arrays."""

    strides: tuple[int, ...]
    pads: Pads
    numbers: lax.ConvDimensionNumbers
    precision: Any


def _own(how: _How, images: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        how.strides,
        how.pads,
        dimension_numbers=how.numbers,
        precision=how.precision,
    )


_convolve = jax.custom_vjp(_own, nondiff_argnums=(0,))


def _forward(
    how: _How, images: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _own(how, images, kernel), (images, kernel)


def _backward(
    how: _How, known: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = known
    (of_images,) = jax.linear_transpose(
        lambda images: _own(how, images, kernel), images
    )(slope)

    def transposed(images: jax.Array, slope: jax.Array) -> jax.Array:
        of_kernel = jax.linear_transpose(
            lambda kernel: _own(how, images, kernel), kernel
        )
        return of_kernel(slope)[0]

    by_patches = functools.partial(_by_patches, how, kernel)
    of_kernel = lax.platform_dependent(
        images, slope, cpu=by_patches, default=transposed
    )
    return of_images, of_kernel


_convolve.defvjp(_forward, _backward)


def _by_patches(
    how: _How, kernel: jax.Array, images: jax.Array, slope: jax.Array
) -> jax.Array:
    """The gradient of the kernel, summed over chunks of images."""
    # The specs have the axes of batch (or outputs) and channels first.
    (b, c, *space), (k, i, *window), (b_out, k_out, *space_out) = how.numbers
    images = jnp.transpose(images, (b, *space, c))
    slope = jnp.transpose(slope, (b_out, *space_out, k_out))
    order = (*window, i, k)
    height, width, _, outputs = shape = tuple(kernel.shape[axis] for axis in order)
    chunk = math.gcd(images.shape[0], _CHUNK)
    # Every k-th image: with several devices none moves.
    parts = [array.reshape(chunk, -1, *array.shape[1:]) for array in (images, slope)]

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        images = parts[0][:, number]
        # Not jnp.pad: a pad may be negative.
        pads = [(low, high, 0) for low, high in ((0, 0), *how.pads, (0, 0))]
        padded = lax.pad(images, jnp.zeros((), images.dtype), pads)
        slope = parts[1][:, number]
        ends = [
            1 + (n - 1) * s for n, s in zip(slope.shape[1:3], how.strides, strict=True)
        ]
        patches = [
            padded[
                :, i : i + ends[0] : how.strides[0], j : j + ends[1] : how.strides[1]
            ]
            for i in range(height)
            for j in range(width)
        ]
        inputs = jnp.concatenate(patches, axis=-1)
        inputs = inputs.reshape(-1, inputs.shape[-1])
        found = jnp.matmul(
            slope.reshape(-1, outputs).T,
            inputs,
            precision=how.precision,
            preferred_element_type=total.dtype,
        )
        return total + found, None

    # Sums of half precision in float32, those of float64 in that.
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    zero = jnp.zeros((outputs, math.prod(shape[:3])), wide)
    total, _ = lax.scan(add, zero, jnp.arange(parts[0].shape[1]))
    found = total.T.reshape(shape).astype(kernel.dtype)
    return jnp.transpose(found, tuple(map(order.index, range(4))))
