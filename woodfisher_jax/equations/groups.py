"""Joint saliency of groups: the loss increase when all weights of a group are removed.

Optimal Brain Surgeon gives the loss increase when one weight is removed and all others
adjust. For a set Q it is, with F⁻¹ of the block that contains Q,

    ρ_Q = w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q / 2

(Kurtic et al., The Optimal BERT Surgeon, arXiv:2203.07259.) The sum of single
saliencies would assume that the weights of Q are independent, which those of one filter
are not. F has no terms between blocks, so the saliency of a group that spans several
blocks is the sum over its parts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from woodfisher_jax.equations.fisher import (
    SOLVERS,
    diagonal_error,
    matmul,
    refined_product,
)

ELIMINATED = 16
"""Largest group that is solved by elimination, in batches of groups."""

TOGETHER = 2**22
"""Most numbers that a batch of groups takes."""

PROBES = 2
"""Groups of each kind for the error estimate."""


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
    lower = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    half = solve_triangular(lower, vector, lower=True)
    return jnp.sum(half * half), jnp.min(jnp.diagonal(lower) ** 2)


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


def _solution(inverse: _Inverse, index: jax.Array, vector: jax.Array) -> jax.Array:
    """``(λ [F⁻¹]_QQ)⁻¹ w_Q`` of one group, by the same systems as :func:`_form`."""

    def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
        lower = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        half = solve_triangular(lower, right, lower=True)
        return solve_triangular(lower, half, lower=True, trans=1)

    if not _in_sample_space(inverse, len(index)):
        return solve(_submatrix(inverse, index), vector)
    rows = _taken(inverse.rows, index)
    along = solve(_complement(rows), matmul(vector[None], rows)[0])
    return vector + matmul(along[None], rows.T)[0]


def _complement(rows: jax.Array) -> jax.Array:
    """I - Zᵀ Z, [N, N]."""
    return jnp.eye(rows.shape[1], dtype=rows.dtype) - matmul(rows.T, rows)


class _Found(NamedTuple):
    """Quadratic forms of the parts of groups in one table.

    Attributes:
        forms: Quadratic forms of each part and choice [parts, choices].
        whole: Quadratic forms of all weights of a part [parts].
        pivots: Smallest pivots [parts].
    """

    forms: jax.Array
    whole: jax.Array
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
        return _Found(form[None], form, pivot)

    def choices(index: jax.Array) -> _Found:
        matrix, vector = _submatrix(inverse, index), _taken(weights, index)
        form, pivot = _eliminated(matrix, vector)
        assert removals is not None
        some = matrix[removals[:, :, None], removals[:, None, :]]
        forms, _ = jax.vmap(_eliminated)(some, vector[removals])
        return _Found(forms, form, pivot)

    number, size = columns.shape
    taken = size * (inverse.rows.shape[1] + size)
    if removals is not None:
        taken += len(removals) * (removals.shape[1] + 1) ** 2
    together: int | None = min(number, max(1, TOGETHER // taken))
    if size > ELIMINATED and jax.default_backend() == "cpu":
        together = None  # One LAPACK call at a time: see _eliminated.
    one = whole if removals is None else choices
    return jax.lax.map(one, columns, batch_size=together)


# ------------------------------------------------------------------ the group saliency


def _probes(
    inverse: _Inverse, columns: jax.Array, weights: jax.Array, found: _Found
) -> jax.Array:
    """``(λ [F⁻¹]_QQ)⁻¹ w_Q`` of a few groups of a table, zero elsewhere [probes, c].

    The groups are those with the smallest pivots and those with the largest forms.
    """
    some = min(PROBES, len(columns))
    _, doubtful = jax.lax.top_k(-found.pivots, some)
    _, largest = jax.lax.top_k(found.whole, some)

    def solution(index: jax.Array) -> jax.Array:
        x = _solution(inverse, index, _taken(weights, index))
        return jnp.zeros_like(weights).at[index].set(x, mode="drop")

    return jax.lax.map(solution, columns[jnp.concatenate([doubtful, largest])])


def _error(
    product: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    weights: jax.Array,
    probes: jax.Array,
) -> jax.Array:
    """An estimate of the largest relative rounding error of the forms.

    For the computed ``x = ([F⁻¹]_QQ)⁻¹ w_Q``, zero outside of Q, the residual
    ``w - F⁻¹x`` changes the form ``xᵀw`` by ``xᵀ(w - F⁻¹x)``.

    Args:
        product: v -> F⁻¹v, refined against F itself, and its error estimate.
        weights: w, [c].
        probes: x, [probes, c].
    """
    products, changes = jax.vmap(product)(probes)
    total = jnp.sum(probes * weights, axis=1)
    left = jnp.abs(jnp.sum(probes * (weights - products), axis=1))
    return jnp.max(left / jnp.where(total > 0, total, 1.0) + changes)


def group_forms(
    gradients: jax.Array,
    weights: jax.Array,
    tables: Sequence[jax.Array],
    damping: jax.Array,
    solver: str = "sample_space",
    removals: jax.Array | None = None,
) -> tuple[list[jax.Array], jax.Array]:
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
        ρ [groups, choices] for each table, and an estimate of the largest relative
        rounding error (scalar).
    """
    row = SOLVERS[solver]
    factor = row.factorize(gradients, damping)
    inverse = _inverse_of(solver, factor, gradients, damping)
    if inverse.sign < 0:
        diagonal = (1 - jnp.sum(inverse.rows**2, axis=1)) / damping
    else:
        diagonal = row.diagonal(factor, gradients, damping)
    found = [_forms(inverse, columns, weights, removals) for columns in tables]
    probes = [
        _probes(inverse, columns, weights, forms)
        for columns, forms in zip(tables, found, strict=True)
    ]
    product = partial(refined_product, row, factor, gradients, damping)
    error = jnp.maximum(
        diagonal_error(row, factor, gradients, damping, diagonal),
        _error(product, weights, damping * jnp.concatenate(probes)),
    )
    sound = [jnp.all(f.pivots > 0) & jnp.all(f.forms >= 0) for f in found]
    error = jnp.where(jnp.all(jnp.stack(sound)), error, jnp.inf)
    return [damping / 2 * f.forms for f in found], error
