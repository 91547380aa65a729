"""Kronecker factors of layers: damping, inverse, diagonal and products.

The inverse of a Kronecker product is the product of two inverses, so no matrix of the
size of a layer squared is formed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_RESIDUAL = 1e-10
"""Of the joint update, relative; the error of the weights may be as many times larger
as the condition of the factors is large."""

_MOST_ROUNDS = 1000


class Factor(NamedTuple):
    """The Kronecker factors of one layer, or their inverses; columns are its inputs.

    Attributes:
        inputs: A, float64 [groups, columns, columns].
        outputs: S, float64 [groups, outputs, outputs].
        entries: From the path of the prunable weight and bias to indices into the flat
            tensor, int [groups, outputs, columns of the tensor].
        shapes: From the same paths to the tensors' shapes.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    entries: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]


Factors = dict[str, Factor]
"""From the path of a layer's weight to its factors."""


def damped(factors: Factors, damping: float, *, pi: bool = False) -> Factors:
    """Damps each factor: ``F_l ≈ S_λ ⊗ A_λ``.

    ``A_λ = A + π √λ I`` and ``S_λ = S + √λ / π I``, so that F_l has λ on its diagonal,
    among other terms. π is 1, or with ``pi`` ``√((tr A / dim A) / (tr S / dim S))``,
    which damps each factor in proportion to its size.

    Martens & Grosse 2015, Section 6.3.

    Note: the original's π² is the paper's π; the result is the same. Where a factor is
    zero (no gradient reaches the layer) π is 1 here.

    Args:
        factors: From :func:`~woodfisher_jax.curvature.kfac.kfac_factors`.
        damping: λ > 0.
        pi: Whether the damping is split by the traces; default False.

    Returns:
        Factors with A_λ and S_λ in place of A and S.

    Raises:
        ValueError: If damping is not positive.
    """
    if not (damping > 0 and np.isfinite(damping)):
        raise ValueError(f"damping={damping}; expected a finite number above 0")
    found, root = {}, np.sqrt(damping)
    for path, factor in factors.items():
        split = _trace_ratio(factor) if pi else np.ones((len(factor.inputs), 1, 1))
        found[path] = factor._replace(
            inputs=factor.inputs + root * split * np.eye(factor.inputs.shape[-1]),
            outputs=factor.outputs + root / split * np.eye(factor.outputs.shape[-1]),
        )
    return found


def _trace_ratio(factor: Factor) -> np.ndarray:
    """π of each group, [groups, 1, 1]."""
    inputs, outputs = (
        np.trace(matrix, axis1=1, axis2=2) / matrix.shape[-1]
        for matrix in (factor.inputs, factor.outputs)
    )
    both = (inputs > 0) & (outputs > 0)
    ratio = np.where(both, inputs, 1.0) / np.where(both, outputs, 1.0)
    return np.sqrt(ratio)[:, None, None]


def inverse(factors: Factors) -> Factors:
    """Inverse of each factor: ``(S_λ ⊗ A_λ)⁻¹ = S_λ⁻¹ ⊗ A_λ⁻¹``.

    Args:
        factors: The result of :func:`damped`.

    Returns:
        Factors with the inverses of A and S.

    Raises:
        ValueError: If a factor is not positive definite in float64.
    """
    return {
        path: factor._replace(
            inputs=_inverse(factor.inputs, path),
            outputs=_inverse(factor.outputs, path),
        )
        for path, factor in factors.items()
    }


def _inverse(matrix: np.ndarray, path: str) -> np.ndarray:
    """Inverse of each group's factor, by Cholesky."""
    # In NumPy: float64 needs no context, and no LAPACK call waits for XLA's threads.
    try:
        lower = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"the damped Kronecker factor of {path!r} is not positive definite even in "
            "float64; raise damping, or scale the loss down"
        ) from error
    inverse_factor = np.linalg.inv(lower)
    return np.swapaxes(inverse_factor, 1, 2) @ inverse_factor


def diagonal(factors: Factors) -> dict[str, jax.Array]:
    """diag(S ⊗ A): ``S_oo A_ii`` for the weight from input i to output o.

    Args:
        factors: As they are, damped or inverted.

    Returns:
        From the path of each prunable tensor to an array of its shape, float32.
    """
    found: dict[str, jax.Array] = {}
    for factor in factors.values():
        inputs, outputs = (
            np.diagonal(matrix, axis1=1, axis2=2)
            for matrix in (factor.inputs, factor.outputs)
        )
        found |= _by_path(factor, outputs[:, :, None] * inputs[:, None, :])
    return found


