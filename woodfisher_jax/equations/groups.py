"""Joint saliency of groups: the loss increase when all weights of a group are removed.

Optimal Brain Surgeon gives the loss increase when one weight is removed and all others
adjust. For a set Q it is, with F⁻¹ of the block that contains Q,

    ρ_Q = w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q / 2

(Kurtic et al., The Optimal BERT Surgeon, arXiv:2203.07259.) The sum of single
saliencies would assume that the weights of Q are independent, which those of one filter
are not. F has no terms between blocks, so the saliency of a group that spans several
blocks is the sum over its parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.batched import map_blocks
from woodfisher_jax.equations.factors import inverse_factor
from woodfisher_jax.equations.fisher import (
    SOLVERS,
    gram_rounding,
    leverage_changes,
)
from woodfisher_jax.equations.precision import (
    LEAST_LEFT,
    MOST_LOST,
    in_float64,
    matmul,
    wide,
)

ELIMINATED = 16
"""Largest group that is solved by elimination, in batches of groups."""

TOGETHER = 2**22
"""Most numbers that a batch of groups takes."""


# ---------------------------------------------------------------- λ [F⁻¹]_QQ, one block


class _Inverse(NamedTuple):
    """λ F⁻¹ of one block, in a form that gives its principal submatrices.

    Attributes:
        rows: X, one row for each weight [c, k].
        sign: -1 for I - X Xᵀ, 1 for X Xᵀ, 0 for X itself.
    """

    rows: jax.Array
    sign: int


def _inverse_of(
    solver: str, factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> _Inverse:
    """λ F⁻¹ in the form of a solver's factor."""
    if solver == "sample_space":
        return _Inverse(matmul(gradients.T, factor.T), -1)
    if solver == "dense":
        return _Inverse(jnp.sqrt(damping) * factor.T, 1)
    return _Inverse(damping * factor, 0)


