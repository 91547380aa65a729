"""The damped empirical Fisher of one block and its inverse, by three exact solvers.

With G the gradients [N, c] of one block and λ the damping,

    F = λ I + GᵀG / N        (WoodFisher, arXiv:2004.14340, Eq. 8)

A pruning step needs only diag(F⁻¹) and products F⁻¹v. Each solver is a :class:`Solver`
of three pure functions, written for one block; the caller maps them over blocks. They
compute in the dtype of the gradients, with matrix products at full precision on every
platform.

Matrix products take nearly all the time. A triangular solve with the c columns of G
costs two to three times as much as a product of the same size, so the N x N factor is
inverted once and then multiplied. Several vectors are the rows of one matrix: G is then
read along its rows, which is up to five times as fast as along its columns.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

# By default accelerators multiply float32 matrices in TF32 or bfloat16 passes, with
# errors of 1e-3 in the diagonal.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

RECURSION_RANK = 32
"""Gradients in one step of the recursion: matrix products, not rank-one updates."""


class Solver(NamedTuple):
    """One way to invert the damped Fisher of a block.

    Attributes:
        factorize: (gradients [N, c], damping) -> factor, an argument of the other two.
        diagonal: (factor, gradients, damping) -> diag(F⁻¹) [c].
        product: (factor, gradients, damping, v) -> F⁻¹ v, for a vector v [c] or the
            rows of a matrix [k, c].

    Example:
        >>> G = jnp.array([[1.0, 0.0]])
        >>> solver = wf.fisher.SOLVERS["sample_space"]
        >>> factor = solver.factorize(G, 1.0)
        >>> solver.diagonal(factor, G, 1.0).round(4).tolist()
        [0.5, 1.0]
        >>> solver.product(factor, G, 1.0, jnp.array([2.0, 1.0])).round(4).tolist()
        [1.0, 1.0]
    """

    factorize: Callable[[jax.Array, jax.Array], jax.Array]
    diagonal: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    product: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fisher_product(
    gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    """Products of the damped Fisher with vectors, F v, without forming F.

    ``λ v + Gᵀ(G v) / N``

    Args:
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c], or several as rows [k, c].

    Returns:
        Array of the shape of ``vector``.

    Example:
        >>> G = jnp.array([[1.0, 0.0]])
        >>> wf.fisher.fisher_product(G, 1.0, jnp.array([1.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    along_samples = matmul(vector, gradients.T) / gradients.shape[0]
    return damping * vector + matmul(along_samples, gradients)


def _significant(remainder: jax.Array) -> jax.Array:
    """NaN where rounding leaves about two digits of 1 - leverage, λ diag(F⁻¹)."""
    return jnp.where(
        remainder > 64 * jnp.finfo(remainder.dtype).eps, remainder, jnp.nan
    )


def gram_matrix(rows: jax.Array) -> jax.Array:
    """X Xᵀ; one of the four quarters is copied by symmetry."""
    half = rows.shape[0] // 2
    if half < _WORTH_HALVING:
        return matmul(rows, rows.T)
    upper, lower = rows[:half], rows[half:]
    corner = matmul(lower, upper.T)
    return jnp.block([[matmul(upper, upper.T), corner.T], [corner, gram_matrix(lower)]])


def _lower_product(lower: jax.Array, matrix: jax.Array) -> jax.Array:
    """L X for a lower triangular L, skipping its upper right quarter."""
    half = lower.shape[0] // 2
    if half < _WORTH_HALVING:
        return matmul(lower, matrix)
    first = matmul(lower[:half, :half], matrix[:half])
    return jnp.concatenate([first, matmul(lower[half:], matrix)])


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    """L⁻¹ for the Cholesky factor L of a matrix; NaN unless it is positive."""
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    return _triangular_inverse(factor)


def _triangular_inverse(lower: jax.Array) -> jax.Array:
    """L⁻¹, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]."""
    size = lower.shape[0]
    half = size // 2
    if half < _WORTH_HALVING:
        return solve_triangular(lower, jnp.eye(size, dtype=lower.dtype), lower=True)
    first = _triangular_inverse(lower[:half, :half])
    second = _triangular_inverse(lower[half:, half:])
    corner = -matmul(second, matmul(lower[half:, :half], first))
    nothing = jnp.zeros((half, size - half), lower.dtype)
    return jnp.block([[first, nothing], [corner, second]])


_WORTH_HALVING = 128
"""Rows above which two products of half the size are faster than one."""


# ---------------------------------------------------------------- sample space, N < c


@jax.jit
def shifted_factor(gram: jax.Array, shift: jax.Array) -> jax.Array:
    """L⁻¹ for the Cholesky factor L of ``s I + G Gᵀ``; NaN unless it is positive.

    Args:
        gram: G Gᵀ, [N, N].
        shift: s = N λ.
    """
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return _inverse_factor(gram + shift * identity)


def _sample_space_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """L⁻¹ [N, N] for the Cholesky factor L of S = N λ I + G Gᵀ."""
    number, gram = gradients.shape[0], gram_matrix(gradients)
    return _inverse_factor(gram + number * damping * jnp.eye(number, dtype=gram.dtype))


def _sample_space_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    whitened = _lower_product(factor, gradients)
    return _significant(1.0 - jnp.sum(whitened * whitened, axis=0)) / damping


def _sample_space_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    whitened = matmul(matmul(vector, gradients.T), factor.T)
    return (vector - matmul(matmul(whitened, factor), gradients)) / damping


SAMPLE_SPACE = Solver(
    _sample_space_factorize, _sample_space_diagonal, _sample_space_product
)
"""F⁻¹ = (I - Gᵀ S⁻¹ G) / λ with S = N λ I + G Gᵀ: memory N (N + c), time N² c."""


# ----------------------------------------------------------------------- dense, N >= c


def _dense_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """L⁻¹ [c, c] for the Cholesky factor L of F.

    NaN where F has lost its damping to rounding.
    """
    num_samples, width = gradients.shape
    fisher = gram_matrix(gradients.T) / num_samples
    factor = _inverse_factor(fisher + damping * jnp.eye(width, dtype=fisher.dtype))
    if num_samples >= width:
        return factor
    # GᵀG is singular: in its null space the damping is the only curvature.
    rounding = jnp.finfo(fisher.dtype).eps * jnp.max(jnp.diagonal(fisher))
    return jnp.where(rounding < 0.1 * damping, factor, jnp.nan)


def _dense_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    del gradients, damping
    return jnp.sum(factor * factor, axis=0)


def _dense_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    del gradients, damping
    return matmul(matmul(vector, factor.T), factor)


DENSE = Solver(_dense_factorize, _dense_diagonal, _dense_product)
"""Cholesky of F itself: memory c (N + c), time N c² + c³; accurate when N >= c."""


# -------------------------------------------------------------------------- recursion


def recursive_inverse(
    gradients: jax.Array, damping: jax.Array, rank: int = RECURSION_RANK
) -> jax.Array:
    """The paper's Woodbury recursion for the dense inverse, ``rank`` gradients a step.

    F₀⁻¹ = I / λ and, with G_k the next ``rank`` gradients and P = F⁻¹ G_kᵀ,

        F⁻¹ <- F⁻¹ - P (N I + G_k P)⁻¹ Pᵀ

    which for ``rank`` 1 is Eq. 9 of the paper, F⁻¹ <- F⁻¹ - v vᵀ / (N + gᵀv).

    Args:
        gradients: G, [N, c].
        damping: λ > 0.
        rank: Gradients in one step; the result does not depend on it.

    Returns:
        F⁻¹, [c, c].

    Example:
        >>> G = jnp.array([[1.0, 0.0]])
        >>> wf.fisher.recursive_inverse(G, 1.0).round(4).tolist()
        [[0.5, 0.0], [0.0, 1.0]]
    """
    num_samples, width = gradients.shape
    steps = -(-num_samples // rank)
    # A zero gradient changes nothing, so zeros pad the last step.
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
    return matmul(vector, inverse)


RECURSION = Solver(recursive_inverse, _recursion_diagonal, _recursion_product)
"""The paper's recursion: memory c (N + c), time N c²; for reference and comparison."""


SOLVERS = {"sample_space": SAMPLE_SPACE, "dense": DENSE, "recursion": RECURSION}


def choose_solver(num_samples: int, width: int) -> str:
    """The name of the solver with fewer multiply-adds for one block.

    Args:
        num_samples: N.
        width: c.

    Returns:
        "sample_space" or "dense".

    Example:
        >>> wf.fisher.choose_solver(400, 2_000), wf.fisher.choose_solver(1_000, 784)
        ('sample_space', 'dense')
    """
    return min(
        ("sample_space", "dense"),
        key=lambda solver: sum(solver_flops(num_samples, width, solver)),
    )


def solver_flops(num_samples: int, width: int, solver: str) -> tuple[float, float]:
    """Arithmetic of one block: of the factorization, and of the diagonal.

    Sample space: Gram matrix and whitened gradients, N²c multiply-adds each, less a
    quarter by symmetry; Cholesky and inverse factor, 2N³/3. Dense: Fisher, 3Nc²/4;
    Cholesky and inverse factor, 2c³/3. Recursion: 2Nc². Products with vectors are of
    lower order and not counted.

    Args:
        num_samples: N.
        width: c.
        solver: A key of :data:`SOLVERS`.

    Returns:
        Floating-point operations, a multiply-add being two.
    """
    n, c = float(num_samples), float(width)
    if solver == "sample_space":
        return 1.5 * n * n * c + 4 * n**3 / 3, 1.5 * n * n * c
    if solver == "dense":
        return 1.5 * n * c * c + 4 * c**3 / 3, 2 * c * c
    return 4 * n * c * c, c


class _Refined(NamedTuple):
    """F⁻¹ v after two steps of refinement, and the corrections of each."""

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

    ``x <- x + F⁻¹ (v - F x)``. The first step removes the error of the factorization.
    The second removes the remaining error from rounding in ``F x``; its size is the
    estimate.

    Args:
        solver: A value of :data:`SOLVERS`.
        factor: The result of ``solver.factorize``.
        gradients: G, [N, c].
        damping: λ > 0.
        vector: v, [c].

    Returns:
        F⁻¹ v [c], and the largest entry of the last correction relative to the largest
        entry of the result (scalar).
    """
    # A matrix of one row, because a vector would be multiplied along the columns of G.
    refined = _refine(solver, factor, gradients, damping, vector[None])
    return refined.result[0], relative(refined.second, refined.result)


def relative(change: jax.Array, result: jax.Array) -> jax.Array:
    """The largest entry of a change by that of the result."""
    largest = jnp.max(jnp.abs(result))
    return jnp.max(jnp.abs(change)) / jnp.where(largest > 0, largest, 1.0)


def _random_signs(rows: int, columns: int) -> jax.Array:
    """The same pseudo-random signs each time: the top bits of hashed indices.

    MurmurHash3's final mix. jax.random takes a quarter of a second to compile, more
    than the rest of an error estimate.
    """
    bits = jnp.arange(rows * columns, dtype=jnp.uint32).reshape(rows, columns)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.where(bits >> 31, 1.0, -1.0)


def rounding_of(vector: jax.Array) -> jax.Array:
    """What rounding may have added to a vector: half a unit of each entry, any sign."""
    signs = _random_signs(1, vector.shape[0])[0].astype(vector.dtype)
    return jnp.finfo(vector.dtype).eps / 2 * signs * vector


def diagonal_error(
    solver: Solver,
    factor: jax.Array,
    gradients: jax.Array,
    damping: jax.Array,
    diagonal: jax.Array,
    num_probes: int = 4,
) -> jax.Array:
    """Estimates the largest relative rounding error of diag(F⁻¹).

    With X the computed inverse, X (z - F X z) is the error of X times z. Two kinds of z
    are used: unit vectors at the smallest entries, where cancellation is worst, and at
    the largest, where ill conditioning is worst; and random signs, which detect errors
    in any entry.

    Args:
        solver: A value of :data:`SOLVERS`.
        factor: The result of ``solver.factorize``.
        gradients: G, [N, c].
        damping: λ > 0.
        diagonal: The computed diagonal [c].
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
    units = jax.nn.one_hot(entries, width, dtype=diagonal.dtype)
    signs = _random_signs(num_probes, width).astype(diagonal.dtype)
    probes = jnp.concatenate([units, signs])
    refined = _refine(solver, factor, gradients, damping, probes)

    rows, changes = refined.result[: 2 * some], refined.second[: 2 * some]
    exact = rows[jnp.arange(2 * some), entries]
    left = jnp.max(jnp.abs(changes), axis=1) / jnp.max(jnp.abs(rows), axis=1)
    at_ends = jnp.max(jnp.abs(diagonal[entries] - exact) / exact + left**2)
    # A row of the error times random signs has about the norm of the row; the error of
    # the diagonal is one entry of it.
    norms = jnp.max(jnp.abs(refined.first[2 * some :]), axis=0)
    estimate = jnp.maximum(at_ends, 0.3 * jnp.max(norms / diagonal))
    sound = jnp.all(jnp.isfinite(diagonal)) & jnp.all(diagonal > 0)
    return jnp.where(sound & (estimate >= 0), estimate, jnp.inf)
