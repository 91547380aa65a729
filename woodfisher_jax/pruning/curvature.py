"""diag(F⁻¹) and F⁻¹v over many blocks, on one device or many, checked for precision.

Every result carries an estimate of its rounding error. A block whose float32 result is
not good to :data:`TOLERANCE` is computed again in float64; if that is not good either,
:class:`CurvatureError` says so. Damping is never changed.

Blocks do not know of each other, so each device has its own, and nothing travels. On a
CPU a device takes one block at a time: its matrix products fill the cores already, and
its memory is that of one block.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from woodfisher_jax.pruning.fisher import SOLVERS, diagonal_error, refined_product
from woodfisher_jax.pruning.sharding import AXIS, on_each_device

TOLERANCE = 1e-4
"""Largest estimated relative error that is accepted. The estimate is no bound: it was
seen to be too small by a factor of three, hence the distance to the 1e-3 that results
are to be good to. On a network's own gradients it is too large by five."""

BATCH_BYTES = 512 * 2**20
"""Working memory for the blocks that an accelerator computes together."""

BLOCKS = PartitionSpec(AXIS)


class CurvatureError(ArithmeticError):
    """The damped Fisher of some block cannot be inverted even in float64."""


class _Block(NamedTuple):
    """What is computed of one block, in which precision."""

    value: jax.Array
    error: jax.Array
    factor: jax.Array | None


def block_bytes(num_samples: int, width: int, solver: str, itemsize: int = 4) -> int:
    """Working memory for one block: its gradients, two copies, and square matrices.

    Args:
        num_samples: N.
        width: c.
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        itemsize: Bytes a number, 4 or 8.
    """
    side = num_samples if solver == "sample_space" else width
    return (3 * num_samples * width + 4 * side**2) * itemsize


def factor_bytes(num_samples: int, width: int, solver: str) -> int:
    """Memory for what is kept of one block between the diagonal and the update."""
    side = num_samples if solver == "sample_space" else width
    return 4 * side**2


