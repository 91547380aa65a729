"""diag(F⁻¹) and F⁻¹v over many blocks: in slices that fit, with a check on precision.

Every result carries an estimate of its rounding error. A block whose float32 result is
not good to :data:`TOLERANCE` is computed again in float64; if that is not good either,
:class:`CurvatureError` says so. Damping is never changed.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.pruning.fisher import SOLVERS, diagonal_error, refined_product

TOLERANCE = 2e-5
"""Largest estimated relative error that is accepted. The estimate is no bound: it was
seen to be too small by a factor of ten or so, hence the distance to the 1e-3 that
results are to be good to."""

SLICE_BYTES = 256 * 2**20
"""Working memory for the blocks that are computed together."""

Advance = Callable[[int], None]
"""Called with the number of blocks that have just been finished."""


class CurvatureError(ArithmeticError):
    """The damped Fisher of some block cannot be inverted even in float64."""


@partial(jax.jit, static_argnames=("solver", "dtype"))
def _diagonals(
    gradients: jax.Array, damping: jax.Array, solver: str, dtype: str
) -> tuple[jax.Array, jax.Array]:
    def one_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = SOLVERS[solver]
        factor = row.factorize(block, damping)
        diagonal = row.diagonal(factor, block, damping)
        return diagonal, diagonal_error(row, factor, block, damping, diagonal)

    diagonals, errors = jax.vmap(one_block)(gradients.astype(dtype))
    return diagonals.astype(jnp.float32), errors.astype(jnp.float32)


@partial(jax.jit, static_argnames=("solver", "dtype"))
def _products(
    gradients: jax.Array,
    damping: jax.Array,
    vectors: jax.Array,
    solver: str,
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    def one_block(block: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = SOLVERS[solver]
        factor = row.factorize(block, damping)
        return refined_product(row, factor, block, damping, vector)

    products, errors = jax.vmap(one_block)(
        gradients.astype(dtype), vectors.astype(dtype)
    )
    return products.astype(jnp.float32), errors.astype(jnp.float32)


def blocks_at_once(num_samples: int, width: int, solver: str, itemsize: int) -> int:
    """How many blocks are computed together within :data:`SLICE_BYTES`.

    Args:
        num_samples: N.
        width: c.
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        itemsize: Bytes a number, 4 or 8.

    Returns:
        At least 1.
    """
    if solver == "sample_space":
        numbers = 3 * num_samples * width + 2 * num_samples**2
    else:
        numbers = 2 * num_samples * width + 3 * width**2
    return max(1, SLICE_BYTES // (numbers * itemsize))


def _in_slices(
    compute: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    size: int,
    advance: Advance,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``compute`` over slices of the leading axis and joins the results."""
    total = arrays[0].shape[0]
    if total <= size:
        result = jax.block_until_ready(compute(*arrays))
        advance(total)
        return result
    results = []
    for start in range(0, total, size):
        part = tuple(array[start : start + size] for array in arrays)
        # One slice at a time: two programs at once may wait for each other's threads
        # (see `fisher`), and a bar that runs ahead of the work tells nothing.
        results.append(jax.block_until_ready(compute(*part)))
        advance(part[0].shape[0])
    values, errors = zip(*results, strict=True)
    return jnp.concatenate(values), jnp.concatenate(errors)


def _checked(
    compute: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    solver: str,
    names: Sequence[str],
    advance: Advance,
) -> jax.Array:
    """Computes in float32, repeats doubtful blocks in float64, or raises."""
    num_blocks, num_samples, width = arrays[0].shape
    doubtful = np.arange(num_blocks)
    values: jax.Array | None = None
    for dtype, itemsize in (("float32", 4), ("float64", 8)):
        size = blocks_at_once(num_samples, width, solver, itemsize)
        wide = jax.enable_x64(True) if itemsize == 8 else contextlib.nullcontext()
        chosen = (
            arrays
            if len(doubtful) == num_blocks
            else tuple(array[doubtful] for array in arrays)
        )
        with wide:
            found, errors = _in_slices(
                partial(compute, solver=solver, dtype=dtype),
                chosen,
                size,
                advance if itemsize == 4 else lambda blocks: None,
            )
        values = found if values is None else values.at[doubtful].set(found)
        # Written so that NaN counts as an error.
        doubtful = doubtful[~(np.asarray(errors) <= TOLERANCE)]
        if not len(doubtful):
            return values
    raise CurvatureError(
        f"the damped Fisher of {len(doubtful)} of {num_blocks} blocks, the first in "
        f"{names[doubtful[0]]!r}, is too ill conditioned to invert even in float64 "
        f"(solver {solver!r}, {num_samples} gradients, width {width}); raise damping, "
        "or scale the loss down"
    )


def inverse_diagonals(
    gradients: jax.Array,
    damping: float,
    solver: str,
    names: Sequence[str],
    advance: Advance = lambda blocks: None,
) -> jax.Array:
    """diag(F⁻¹) of every block of a group.

    Args:
        gradients: [num_blocks, N, c].
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        advance: Called with the number of blocks just finished.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If a block is not accurate even in float64.
    """

    def compute(
        part: jax.Array, solver: str, dtype: str
    ) -> tuple[jax.Array, jax.Array]:
        return _diagonals(part, np.asarray(damping, dtype), solver, dtype)

    return _checked(compute, (gradients,), solver, names, advance)


def inverse_products(
    gradients: jax.Array,
    damping: float,
    vectors: jax.Array,
    solver: str,
    names: Sequence[str],
    advance: Advance = lambda blocks: None,
) -> jax.Array:
    """F⁻¹v of every block of a group, v being the block's own vector.

    Args:
        gradients: [num_blocks, N, c].
        damping: λ > 0.
        vectors: [num_blocks, c].
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        advance: Called with the number of blocks just finished.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If a block is not accurate even in float64.
    """

    def compute(
        part: jax.Array, vector: jax.Array, solver: str, dtype: str
    ) -> tuple[jax.Array, jax.Array]:
        return _products(part, np.asarray(damping, dtype), vector, solver, dtype)

    return _checked(compute, (gradients, vectors), solver, names, advance)
