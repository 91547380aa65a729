"""Products at full precision, float64 where it is needed, and what it may lose.

JAX need not have float64 enabled: see :func:`in_float64`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

MOST_LOST = 1e-5
"""Most that float64 may lose, as a relative error; beyond it a result is NaN. What is
multiplied in float32 is then right to 1e-4, and to 1e-5 up to condition numbers of
1e9."""

EPS = 2.0**-52
"""Of float64."""

LEAST_LEFT = EPS / MOST_LOST
"""Of a difference from 1 that is not lost."""


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """X Y at full precision, for matrices of one dtype or stacks of them."""
    # Not jnp.matmul: it names the dtype of the result, and float64 is refused where jit
    # is batched by a vmap outside of it, for float64 is not enabled there.
    stacked = tuple(range(left.ndim - 2))
    contracted = (left.ndim - 1,), (right.ndim - 2,)
    # By default accelerators multiply float32 matrices in TF32 or bfloat16 passes, with
    # errors of 1e-3 in the diagonal.
    return jax.lax.dot_general(
        left, right, (contracted, (stacked, stacked)), precision="highest"
    )


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float64 enabled while it runs, or is traced."""

    @wraps(function)
    def enabled(*args: Any, **named: Any) -> Any:
        with jax.enable_x64(True):
            return function(*args, **named)

    return enabled


def wide(array: Any) -> jax.Array:
    """An array in float64, within :func:`in_float64`."""
    return jnp.asarray(array, jnp.float64)


def random_signs(number: int) -> jax.Array:
    """The same pseudo-random signs each time: the top bits of hashed indices.

    MurmurHash3's final mix. jax.random takes a quarter of a second to compile.
    """
    bits = jnp.arange(number, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.where(bits >> 31, 1.0, -1.0)


def change_by_rounding(
    product: Callable[[jax.Array], jax.Array], vector: jax.Array, result: jax.Array
) -> jax.Array:
    """How far F⁻¹v may be off because v was rounded: half a unit an entry, any sign.

    Args:
        product: Vector [c] -> its product with F⁻¹.
        vector: v, float32 [c].
        result: F⁻¹v, [c].

    Returns:
        The largest change, by the largest entry of the result (scalar).
    """
    lost = jnp.finfo(vector.dtype).eps / 2 * random_signs(len(vector)) * vector
    largest = jnp.max(jnp.abs(result))
    change = jnp.max(jnp.abs(product(lost)))
    return change / jnp.where(largest > 0, largest, 1.0)