def _map_blocks(
    one_block: Callable[..., _Block], arrays: tuple[jax.Array, ...], solver: str
) -> _Block:
    """Maps over this device's blocks, as many at a time as its kind is good at."""
    _, num_samples, width = arrays[0].shape
    together = None
    if jax.default_backend() != "cpu":
        together = max(1, BATCH_BYTES // block_bytes(num_samples, width, solver, 4))
    return jax.lax.map(lambda block: one_block(*block), arrays, batch_size=together)


def _diagonal(
    gradients: jax.Array, damping: jax.Array, solver: str, dtype: str, keep: bool
) -> _Block:
    row = SOLVERS[solver]
    gradients, damping = gradients.astype(dtype), damping.astype(dtype)
    factor = row.factorize(gradients, damping)
    diagonal = row.diagonal(factor, gradients, damping)
    error = diagonal_error(row, factor, gradients, damping, diagonal)
    kept = factor.astype(jnp.float32) if keep else None
    return _Block(diagonal.astype(jnp.float32), error.astype(jnp.float32), kept)


def _product(
    gradients: jax.Array,
    factor: jax.Array | None,
    damping: jax.Array,
    vector: jax.Array,
    solver: str,
    dtype: str,
) -> _Block:
    row = SOLVERS[solver]
    gradients, damping = gradients.astype(dtype), damping.astype(dtype)
    if factor is None:
        factor = row.factorize(gradients, damping)
    product, error = refined_product(
        row, factor, gradients, damping, vector.astype(dtype)
    )
    return _Block(product.astype(jnp.float32), error.astype(jnp.float32), None)


@partial(jax.jit, static_argnames=("solver", "mesh", "keep"))
def _diagonals(
    gradients: jax.Array, damping: jax.Array, solver: str, mesh: Mesh | None, keep: bool
) -> _Block:
    def local(gradients: jax.Array, damping: jax.Array) -> _Block:
        return _map_blocks(
            lambda block: _diagonal(block, damping, solver, "float32", keep),
            (gradients,),
            solver,
        )

    run = on_each_device(local, mesh, (BLOCKS, PartitionSpec()), BLOCKS)
    return run(gradients, damping)


@partial(jax.jit, static_argnames=("solver", "mesh"))
def _products(
    gradients: jax.Array,
    factors: jax.Array | None,
    damping: jax.Array,
    vectors: jax.Array,
    solver: str,
    mesh: Mesh | None,
) -> _Block:
    def local(
        gradients: jax.Array,
        factors: jax.Array | None,
        damping: jax.Array,
        vectors: jax.Array,
    ) -> _Block:
        def one_block(
            block: jax.Array, vector: jax.Array, factor: jax.Array | None = None
        ) -> _Block:
            return _product(block, factor, damping, vector, solver, "float32")

        arrays = (gradients, vectors, *(() if factors is None else (factors,)))
        return _map_blocks(one_block, arrays, solver)

    run = on_each_device(local, mesh, (BLOCKS, BLOCKS, PartitionSpec(), BLOCKS), BLOCKS)
    return run(gradients, factors, damping, vectors)


@partial(jax.jit, static_argnames=("solver", "mesh"))
def _repeated(
    gradients: jax.Array,
    damping: jax.Array,
    vectors: jax.Array | None,
    found: tuple[jax.Array, jax.Array],
    solver: str,
    mesh: Mesh | None,
) -> _Block:
    """The doubtful blocks in float64, the others as they were found."""

    def local(
        gradients: jax.Array,
        damping: jax.Array,
        vectors: jax.Array | None,
        found: tuple[jax.Array, jax.Array],
    ) -> _Block:
        def repeat(block: jax.Array, vector: jax.Array | None) -> _Block:
            if vector is None:
                return _diagonal(block, damping, solver, "float64", keep=False)
            return _product(block, None, damping, vector, solver, "float64")

        def one_block(
            block: jax.Array,
            value: jax.Array,
            error: jax.Array,
            vector: jax.Array | None = None,
        ) -> _Block:
            return jax.lax.cond(
                error <= TOLERANCE,
                lambda: _Block(value, error, None),
                lambda: repeat(block, vector),
            )

        arrays = (gradients, *found, *(() if vectors is None else (vectors,)))
        return _map_blocks(one_block, arrays, solver)

    run = on_each_device(local, mesh, (BLOCKS, PartitionSpec(), BLOCKS, BLOCKS), BLOCKS)
    return run(gradients, damping, vectors, found)


def _checked(
    found: _Block,
    gradients: jax.Array,
    damping: float,
    vectors: jax.Array | None,
    solver: str,
    names: Sequence[str],
    mesh: Mesh | None,
) -> jax.Array:
    """The values, with doubtful blocks computed again in float64; or raises."""
    # Written so that NaN counts as an error.
    if np.all(np.asarray(_everywhere(found.error, mesh)) <= TOLERANCE):
        return found.value
    with jax.enable_x64(True):
        found = _repeated(
            gradients,
            np.float64(damping),
            vectors,
            (found.value, found.error),
            solver=solver,
            mesh=mesh,
        )
        errors = np.asarray(_everywhere(found.error, mesh))
    doubtful = np.flatnonzero(~(errors <= TOLERANCE))
    if not len(doubtful):
        return found.value
    num_blocks, num_samples, width = gradients.shape
    raise CurvatureError(
        f"the damped Fisher of {len(doubtful)} of {num_blocks} blocks, the first in "
        f"{names[doubtful[0]]!r}, is too ill conditioned to invert even in float64 "
        f"(solver {solver!r}, {num_samples} gradients, width {width}); raise damping, "
        "or scale the loss down"
    )


def _everywhere(errors: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Errors of all blocks, where other processes hold some of them."""
    if mesh is None or errors.is_fully_addressable:
        return errors
    return jax.device_put(errors, jax.NamedSharding(mesh, PartitionSpec()))


def inverse_diagonals(
    gradients: jax.Array,
    damping: float,
    solver: str,
    names: Sequence[str],
    *,
    mesh: Mesh | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """diag(F⁻¹) of blocks of one shape.

    Args:
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        mesh: The devices that have the blocks; default one.
        keep: Whether to return what :func:`inverse_products` can start from.

    Returns:
        The diagonals [num_blocks, c], float32, and the factors [num_blocks, n, n] or
        None.

    Raises:
        CurvatureError: If a block is not accurate even in float64.
    """
    found = _diagonals(gradients, np.float32(damping), solver, mesh, keep)
    values = _checked(found, gradients, damping, None, solver, names, mesh)
    return values, found.factor


def inverse_products(
    gradients: jax.Array,
    damping: float,
    vectors: jax.Array,
    solver: str,
    names: Sequence[str],
    *,
    mesh: Mesh | None = None,
    factors: jax.Array | None = None,
) -> jax.Array:
    """F⁻¹v of blocks of one shape, v being the block's own vector.

    Args:
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        damping: λ > 0.
        vectors: [num_blocks, c].
        solver: A key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        mesh: The devices that have the blocks; default one.
        factors: From :func:`inverse_diagonals` of the same gradients and damping;
            default formed again.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If a block is not accurate even in float64.
    """
    found = _products(gradients, factors, np.float32(damping), vectors, solver, mesh)
    return _checked(found, gradients, damping, vectors, solver, names, mesh)