def product(
    factors: Factors, vectors: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, jax.Array]:
    """(S ⊗ A) v: ``S V A`` for the matrix V [outputs, columns] of each layer.

    Args:
        factors: As they are, damped or inverted.
        vectors: v, from the path of each prunable tensor to an array of its shape.

    Returns:
        From path to an array of the tensor's shape, float32.
    """
    found: dict[str, jax.Array] = {}
    for factor in factors.values():
        matrix = _matrix(factor, vectors)
        found |= _by_path(factor, factor.outputs @ matrix @ factor.inputs)
    return found


def joint_update(
    factors: Factors,
    inverses: Factors,
    weights: Mapping[str, jax.Array | np.ndarray],
    kept: Mapping[str, jax.Array | np.ndarray],
) -> tuple[dict[str, jax.Array], float]:
    """The minimizer of each layer's quadratic model with the pruned weights at zero.

        minimize  tr(S D A Dᵀ) / 2    subject to  D_P = -W_P

    on the kept weights: ``[S Z A]_K = [S W_P A]_K`` for D = Z - W_P with Z zero on P.
    A submatrix of a Kronecker product has no Kronecker factors, so that conjugate
    gradients solve it, preconditioned by ``R -> [S⁻¹ R A⁻¹]_K``.

    Args:
        factors: The result of :func:`damped`.
        inverses: The result of :func:`inverse`.
        weights: w, from the path of each prunable tensor to an array of its shape.
        kept: Of the same paths and shapes, bool: what stays.

    Returns:
        δ by path, of the tensors' shapes, float32; and the largest residual of a layer,
        relative to the right-hand side.

    Source: Kurtic et al., arXiv:2203.07259, Eq. 2, with the curvature of Martens &
    Grosse 2015.
    """
    found: dict[str, jax.Array] = {}
    largest = 0.0
    for path, factor in factors.items():
        known = inverses[path]
        matrix, stays = _matrix(factor, weights), _matrix(factor, kept) > 0
        gone = np.where(stays, 0.0, matrix)
        right = np.where(stays, factor.outputs @ gone @ factor.inputs, 0.0)
        solved, residual = _on_kept(factor, known, right, stays)
        # Not max(), which may drop a NaN.
        largest = float(np.maximum(largest, residual))
        found |= _by_path(factor, solved - gone)
    return found, largest


def _on_kept(
    factor: Factor, known: Factor, right: np.ndarray, stays: np.ndarray
) -> tuple[np.ndarray, float]:
    """Z of one layer by conjugate gradients, and its relative residual."""

    def applied(by: Factor, matrix: np.ndarray) -> np.ndarray:
        return np.where(stays, by.outputs @ matrix @ by.inputs, 0.0)

    z, left = np.zeros_like(right), right
    size = np.linalg.norm(right)
    near = applied(known, left)
    along, gain = near, np.sum(left * near)
    for _ in range(_MOST_ROUNDS):
        if np.linalg.norm(left) <= _RESIDUAL * size:
            break
        moved = applied(factor, along)
        step = gain / np.sum(along * moved)
        z, left = z + step * along, left - step * moved
        near = applied(known, left)
        before, gain = gain, np.sum(left * near)
        along = near + gain / before * along
    return z, float(np.linalg.norm(left) / size) if size else 0.0


def _matrix(
    factor: Factor, vectors: Mapping[str, jax.Array | np.ndarray]
) -> np.ndarray:
    """A layer's tensors as one matrix [groups, outputs, columns], float64."""
    return np.concatenate(
        [
            np.asarray(vectors[path], np.float64).reshape(-1)[entries]
            for path, entries in factor.entries.items()
        ],
        axis=-1,
    )


def _by_path(factor: Factor, matrix: np.ndarray) -> dict[str, jax.Array]:
    """A layer's matrix [groups, outputs, columns], split into its tensors."""
    found, start = {}, 0
    for path, entries in factor.entries.items():
        stop = start + entries.shape[-1]
        flat = np.empty(entries.size, np.float32)
        flat[entries] = matrix[..., start:stop]
        found[path] = jnp.asarray(flat.reshape(factor.shapes[path]))
        start = stop
    return found
