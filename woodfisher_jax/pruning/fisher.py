"""The damped empirical Fisher of one block and its inverse, by three exact solvers.

With G the gradients [N, c] of one block and λ the damping,

    F = λ I + GᵀG / N        (WoodFisher, arXiv:2004.14340, Eq. 8)

Only diag(F⁻¹) and products F⁻¹v are ever needed. Each solver is a :class:`Solver` of
three pure functions, written for one block; the caller vmaps. They compute in the
dtype of the gradients, with matrix products at full precision on every platform.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

# Accelerators multiply float32 matrices in TF32 or bfloat16 passes by default, which
# puts errors of 1e-3 on the diagonal.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

RECURSION_RANK = 32
"""Gradients taken at a time by the recursion: matrix products instead of rank one."""


class Solver(NamedTuple):
    """One way to invert the damped Fisher of a block.

    Attributes:
        factorize: (gradients [N, c], damping) -> what the other two need.
        diagonal: (factor, gradients, damping) -> diag(F⁻¹) [c].
        product: (factor, gradients, damping, vector [c]) -> F⁻¹ vector [c].
    """

    factorize: Callable[[jax.Array, jax.Array], jax.Array]
    diagonal: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    product: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fisher_product(
    gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    """Multiplies a vector by the damped Fisher without forming it: F v.

    ``λ v + Gᵀ(G v) / N``

    Args:
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c].

    Returns:
        Array [c].
    """
    along_samples = matmul(gradients, vector) / gradients.shape[0]
    return damping * vector + matmul(along_samples, gradients)


def fisher_diagonal(gradients: jax.Array) -> jax.Array:
    """Diagonal of the undamped empirical Fisher: the mean of squared gradients.

    Args:
        gradients: G, [N, c].

    Returns:
        Array [c].
    """
    return jnp.mean(gradients * gradients, axis=0)


def _significant(remainder: jax.Array) -> jax.Array:
    """NaN where 1 - leverage, λ diag(F⁻¹), has lost all but two digits or so."""
    return jnp.where(
        remainder > 64 * jnp.finfo(remainder.dtype).eps, remainder, jnp.nan
    )


# ---------------------------------------------------------------- sample space, N < c


def _sample_space_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """Cholesky factor L [N, N] of S = N λ I + G Gᵀ."""
    num_samples = gradients.shape[0]
    gram = matmul(gradients, gradients.T)
    identity = jnp.eye(num_samples, dtype=gram.dtype)
    return jnp.linalg.cholesky(gram + num_samples * damping * identity)


def _sample_space_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    whitened = solve_triangular(factor, gradients, lower=True)
    return _significant(1.0 - jnp.sum(whitened * whitened, axis=0)) / damping


def _sample_space_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    coefficients = cho_solve((factor, True), matmul(gradients, vector))
    return (vector - matmul(coefficients, gradients)) / damping


SAMPLE_SPACE = Solver(
    _sample_space_factorize, _sample_space_diagonal, _sample_space_product
)
"""F⁻¹ = (I - Gᵀ S⁻¹ G) / λ with S = N λ I + G Gᵀ: memory N (N + c), time N² c."""


# ----------------------------------------------------------------------- dense, N >= c


def _dense_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """Cholesky factor L [c, c] of F."""
    num_samples, width = gradients.shape
    fisher = matmul(gradients.T, gradients) / num_samples
    return jnp.linalg.cholesky(fisher + damping * jnp.eye(width, dtype=fisher.dtype))


def _dense_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    del gradients, damping
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)
    inverse_factor = solve_triangular(factor, identity, lower=True)
    return jnp.sum(inverse_factor * inverse_factor, axis=0)


def _dense_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    del gradients, damping
    return cho_solve((factor, True), vector)


DENSE = Solver(_dense_factorize, _dense_diagonal, _dense_product)
"""Cholesky of F itself: memory c (N + c), time N c² + c³; accurate when N >= c."""


# -------------------------------------------------------------------------- recursion


def recursive_inverse(
    gradients: jax.Array, damping: jax.Array, rank: int = RECURSION_RANK
) -> jax.Array:
    """The paper's Woodbury recursion to the dense inverse, ``rank`` gradients a step.

    F₀⁻¹ = I / λ and, with G_k the next ``rank`` gradients and P = F⁻¹ G_kᵀ,

        F⁻¹ <- F⁻¹ - P (N I + G_k P)⁻¹ Pᵀ

    which for ``rank`` 1 is Eq. 9 of the paper, F⁻¹ <- F⁻¹ - v vᵀ / (N + gᵀv).

    Args:
        gradients: G, [N, c].
        damping: λ > 0.
        rank: Gradients taken in one step; the result does not depend on it.

    Returns:
        F⁻¹, [c, c].
    """
    num_samples, width = gradients.shape
    steps = -(-num_samples // rank)
    # A zero gradient changes nothing, so the last step is filled up with zeros.
    padded = jnp.zeros((steps * rank, width), gradients.dtype)
    padded = padded.at[:num_samples].set(gradients)

    def step(inverse: jax.Array, some: jax.Array) -> tuple[jax.Array, None]:
        projected = matmul(inverse, some.T)
        inner = num_samples * jnp.eye(rank, dtype=some.dtype) + matmul(some, projected)
        factor = jnp.linalg.cholesky(inner)
        whitened = solve_triangular(factor, projected.T, lower=True)
        return inverse - matmul(whitened.T, whitened), None

    start = jnp.eye(width, dtype=gradients.dtype) / damping
    inverse, _ = jax.lax.scan(step, start, padded.reshape(steps, rank, width))
    return inverse


def _recursion_diagonal(
    inverse: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    del gradients
    return _significant(jnp.diagonal(inverse) * damping) / damping


def _recursion_product(
    inverse: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    del gradients, damping
    return matmul(inverse, vector)


RECURSION = Solver(recursive_inverse, _recursion_diagonal, _recursion_product)
"""The paper's recursion: memory c (N + c), time N c²; for reference and comparison."""


