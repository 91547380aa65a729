"""Products with the gradients of one block, by panels of columns where it is wide."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.precision import matmul, wide

WORTH_HALVING = 128
"""Rows above which two products of half the size are faster than one."""

PANEL = 1024
"""Columns that are multiplied at once where there are many, so that a panel of rows and
what is made of it stay in a core's cache. On a CPU (N = 1,000, c = 36,864) leverages
take half the time, the Gram matrix two thirds, :func:`along_rows` a fifth."""


def _panels(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, Callable[..., Any]]:
    """Where equal panels of columns start, and what cuts one out of the arrays.

    The arrays have one last axis of columns, behind which zeros fill the last panel.
    """
    columns = arrays[0].shape[-1]
    number = -(-columns // PANEL)
    width = -(-columns // number)
    filled = [
        jnp.pad(a, (*[(0, 0)] * (a.ndim - 1), (0, number * width - columns)))
        for a in arrays
    ]

    def cut(start: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.dynamic_slice_in_dim(a, start, width, a.ndim - 1) for a in filled
        ]

    # Not of 64 bits, for these are not enabled where a vmap outside is evaluated.
    return width * jnp.arange(number, dtype=jnp.int32), cut


def _are_few(columns: int) -> bool:
    return columns < 2 * PANEL


def sum_of_panels(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A function that sums over columns, such as a product, by panels of them.

    Args:
        function: Of arrays like ``arrays`` with some of the columns; columns of zeros
            add nothing.
        arrays: With one last axis of columns.
    """
    if _are_few(arrays[0].shape[-1]):
        return function(*arrays)
    starts, cut = _panels(arrays)

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return total + function(*cut(start)), None

    one = jax.eval_shape(lambda: function(*cut(starts[0])))
    return jax.lax.scan(add, jnp.zeros(one.shape, one.dtype), starts)[0]


def each_panel(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A function of each column, with a result [c], by panels of columns.

    Args:
        function: Of arrays like ``arrays`` with some of the columns.
        arrays: With one last axis of columns.
    """
    columns = arrays[0].shape[-1]
    if _are_few(columns):
        return function(*arrays)
    starts, cut = _panels(arrays)
    found = jax.lax.map(lambda start: function(*cut(start)), starts)
    return found.reshape(-1)[:columns]


def along_rows(rows: jax.Array, vector: jax.Array) -> jax.Array:
    """X v, in the precision of v, for rows X [N, c] of any."""

    def product(some: jax.Array, part: jax.Array) -> jax.Array:
        return matmul(some.astype(part.dtype), part[:, None])[:, 0]

    if _are_few(len(vector)):
        # A product with a vector would be formed along the columns of X.
        return jnp.sum(rows.astype(vector.dtype) * vector, axis=1)
    return sum_of_panels(product, rows, vector)


def sum_of_rows(factors: jax.Array, rows: jax.Array) -> jax.Array:
    """``Xᵀa`` in the precision of a [N], for rows X [N, c] of any.

    Row after row, so that no copy of X in the precision of a is formed: on a CPU that
    takes five times as long as the sum.
    """

    def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> Any:
        factor, row = one
        return total + factor * row.astype(total.dtype), None

    start = jnp.zeros(rows.shape[1], factors.dtype)
    return jax.lax.scan(add, start, (factors, rows))[0]


def gram_matrix(rows: jax.Array) -> jax.Array:
    """X Xᵀ in float64, for rows X [N, c] of any precision."""

    def of_some(columns: jax.Array) -> jax.Array:
        return _halved_gram(wide(columns))

    return sum_of_panels(of_some, rows)


def _halved_gram(rows: jax.Array) -> jax.Array:
    """X Xᵀ; one of the four quarters is copied by symmetry."""
    half = rows.shape[0] // 2
    if half < WORTH_HALVING:
        return matmul(rows, rows.T)
    upper, lower = rows[:half], rows[half:]
    corner = matmul(lower, upper.T)
    return jnp.block(
        [[matmul(upper, upper.T), corner.T], [corner, _halved_gram(lower)]]
    )


def leverages(factor: jax.Array, gradients: jax.Array) -> jax.Array:
    """``h_k = g_kᵀ S⁻¹ g_k = ‖L⁻¹ g_k‖²`` of the columns of G, for ``S = L Lᵀ``.

    Args:
        factor: L⁻¹, [N, N].
        gradients: G, [N, c], in the same dtype.

    Returns:
        h, [c].

    Example:
        >>> L, G = jnp.array([[0.5]]), jnp.array([[1.0, 4.0]])
        >>> leverages(L, G).tolist()
        [0.25, 4.0]
    """
    return each_panel(partial(_squares_of_lower, factor), gradients)


def _squares_of_lower(lower: jax.Array, matrix: jax.Array) -> jax.Array:
    """Sums of squares of the columns of L X, L lower triangular: without its zeros."""
    half = lower.shape[0] // 2
    if half < WORTH_HALVING:
        product = matmul(lower, matrix)
        return jnp.sum(product * product, axis=0)
    first = _squares_of_lower(lower[:half, :half], matrix[:half])
    below = matmul(lower[half:], matrix)
    return first + jnp.sum(below * below, axis=0)
