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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from woodfisher_jax.equations.fisher import SOLVERS, diagonal_error, refined_product
from woodfisher_jax.rows.budget import BATCH_BYTES, block_bytes
from woodfisher_jax.rows.sharding import AXIS, on_each_device

TOLERANCE = 1e-4
"""Largest estimated relative error that is accepted. The estimate is no bound: it was
seen to be too small by a factor of three, hence the distance to the 1e-3 that results
are to be good to. On a network's own gradients it is too large by five."""

BLOCKS = PartitionSpec(AXIS)


class CurvatureError(ArithmeticError):
    """The damped Fisher of some block cannot be inverted even in float64."""


class Block(NamedTuple):
    """What is computed of one block, in which precision.

    Attributes:
        value: The result, [c].
        error: Estimate of its relative rounding error.
        factor: What may be kept for other uses of the block, or None.
    """

    value: jax.Array
    error: jax.Array
    factor: jax.Array | None


Task = Callable[[jax.Array, tuple[jax.Array, ...], jax.Array, str, str], Block]
"""(gradients [N, c], other arrays of the block, damping, solver, dtype) -> result, for
one block. A function of a module, so that jit knows it again."""


def _map_blocks(
    one_block: Callable[..., Block], arrays: tuple[Any, ...], solver: str
) -> Block:
    """Maps over this device's blocks, as many at a time as its kind is good at."""
    _, num_samples, width = arrays[0].shape
    together = None
    if jax.default_backend() != "cpu":
        together = max(1, BATCH_BYTES // block_bytes(num_samples, width, solver, 4))
    return jax.lax.map(lambda block: one_block(*block), arrays, batch_size=together)


@partial(jax.jit, static_argnames=("task", "solver", "mesh"))
def _run(
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    task: Task,
    solver: str,
    mesh: Mesh | None,
) -> Block:
    """A task for all blocks, in float32."""

    def local(
        gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array
    ) -> Block:
        def one_block(block: jax.Array, *others: jax.Array) -> Block:
            return task(block, others, damping, solver, "float32")

        return _map_blocks(one_block, (gradients, *others), solver)

    run = on_each_device(local, mesh, (BLOCKS, BLOCKS, PartitionSpec()), BLOCKS)
    return run(gradients, others, damping)


@partial(jax.jit, static_argnames=("task", "solver", "mesh"))
def _repeated(
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    found: tuple[jax.Array, jax.Array],
    task: Task,
    solver: str,
    mesh: Mesh | None,
) -> Block:
    """The doubtful blocks in float64, the others as they were found."""

    def local(
        gradients: jax.Array,
        others: tuple[jax.Array, ...],
        damping: jax.Array,
        found: tuple[jax.Array, jax.Array],
    ) -> Block:
        def one_block(
            block: jax.Array, value: jax.Array, error: jax.Array, *others: jax.Array
        ) -> Block:
            return jax.lax.cond(
                error <= TOLERANCE,
                lambda: Block(value, error, None),
                lambda: task(block, others, damping, solver, "float64"),
            )

        return _map_blocks(one_block, (gradients, *found, *others), solver)

    run = on_each_device(local, mesh, (BLOCKS, BLOCKS, PartitionSpec(), BLOCKS), BLOCKS)
    return run(gradients, others, damping, found)


def computed_blocks(
    task: Task,
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: float,
    solver: str,
    names: Sequence[str],
    *,
    repeat_with: tuple[Task, tuple[jax.Array, ...]] | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """A task for blocks of one shape, with doubtful blocks computed again in float64.

    Args:
        task: For one block.
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        others: What else the task takes, each with a leading axis of blocks.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        repeat_with: What computes a doubtful block in float64; default the same.
        mesh: The devices that have the blocks; default one.

    Returns:
        The values [num_blocks, c], float32, and the factors of the task or None.

    Raises:
        CurvatureError: If a block is not accurate even in float64.
    """
    found = _run(gradients, others, np.float32(damping), task, solver, mesh)
    # Written so that NaN counts as an error.
    if np.all(np.asarray(_everywhere(found.error, mesh)) <= TOLERANCE):
        return found.value, found.factor
    again, others = repeat_with or (task, others)
    values, kept = (found.value, found.error), found.factor
    with jax.enable_x64(True):
        found = _repeated(
            gradients, others, np.float64(damping), values, again, solver, mesh
        )
        errors = np.asarray(_everywhere(found.error, mesh))
    doubtful = np.flatnonzero(~(errors <= TOLERANCE))
    if not len(doubtful):
        return found.value, kept
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


# -------------------------------------------------------------------------- the tasks


def _diagonal(
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    solver: str,
    dtype: str,
) -> Block:
    row = SOLVERS[solver]
    gradients, damping = gradients.astype(dtype), damping.astype(dtype)
    factor = others[0] if others else row.factorize(gradients, damping)
    diagonal = row.diagonal(factor, gradients, damping)
    error = diagonal_error(row, factor, gradients, damping, diagonal)
    return Block(diagonal.astype(jnp.float32), error.astype(jnp.float32), factor)


def _diagonal_alone(
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    solver: str,
    dtype: str,
) -> Block:
    return _diagonal(gradients, others, damping, solver, dtype)._replace(factor=None)


def _product(
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    solver: str,
    dtype: str,
) -> Block:
    vector, *factors = others
    row = SOLVERS[solver]
    gradients, damping = gradients.astype(dtype), damping.astype(dtype)
    factor = factors[0] if factors else row.factorize(gradients, damping)
    product, error = refined_product(
        row, factor, gradients, damping, vector.astype(dtype)
    )
    return Block(product.astype(jnp.float32), error.astype(jnp.float32), None)


def inverse_diagonals(
    gradients: jax.Array,
    damping: float,
    solver: str,
    names: Sequence[str],
    *,
    mesh: Mesh | None = None,
    keep: bool = False,
    factors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """diag(F⁻¹) of blocks of one shape.

    Args:
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        mesh: The devices that have the blocks; default one.
        keep: Whether to return what :func:`inverse_products` can start from.
        factors: The same, where it is known already; default formed.

    Returns:
        The diagonals [num_blocks, c], float32, and the factors [num_blocks, n, n] or
        None.

    Raises:
        CurvatureError: If a block is not accurate even in float64.

    Example:
        >>> G = jnp.array([[[1.0, 0.0]]])  # one block, one gradient, two weights
        >>> diagonals, _ = wf.curvature.inverse_diagonals(G, 1.0, "sample_space", ["w"])
        >>> diagonals.round(4).tolist()
        [[0.5, 1.0]]
    """
    return computed_blocks(
        _diagonal if keep else _diagonal_alone,
        gradients,
        () if factors is None else (factors,),
        damping,
        solver,
        names,
        repeat_with=(_diagonal_alone, ()),
        mesh=mesh,
    )


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
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        mesh: The devices that have the blocks; default one.
        factors: From :func:`inverse_diagonals` of the same gradients and damping;
            default formed again.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If a block is not accurate even in float64.

    Example:
        >>> G, v = jnp.array([[[1.0, 0.0]]]), jnp.array([[2.0, 1.0]])
        >>> wf.curvature.inverse_products(G, 1.0, v, "dense", ["w"]).round(4).tolist()
        [[1.0, 1.0]]
    """
    found, _ = computed_blocks(
        _product,
        gradients,
        (vectors,) if factors is None else (vectors, factors),
        damping,
        solver,
        names,
        repeat_with=(_product, (vectors,)),
        mesh=mesh,
    )
    return found
