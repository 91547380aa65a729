"""The damped empirical Fisher of one block and its inverse, by three exact solvers.

With G the gradients [N, c] of one block and λ the damping,

    F = λ I + GᵀG / N        (WoodFisher, arXiv:2004.14340, Eq. 8)

Only diag(F⁻¹) and products F⁻¹v are ever needed. Each solver is a :class:`Solver` of
three pure functions, written for one block; the caller vmaps. They compute in the
dtype of the gradients, with matrix products at full precision on every platform.

Several vectors are solved for as the columns of one matrix, one after the other in the
program and never side by side: up to jaxlib 0.10, a triangular solve on the CPU waits
inside a thread of the pool that is to do its work, and as many of them at a time as the
pool has threads wait for ever.
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
        product: (factor, gradients, damping, v) -> F⁻¹ v, for a vector v [c] or the
            columns of a matrix [c, k].
    """

    factorize: Callable[[jax.Array, jax.Array], jax.Array]
    diagonal: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    product: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fisher_product(
    gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    """Multiplies vectors by the damped Fisher without forming it: F v.

    ``λ v + Gᵀ(G v) / N``

    Args:
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c], or several as columns [c, k].

    Returns:
        Array of the shape of ``vector``.
    """
    along_samples = matmul(gradients, vector) / gradients.shape[0]
    return damping * vector + matmul(gradients.T, along_samples)


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
    return (vector - matmul(gradients.T, coefficients)) / damping


SAMPLE_SPACE = Solver(
    _sample_space_factorize, _sample_space_diagonal, _sample_space_product
)
"""F⁻¹ = (I - Gᵀ S⁻¹ G) / λ with S = N λ I + G Gᵀ: memory N (N + c), time N² c."""


# ----------------------------------------------------------------------- dense, N >= c


def _dense_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """Cholesky factor L [c, c] of F; NaN where F has lost its damping to rounding."""
    num_samples, width = gradients.shape
    fisher = matmul(gradients.T, gradients) / num_samples
    factor = jnp.linalg.cholesky(fisher + damping * jnp.eye(width, dtype=fisher.dtype))
    if num_samples >= width:
        return factor
    # GᵀG is singular, and only the damping tells the weights in its null space apart.
    rounding = jnp.finfo(fisher.dtype).eps * jnp.max(jnp.diagonal(fisher))
    return jnp.where(rounding < 0.1 * damping, factor, jnp.nan)


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


class _Refined(NamedTuple):
    """F⁻¹ V after two steps of refinement, and the corrections of each, [c, k]."""

    result: jax.Array
    first: jax.Array
    second: jax.Array


def _refine(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    vectors: jax.Array,
) -> _Refined:
    def correction(result: jax.Array) -> jax.Array:
        residual = vectors - fisher_product(gradients, damping, result)
        return solver.product(factor, gradients, damping, residual)

    result = solver.product(factor, gradients, damping, vectors)
    first = correction(result)
    second = correction(result + first)
    return _Refined(result + first + second, first, second)


def refined_product(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    vector: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """F⁻¹ v with two steps of iterative refinement, and an estimate of its error.

    ``x <- x + F⁻¹ (v - F x)``. The first step takes out what the factorization lost.
    The second finds what rounding in ``F x`` leaves, and its size is the estimate.

    Args:
        solver: A row of :data:`SOLVERS`.
        factor: What ``solver.factorize`` returned.
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c].

    Returns:
        F⁻¹ v [c], and the largest entry of the last correction relative to the largest
        entry of the result (scalar).
    """
    refined = _refine(solver, factor, gradients, damping, vector)
    largest = jnp.max(jnp.abs(refined.result))
    change = jnp.max(jnp.abs(refined.second)) / jnp.where(largest > 0, largest, 1.0)
    return refined.result, change


def _random_signs(rows: int, columns: int) -> jax.Array:
    """The same pseudo-random signs each time: the top bits of hashed indices.

    MurmurHash3's final mix. jax.random takes a quarter of a second to compile, more
    than all the rest of an error estimate.
    """
    bits = jnp.arange(rows * columns, dtype=jnp.uint32).reshape(rows, columns)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.where(bits >> 31, 1.0, -1.0)


def diagonal_error(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    diagonal: jax.Array,
    num_probes: int = 4,
) -> jax.Array:
    """Estimates the largest relative rounding error of diag(F⁻¹).

    With X the inverse as it was computed, X (z - F X z) is the error of X times z. Two
    kinds of z are tried: unit vectors at the smallest entries, where cancellation is
    worst, and at the largest, where ill conditioning is; and random signs, which no
    error is orthogonal to and which see errors confined to entries in between.

    Args:
        solver: A row of :data:`SOLVERS`.
        factor: What ``solver.factorize`` returned.
        gradients: G, [N, c].
        damping: λ > 0.
        diagonal: The diagonal in question [c].
        num_probes: Vectors of each kind.

    Returns:
        The estimate (scalar), not a bound; inf if anything is not finite or not
        positive.
    """
    width = diagonal.shape[0]
    some = min(num_probes, width)
    _, smallest = jax.lax.top_k(-diagonal, some)
    _, largest = jax.lax.top_k(diagonal, some)
    entries = jnp.concatenate([smallest, largest])
    units = jax.nn.one_hot(entries, width, axis=0, dtype=diagonal.dtype)
    signs = _random_signs(width, num_probes).astype(diagonal.dtype)
    probes = jnp.concatenate([units, signs], axis=1)
    refined = _refine(solver, factor, gradients, damping, probes)

    columns, changes = refined.result[:, : 2 * some], refined.second[:, : 2 * some]
    exact = columns[entries, jnp.arange(2 * some)]
    left = jnp.max(jnp.abs(changes), axis=0) / jnp.max(jnp.abs(columns), axis=0)
    at_ends = jnp.max(jnp.abs(diagonal[entries] - exact) / exact + left**2)
    # A row of the error times random signs is about its norm; the diagonal's own error
    # is one entry of the row.
    rows = jnp.max(jnp.abs(refined.first[:, 2 * some :]), axis=1)
    estimate = jnp.maximum(at_ends, 0.3 * jnp.max(rows / diagonal))
    sound = jnp.all(jnp.isfinite(diagonal)) & jnp.all(diagonal > 0)
    return jnp.where(sound & (estimate >= 0), estimate, jnp.inf)