SOLVERS = {"sample_space": SAMPLE_SPACE, "dense": DENSE, "recursion": RECURSION}


def choose_solver(num_samples: int, width: int) -> str:
    """Names the solver that needs fewer multiply-adds for one block.

    Sample space: Gram matrix N²c, Cholesky N³/3, triangular solve N²c/2. Dense:
    Fisher Nc², Cholesky and inverse factor 2c³/3.

    Args:
        num_samples: N.
        width: c.

    Returns:
        A key of :data:`SOLVERS`.
    """
    sample_space = num_samples**2 * (1.5 * width + num_samples / 3)
    dense = width**2 * (num_samples + 2 * width / 3)
    return "sample_space" if sample_space <= dense else "dense"


def refined_product(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    vector: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """F⁻¹ v with one step of iterative refinement, and how much that step changed.

    ``x₁ = x₀ + F⁻¹ (v - F x₀)``. It costs as little as a product and removes most of
    the rounding error of the factorization.

    Args:
        solver: A row of :data:`SOLVERS`.
        factor: What ``solver.factorize`` returned.
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c].

    Returns:
        F⁻¹ v [c], and the size of the correction relative to the result (scalar).
    """
    first = solver.product(factor, gradients, damping, vector)
    residual = vector - fisher_product(gradients, damping, first)
    correction = solver.product(factor, gradients, damping, residual)
    result = first + correction
    largest = jnp.max(jnp.abs(result))
    change = jnp.max(jnp.abs(correction)) / jnp.where(largest > 0, largest, 1.0)
    return result, change


def diagonal_error(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    diagonal: jax.Array,
    num_probes: int = 4,
) -> jax.Array:
    """Estimates the relative rounding error of diag(F⁻¹) where it is worst.

    Cancellation hits the smallest entries, ill conditioning the largest. For the
    ``num_probes`` smallest and as many largest, the column F⁻¹ eᵢ is solved for and
    refined against F itself; its i-th entry is an independent value of the same number.

    Args:
        solver: A row of :data:`SOLVERS`.
        factor: What ``solver.factorize`` returned.
        gradients: G, [N, c].
        damping: λ > 0.
        diagonal: The diagonal in question [c].
        num_probes: Entries checked at either end.

    Returns:
        The largest relative difference (scalar); inf if anything is not finite or not
        positive.
    """
    num_probes = min(num_probes, diagonal.shape[0])
    _, smallest = jax.lax.top_k(-diagonal, num_probes)
    _, largest = jax.lax.top_k(diagonal, num_probes)

    def error(index: jax.Array) -> jax.Array:
        unit = jnp.zeros_like(diagonal).at[index].set(1.0)
        column, change = refined_product(solver, factor, gradients, damping, unit)
        return jnp.abs(diagonal[index] - column[index]) / column[index] + change**2

    sound = jnp.all(jnp.isfinite(diagonal)) & jnp.all(diagonal > 0)
    estimate = jnp.max(jax.vmap(error)(jnp.concatenate([smallest, largest])))
    return jnp.where(sound & (estimate >= 0), estimate, jnp.inf)