def _taken(array: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.take(array, index, axis=axis, mode="fill", fill_value=0)


def _submatrix(inverse: _Inverse, index: jax.Array) -> jax.Array:
    """λ [F⁻¹]_QQ, [q, q]; the identity for padding."""
    rows = _taken(inverse.rows, index)
    identity = jnp.eye(len(index), dtype=rows.dtype)
    if inverse.sign < 0:
        return identity - matmul(rows, rows.T)
    product = matmul(rows, rows.T) if inverse.sign else _taken(rows, index, axis=1)
    real = index < len(inverse.rows)
    return jnp.where(real[:, None] & real, product, identity)


# ------------------------------------------------------------ quadratic forms of groups


def _eliminated(matrix: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``vᵀ A⁻¹ v`` and the smallest pivot, a measure of cancellation.

    The Schur complement of A in [[A, v], [vᵀ, 0]], one row at a time. Elementwise,
    because batches of small LAPACK calls are slow, and on CPUs two batched calls at
    once may deadlock.
    """
    corner = jnp.zeros((1, 1), vector.dtype)
    left = jnp.block([[matrix, vector[:, None]], [vector[None], corner]])
    smallest = jnp.ones((), matrix.dtype)
    for _ in range(len(vector)):
        pivot, column = left[0, 0], left[1:, 0]
        smallest = jnp.minimum(smallest, pivot)
        left = left[1:, 1:] - column[:, None] * (column / pivot)
    return -left[0, 0], smallest


def _factorized(matrix: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The results of :func:`_eliminated` by Cholesky, for one large matrix."""
    inverse = inverse_factor(matrix)
    half = matmul(inverse, vector[:, None])
    # The pivots are the squares of L's diagonal, which is that of L⁻¹ inverted.
    return jnp.sum(half * half), 1 / jnp.max(jnp.diagonal(inverse) ** 2)


def _solved(matrix: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    small = len(vector) <= ELIMINATED
    return (_eliminated if small else _factorized)(matrix, vector)


def _in_sample_space(inverse: _Inverse, size: int) -> bool:
    """Whether a group has more weights than there are samples."""
    return inverse.sign < 0 and size > inverse.rows.shape[1]


def _form(
    inverse: _Inverse, index: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``w_Qᵀ (λ [F⁻¹]_QQ)⁻¹ w_Q`` and the smallest pivot.

    For more weights than samples, with Z the rows of Q,

        (I - Z Zᵀ)⁻¹ = I + Z (I - Zᵀ Z)⁻¹ Zᵀ
    """
    if not _in_sample_space(inverse, len(index)):
        return _solved(_submatrix(inverse, index), vector)
    rows = _taken(inverse.rows, index)
    along = matmul(vector[None], rows)[0]
    form, pivot = _solved(_complement(rows), along)
    return jnp.sum(vector * vector) + form, pivot


def _complement(rows: jax.Array) -> jax.Array:
    """I - Zᵀ Z, [N, N]."""
    return jnp.eye(rows.shape[1], dtype=rows.dtype) - matmul(rows.T, rows)


class _Found(NamedTuple):
    """Quadratic forms of the parts of groups in one table.

    Attributes:
        forms: Quadratic forms of each part and choice [parts, choices].
        pivots: Smallest pivots [parts].
    """

    forms: jax.Array
    pivots: jax.Array


def _forms(
    inverse: _Inverse,
    columns: jax.Array,
    weights: jax.Array,
    removals: jax.Array | None,
) -> _Found:
    """The quadratic forms of all parts of a table, in batches."""

    def whole(index: jax.Array) -> _Found:
        form, pivot = _form(inverse, index, _taken(weights, index))
        return _Found(form[None], pivot)

    def choices(index: jax.Array) -> _Found:
        matrix, vector = _submatrix(inverse, index), _taken(weights, index)
        _, pivot = _eliminated(matrix, vector)
        assert removals is not None
        some = matrix[removals[:, :, None], removals[:, None, :]]
        forms, _ = jax.vmap(_eliminated)(some, vector[removals])
        return _Found(forms, pivot)

    number, size = columns.shape
    taken = size * (inverse.rows.shape[1] + size)
    if removals is not None:
        taken += len(removals) * (removals.shape[1] + 1) ** 2
    together = min(number, max(1, TOGETHER // taken))
    one = whole if removals is None else choices
    if size > ELIMINATED:
        return map_blocks(one, columns, together)
    return jax.lax.map(one, columns, batch_size=together)


# ------------------------------------------------------------------ the group saliency


@in_float64
def group_forms(
    gradients: jax.Array,
    weights: jax.Array,
    tables: Sequence[jax.Array],
    damping: jax.Array,
    solver: str = "sample_space",
    removals: jax.Array | None = None,
) -> list[jax.Array]:
    """ρ_Q of the groups of one block.

    Args:
        gradients: G, [N, c], zero for weights that are pruned already.
        weights: w, [c]; in methods of first order w - h.
        tables: Columns of the groups, each [groups, size]; c is padding.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        removals: For N:M the positions in a group that may be removed together
            [choices, M - N]; default all positions.

    Returns:
        ρ [groups, choices] for each table, in the dtype of the gradients; NaN where F
        is too ill conditioned.
    """
    factor = SOLVERS[solver].factorize(gradients, damping)
    inverse = _inverse_of(solver, factor, wide(gradients), wide(damping))
    weights = wide(weights)
    found = [_forms(inverse, columns, weights, removals) for columns in tables]
    least = jnp.zeros(())
    if inverse.sign < 0:
        left = 1.0 - jnp.sum(jnp.square(inverse.rows), axis=1)
        rounding = gram_rounding(gradients, damping)
        _, changes = leverage_changes(factor, rounding, gradients, left)
        # Less strict than for the diagonal, for the changes are of other columns than
        # the smallest pivot.
        least = jnp.maximum(LEAST_LEFT, jnp.max(changes) / (10 * MOST_LOST))
    sound = [jnp.all(f.pivots > least) & jnp.all(f.forms >= 0) for f in found]
    scale = jnp.where(jnp.all(jnp.stack(sound)), wide(damping) / 2, jnp.nan)
    return [(scale * f.forms).astype(gradients.dtype) for f in found]
