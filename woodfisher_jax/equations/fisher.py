"""The damped empirical Fisher of one block and its inverse, by three exact solvers.

With G the gradients [N, c] of one block and λ the damping,

    F = λ I + GᵀG / N        (WoodFisher, arXiv:2004.14340, Eq. 8)

A pruning step needs only diag(F⁻¹) and products F⁻¹v. Each solver is a :class:`Solver`
of three pure functions, written for one block; the caller maps them over blocks.

What float32 loses of F⁻¹ it loses in the Gram matrix and its Cholesky factor. So these
are formed in float64, of gradients in float32, and so are products with vectors, which
cost little; what takes most of the arithmetic stays in float32, at full precision on
every platform. JAX need not have float64 enabled: see :func:`in_float64`.

Matrix products take nearly all the time. A triangular solve with the c columns of G
costs two to three times as much as a product of the same size, so the N x N factor is
inverted once and then multiplied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.factors import inverse_factor, shifted_factor
from woodfisher_jax.equations.precision import (
    EPS,
    LEAST_LEFT,
    MOST_LOST,
    in_float64,
    matmul,
    random_signs,
    wide,
)
from woodfisher_jax.equations.products import (
    along_rows,
    gram_matrix,
    leverages,
    sum_of_rows,
)

WORST = 64
"""Entries of a diagonal, at least, that are taken in float64: those in which most
cancels. N entries are taken where that is more."""

CHECKED = 16
"""Of these, those of which the rounding is followed."""

RECURSION_RANK = 32
"""Gradients in one step of the recursion: matrix products, not rank-one updates."""


class Solver(NamedTuple):
    """One way to invert the damped Fisher of a block.

    Attributes:
        factorize: (gradients [N, c], damping) -> factor in float64, an argument of the
            other two; NaN where F is too ill conditioned.
        diagonal: (factor, gradients, damping) -> diag(F⁻¹) [c], in the dtype of the
            gradients, as the product.
        product: (factor, gradients, damping, v) -> F⁻¹ v, for a vector v [c].

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


