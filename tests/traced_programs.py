"""Small programs whose tensors have axes to be found, and what is found."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.tracing.axes import find_axes

B, S, C, H, D = 2, 6, 32, 4, 8
Roles = dict[str, str]

Program = tuple[Any, Any, Any, Roles]
"""A function, its parameters and its batch; the letters of their axes by path."""


def ones(*shape: int) -> jax.Array:
    """By NumPy: XLA would compile a function for each shape."""
    return jax.device_put(np.ones(shape, np.float32))


X, IMAGES = ones(B, S, C), ones(2, 8, 8, 3)


def roles(f: Callable[..., Any], params: Any, batch: Any) -> Roles:
    """Letters by path; "?" where they are in doubt."""
    found = find_axes(f, params, batch)
    return {path: "?" if axes.doubt else axes.roles for path, axes in found.items()}


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, S, H * D)


def conv(x: jax.Array, w: jax.Array, form: str = "HWIO", groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", form, "NHWC"),
        feature_group_count=groups,
    )


SQUARE, STACK, DENSE = ones(C, C), ones(3, C, C), ones(C, 5)
LABELS = jnp.zeros(S, int)
TOKENS = jnp.zeros((B, S), int)
