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
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """X Y at full precision, for matrices of one dtype or stacks of them."""
    # Not jnp.matmul: it names the dtype of the result, and float64 is refused where jit
    # is batched by a vmap outside of it, for float64 is not enabled there.
    stacked = tuple(range(left.ndim - 2))
    contracted = (left.ndim - 1,), (right.ndim - 2,)
    # By default accelerators multiply float32 matrices in TF32 or bfloat16 passes, with
    # errors of 1e-3 in the diagonal.
    return jax.lax.dot_general(
        left, right, (contracted, (stacked, stacked)), precision="highest"
    )


MOST_LOST = 1e-5
"""Most that float64 may lose, as a relative error; beyond it a result is NaN. What is
multiplied in float32 is then right to 1e-4, and to 1e-5 up to condition numbers of
1e9."""

_EPS = 2.0**-52
"""Of float64."""

LEAST_LEFT = _EPS / MOST_LOST
"""Of a difference from 1 that is not lost."""

WORST = 64
"""Entries of a diagonal, at least, that are taken in float64: those in which most
cancels. N entries are taken where that is more."""

RECURSION_RANK = 32
"""Gradients in one step of the recursion: matrix products, not rank-one updates."""


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float64 enabled while it runs, or is traced."""

    @wraps(function)
    def enabled(*args: Any, **named: Any) -> Any:
        with jax.enable_x64(True):
            return function(*args, **named)

    return enabled


def wide(array: Any) -> jax.Array:
    """An array in float64, within :func:`in_float64`."""
    return jnp.asarray(array, jnp.float64)


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


def gram_matrix(rows: jax.Array) -> jax.Array:
    """X Xᵀ in float64, for rows X [N, c] of any precision."""

    def of_some(columns: jax.Array) -> jax.Array:
        return _halved_gram(wide(columns))

    return sum_of_panels(of_some, rows)


def _halved_gram(rows: jax.Array) -> jax.Array:
    """X Xᵀ; one of the four quarters is copied by symmetry."""
    half = rows.shape[0] // 2
    if half < _WORTH_HALVING:
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
        >>> wf.fisher.leverages(L, G).tolist()
        [0.25, 4.0]
    """
    return each_panel(partial(_squares_of_lower, factor), gradients)


def _squares_of_lower(lower: jax.Array, matrix: jax.Array) -> jax.Array:
    """Sums of squares of the columns of L X, L lower triangular: without its zeros."""
    half = lower.shape[0] // 2
    if half < _WORTH_HALVING:
        product = matmul(lower, matrix)
        return jnp.sum(product * product, axis=0)
    first = _squares_of_lower(lower[:half, :half], matrix[:half])
    below = matmul(lower[half:], matrix)
    return first + jnp.sum(below * below, axis=0)


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
    # An estimate of the condition number, from the diagonal of the inverse.
    condition = jnp.linalg.norm(matrix) * jnp.max(jnp.sum(inverse * inverse, axis=0))
    return jnp.where(_EPS * condition < MOST_LOST, inverse, jnp.nan)


# ---------------------------------------------------------------- sample space, N < c


def _sample_space_factorize(gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """L⁻¹ [N, N] for the Cholesky factor L of S = N λ I + G Gᵀ."""
    shift = len(gradients) * wide(damping)
    return shifted_factor(gram_matrix(gradients), shift)


def _sample_space_diagonal(
    factor: jax.Array, gradients: jax.Array, damping: jax.Array
) -> jax.Array:
    # 1 - h: as the sum of all h is at most N, there are not many entries in which most
    # cancels.
    def exact(columns: jax.Array) -> jax.Array:
        left = 1.0 - leverages(factor, wide(columns))
        return jnp.where(left > LEAST_LEFT, left, jnp.nan)

    number, width = gradients.shape
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
    lost = _EPS * jnp.max(jnp.abs(vector))
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
    return jnp.where(_EPS * condition < MOST_LOST, inverse, jnp.nan)


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


def _random_signs(number: int) -> jax.Array:
    """The same pseudo-random signs each time: the top bits of hashed indices.

    MurmurHash3's final mix. jax.random takes a quarter of a second to compile.
    """
    bits = jnp.arange(number, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.where(bits >> 31, 1.0, -1.0)


def change_by_rounding(
    product: Callable[[jax.Array], jax.Array], vector: jax.Array, result: jax.Array
) -> jax.Array:
    """How far F⁻¹v may be off because v was rounded: half a unit an entry, any sign.

    Args:
        product: Vector [c] -> its product with F⁻¹.
        vector: v, float32 [c].
        result: F⁻¹v, [c].

    Returns:
        The largest change, by the largest entry of the result (scalar).
    """
    lost = jnp.finfo(vector.dtype).eps / 2 * _random_signs(len(vector)) * vector
    largest = jnp.max(jnp.abs(result))
    change = jnp.max(jnp.abs(product(lost)))
    return change / jnp.where(largest > 0, largest, 1.0)
