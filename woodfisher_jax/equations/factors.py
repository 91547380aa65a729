"""Inverse Cholesky factors in float64."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from woodfisher_jax.equations.precision import EPS, MOST_LOST, in_float64, matmul, wide
from woodfisher_jax.equations.products import WORTH_HALVING


def _triangular_inverse(lower: jax.Array) -> jax.Array:
    """L⁻¹, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]."""
    size = lower.shape[0]
    half = size // 2
    if half < WORTH_HALVING:
        return solve_triangular(lower, jnp.eye(size, dtype=lower.dtype), lower=True)
    first = _triangular_inverse(lower[:half, :half])
    second = _triangular_inverse(lower[half:, half:])
    corner = -matmul(second, matmul(lower[half:, :half], first))
    nothing = jnp.zeros((half, size - half), lower.dtype)
    return jnp.block([[first, nothing], [corner, second]])


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """L⁻¹ for the Cholesky factor L of a matrix.

    On a TPU, whose compiler refuses Cholesky in float64 over several devices, by
    :func:`inverse_factor_by_rows`.

    Args:
        matrix: S, symmetric positive definite [N, N].

    Returns:
        L⁻¹, [N, N]; NaN where S is not positive definite.
    """
    return jax.lax.platform_dependent(
        matrix, tpu=inverse_factor_by_rows, default=_inverse_factor
    )


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    return _triangular_inverse(jax.lax.linalg.cholesky(matrix, symmetrize_input=False))


def inverse_factor_by_rows(matrix: jax.Array) -> jax.Array:
    """:func:`inverse_factor` by elimination, row by row: L⁻¹ [S, I] = [Lᵀ, L⁻¹].

    Args:
        matrix: S, symmetric positive definite [N, N].
    """
    size = len(matrix)
    places = jnp.arange(size)
    start = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)], axis=1)

    def step(k: jax.Array, found: jax.Array) -> jax.Array:
        # By masks, for a place k has another type where a vmap outside is evaluated.
        here = places == k
        row = jnp.sum(jnp.where(here[:, None], found, 0.0), axis=0)
        row = row / jnp.sqrt(jnp.sum(jnp.where(here, row[:size], 0.0)))
        # What is left of S is symmetric: its column k is its row k.
        column = jnp.where(places > k, row[:size], 0.0)
        return jnp.where(here[:, None], row, found - column[:, None] * row)

    return jax.lax.fori_loop(0, size, step, start)[:, size:]


@jax.jit
@in_float64
def shifted_factor(gram: jax.Array, shift: jax.Array) -> jax.Array:
    """L⁻¹ for the Cholesky factor L of ``s I + X``; NaN if it is too ill conditioned.

    Args:
        gram: X, positive semidefinite, such as G Gᵀ [N, N].
        shift: s > 0, such as N λ.
    """
    gram, shift = wide(gram), wide(shift)
    matrix = gram + shift * jnp.eye(len(gram))
    inverse = inverse_factor(matrix)
    # An estimate of the condition number with rows and columns scaled to a diagonal of
    # ones, for scales lose nothing: where X has zeros, the diagonal is s alone.
    scales = jnp.diagonal(matrix)
    scaled = matrix / jnp.sqrt(scales) / jnp.sqrt(scales)[:, None]
    left = scales * jnp.sum(inverse * inverse, axis=0)
    condition = jnp.linalg.norm(scaled) * jnp.max(left)
    return jnp.where(EPS * condition < MOST_LOST, inverse, jnp.nan)