def _solver(
    factorize: Callable[..., jax.Array],
    diagonal: Callable[..., jax.Array],
    product: Callable[..., jax.Array],
) -> Solver:
    def narrow(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        @in_float64
        def rounded(factor: jax.Array, gradients: jax.Array, *rest: Any) -> jax.Array:
            return function(factor, gradients, *rest).astype(gradients.dtype)

        return rounded

    return Solver(in_float64(factorize), narrow(diagonal), narrow(product))


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
    # Not V Gᵀ, for which XLA would transpose G: on a CPU nine times as long.
    columns = jnp.atleast_2d(vector).T
    along_samples = matmul(gradients, columns) / gradients.shape[0]
    back = matmul(along_samples.T, gradients)
    return damping * vector + back.reshape(vector.shape)


# ---------------------------------------------------------------- sample space, N < c


def _sample_space_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """L⁻¹ [N, N] for the Cholesky factor L of S = N λ I + G Gᵀ."""
    return shifted_factor(gram_matrix(gradients), len(gradients) * wide(damping))


def gram_rounding(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """Vector r [N]: rounding, that of several operations, changes S_mn by r_m r_n.

    Args:
        gradients: G, [N, c].
        damping: λ > 0.

    Returns:
        r, float64 [N].
    """
    squares = jnp.sum(jnp.square(wide(gradients)), axis=1)
    return 2.0 * jnp.sqrt(EPS * (len(gradients) * damping + squares))


def leverage_changes(
    factor: jax.Array, rounding: jax.Array, columns: jax.Array, left: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What rounding of S changes 1 - h by, where least is left.

    With u = S⁻¹ g of a column g, uᵀ δS u is ``Σ_n r_n² u_n²`` in the mean square.

    Args:
        factor: L⁻¹, [N, N].
        rounding: r, [N].
        columns: Of G, [N, k].
        left: 1 - h of them, [k].

    Returns:
        The :data:`CHECKED` columns of least 1 - h, and the change of each.
    """
    _, worst = jax.lax.top_k(-left.astype(jnp.float32), min(CHECKED, len(left)))
    along = matmul(factor.T, matmul(factor, wide(columns[:, worst])))
    return worst, jnp.sum(jnp.square(rounding[:, None] * along), axis=0)


def _sample_space_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    # 1 - h: as the sum of all h is at most N, there are not many entries in which most
    # cancels.
    def exact(columns: jax.Array) -> jax.Array:
        left = 1.0 - leverages(factor, wide(columns))
        worst, changes = leverage_changes(factor, rounding, columns, left)
        sound = jnp.all(changes <= MOST_LOST * left[worst])
        return jnp.where(sound & (left > LEAST_LEFT), left, jnp.nan)

    number, width = gradients.shape
    rounding = gram_rounding(gradients, damping)
    some = max(WORST, number)
    if width <= 2 * some:
        return exact(gradients) / damping
    found = 1.0 - leverages(factor.astype(gradients.dtype), gradients)
    _, worst = jax.lax.top_k(-found, some)
    return wide(found).at[worst].set(exact(gradients[:, worst])) / damping


def _sample_space_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    vector = wide(vector)
    whitened = matmul(factor, along_rows(gradients, vector)[:, None])
    along = matmul(factor.T, whitened)[:, 0]
    left = vector - sum_of_rows(along, gradients)
    # What rounding of S changes, by any signs.
    rounding = gram_rounding(gradients, damping)
    change = random_signs(len(along)) * rounding * jnp.linalg.norm(rounding * along)
    change = matmul(factor.T, matmul(factor, change[:, None]))[:, 0]
    moved = jnp.max(jnp.abs(sum_of_rows(change, gradients)))
    lost = jnp.maximum(EPS * jnp.max(jnp.abs(vector)), moved)
    sound = lost <= MOST_LOST * jnp.max(jnp.abs(left))
    return jnp.where(sound, left / damping, jnp.nan)


SAMPLE_SPACE = _solver(
    _sample_space_factorize, _sample_space_diagonal, _sample_space_product
)
"""F⁻¹ = (I - Gᵀ S⁻¹ G) / λ with S = N λ I + G Gᵀ: memory N (N + c), time N² c."""


# ----------------------------------------------------------------------- dense, N >= c


def _dense_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """L⁻¹ [c, c] for the Cholesky factor L of F."""
    fisher = gram_matrix(gradients.T) / len(gradients)
    return shifted_factor(fisher, wide(damping))


def _dense_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    del gradients, damping
    return jnp.sum(factor * factor, axis=0)


def _dense_product(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    del gradients, damping
    along = matmul(factor, wide(vector)[:, None])
    return matmul(factor.T, along)[:, 0]


DENSE = _solver(_dense_factorize, _dense_diagonal, _dense_product)
"""Cholesky of F itself: memory c (N + c), time N c² + c³; accurate when N >= c."""


# -------------------------------------------------------------------------- recursion


@in_float64
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
        F⁻¹, float64 [c, c]; NaN where F is too ill conditioned.

    Example:
        >>> G = jnp.array([[1.0, 0.0]])
        >>> wf.fisher.recursive_inverse(G, 1.0).astype("float32").tolist()
        [[0.5, 0.0], [0.0, 1.0]]
    """
    gradients, damping = wide(gradients), wide(damping)
    num_samples, width = gradients.shape
    steps = -(-num_samples // rank)
    # A zero gradient changes nothing, so zeros pad the last step.
    padded = jnp.zeros((steps * rank, width), gradients.dtype)
    padded = padded.at[:num_samples].set(gradients)

    def step(inverse: jax.Array, some: jax.Array) -> tuple[jax.Array, None]:
        projected = matmul(inverse, some.T)
        inner = num_samples * jnp.eye(rank, dtype=some.dtype) + matmul(some, projected)
        whitened = matmul(inverse_factor(inner), projected.T)
        return inverse - matmul(whitened.T, whitened), None

    start = jnp.eye(width, dtype=gradients.dtype) / damping
    inverse, _ = jax.lax.scan(step, start, padded.reshape(steps, rank, width))
    # The condition number is at most 1 + tr GᵀG / (N λ).
    condition = jnp.sum(padded**2) / (num_samples * damping)
    return jnp.where(EPS * condition < MOST_LOST, inverse, jnp.nan)


def _recursion_diagonal(
    inverse: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    del gradients, damping
    return jnp.diagonal(inverse)


def _recursion_product(
    inverse: jax.Array, gradients: jax.Array, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    del gradients, damping
    return matmul(inverse, wide(vector)[:, None])[:, 0]


RECURSION = _solver(recursive_inverse, _recursion_diagonal, _recursion_product)
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
