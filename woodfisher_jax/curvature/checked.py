"""A formula of one block, for many blocks at once, with its precision checked.

Small systems are solved in float64, in the same program (see
:mod:`woodfisher_jax.equations.fisher`). A block whose Fisher is too ill conditioned for
that has no result: :class:`CurvatureError` says so. The damping is never changed.

Blocks are independent, so each device has its own and nothing is sent between devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from woodfisher_jax.compilation import quickly_compiled
from woodfisher_jax.equations.batched import map_blocks
from woodfisher_jax.equations.fisher import SAMPLE_SPACE, SOLVERS
from woodfisher_jax.equations.groups import group_forms
from woodfisher_jax.equations.joint import (
    columns_at,
    joint_update,
    joint_update_of_few,
    least_squares,
)
from woodfisher_jax.equations.precision import change_by_rounding, in_float64
from woodfisher_jax.equations.products import leverages as leverages_
from woodfisher_jax.rows.budget import BATCH_BYTES, block_bytes
from woodfisher_jax.rows.sharding import AXIS, on_each_device

TOLERANCE = 1e-4
"""Largest relative error that is accepted."""

BLOCKS = PartitionSpec(AXIS)


class CurvatureError(ArithmeticError):
    """The damped Fisher of some block cannot be inverted even in float64."""


class Block(NamedTuple):
    """What is computed of one block.

    Attributes:
        value: The result, [c] or of another shape.
        error: Its relative error, as far as that is known: inf where the Fisher is too
            ill conditioned, and what the rounding of a given vector makes.
        factor: What another task of the same block can start from, or None.
    """

    value: jax.Array
    error: jax.Array
    factor: jax.Array | None = None


Task = Callable[[jax.Array, tuple[jax.Array, ...], jax.Array, str], Block]
"""(gradients [N, c], other arrays of the block, damping, solver) -> result of one
block. A function of a module, so that jit recognises it."""


# --------------------------------------------------------------------------- the tasks


def _finite(value: jax.Array, factor: jax.Array | None = None) -> Block:
    """A result that is right if it is finite."""
    error = jnp.where(jnp.all(jnp.isfinite(value)), 0.0, jnp.inf)
    return Block(value, error, factor)


def diagonal(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """diag(F⁻¹), and the factor that it was taken from."""
    row = SOLVERS[solver]
    factor = others[0] if others else row.factorize(gradients, damping)
    found = row.diagonal(factor, gradients, damping)
    # A sum of which nothing is left has cancelled.
    return _finite(jnp.where(found > 0, found, jnp.nan), factor)


def diagonal_alone(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """diag(F⁻¹) without its factor, which takes memory."""
    return diagonal(gradients, others, damping, solver)._replace(factor=None)


def product(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """F⁻¹v; the others are v and, where it is known, the factor."""
    vector, *factors = others
    row = SOLVERS[solver]
    factor = factors[0] if factors else row.factorize(gradients, damping)
    return _finite(row.product(factor, gradients, damping, vector))


def product_of_rounded(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The same for a v that rounding to float32 has changed, which is in the error."""
    vector, *factors = others
    row = SOLVERS[solver]
    factor = factors[0] if factors else row.factorize(gradients, damping)
    multiply = partial(row.product, factor, gradients, damping)
    found = _finite(multiply(vector))
    moved = change_by_rounding(multiply, vector, found.value)
    return found._replace(error=jnp.maximum(found.error, moved))


def joint(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The joint update; the others are w, the support, y and perhaps the factor."""
    weights, kept, targets, *factors = others
    return _finite(
        joint_update(gradients, weights, kept, targets, damping, solver, *factors)
    )


def factor_of_few(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The factor of ``N λ I + G_S G_Sᵀ`` alone; the other has the columns of S.

    Columns from c on are padding.
    """
    del solver
    factor = SAMPLE_SPACE.factorize(columns_at(gradients, others[0]), damping)
    return _finite(factor[0, 0], factor)


def joint_of_few(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The joint update; the others are w, the columns of S, y and the factor of G_S."""
    del solver
    weights, columns, targets, factor = others
    return _finite(
        joint_update_of_few(gradients, weights, columns, targets, damping, factor)
    )


def leverages(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """Values h on a support; the others are the support and perhaps its factor."""
    del solver
    kept, *factors = others
    if factors:
        (factor,) = factors
    else:
        factor = SAMPLE_SPACE.factorize(jnp.where(kept, gradients, 0.0), damping)
    return _finite(leverages_(factor.astype(gradients.dtype), gradients))


def newton(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The Newton step ``h = F⁻¹ḡ`` of ``ḡ = -Gᵀy / N``; y and perhaps the factor."""
    targets, *factors = others
    return _finite(-least_squares(gradients, targets, damping, solver, *factors))


def whole_groups(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The joint statistic of groups; the others are w and tables of their columns."""
    weights, *tables = others
    return _groups(gradients, weights, tables, None, damping, solver)


def chosen_of_each(
    gradients: jax.Array, others: tuple[jax.Array, ...], damping: jax.Array, solver: str
) -> Block:
    """The same for N:M, of which some places are removed together."""
    weights, removals, *tables = others
    return _groups(gradients, weights, tables, removals, damping, solver)


def _groups(
    gradients: jax.Array,
    weights: jax.Array,
    tables: Sequence[jax.Array],
    removals: jax.Array | None,
    damping: jax.Array,
    solver: str,
) -> Block:
    values = group_forms(gradients, weights, tables, damping, solver, removals)
    return _finite(jnp.concatenate([value.reshape(-1) for value in values]))


# ----------------------------------------------------------------- over blocks, checked


@partial(jax.jit, static_argnames=("task", "solver", "mesh"))
@in_float64
def run_blocks(
    task: Task,
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: jax.Array,
    solver: str,
    mesh: Mesh | None = None,
) -> Block:
    """A task for all blocks, with the error of each.

    Args:
        task: For one block.
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        others: What else the task takes, each with a leading axis of blocks.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        mesh: The devices that have the blocks; default one.

    Returns:
        Values and errors in float32, factors in float64.
    """

    def one_block(damping: jax.Array, arrays: tuple[jax.Array, ...]) -> Block:
        block, *rest = arrays
        found = task(block.astype(jnp.float32), tuple(rest), damping, solver)
        value, error = (a.astype(jnp.float32) for a in found[:2])
        return Block(value, error, found.factor)

    def local(damping: jax.Array, *arrays: jax.Array) -> Block:
        _, num_samples, width = arrays[0].shape
        together = max(1, BATCH_BYTES // block_bytes(num_samples, width, solver))
        return map_blocks(partial(one_block, damping), arrays, together)

    specs = (PartitionSpec(), BLOCKS, *(BLOCKS for _ in others))
    run = on_each_device(local, mesh, specs, BLOCKS)
    return run(damping, gradients, *others)


_run_alone = quickly_compiled("task", "solver", "mesh")(run_blocks)


def checked_blocks(
    task: Task,
    gradients: jax.Array,
    others: tuple[jax.Array, ...],
    damping: float,
    solver: str,
    names: Sequence[str],
    *,
    mesh: Mesh | None = None,
) -> Block:
    """:func:`run_blocks`, with an error where a block has no result.

    Args:
        task: For one block.
        gradients: [num_blocks, N, c]; with a mesh, sharded by blocks.
        others: What else the task takes, each with a leading axis of blocks.
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.
        mesh: The devices that have the blocks; default one.

    Raises:
        CurvatureError: If the Fisher of a block is too ill conditioned for float64.
    """
    found = _run_alone(task, gradients, others, np.float32(damping), solver, mesh)
    errors = np.asarray(_everywhere(found.error, mesh))
    # Written so that NaN counts as an error.
    doubtful = np.flatnonzero(~(errors <= TOLERANCE))
    if len(doubtful):
        num_blocks, num_samples, width = gradients.shape
        # The others divide by λ, which loses digits that a Fisher of full rank has.
        other = solver != "dense" and num_samples >= width
        ways = "take solver='dense', raise damping" if other else "raise damping"
        raise CurvatureError(
            f"the damped Fisher of {len(doubtful)} of {num_blocks} blocks, the first "
            f"in {names[doubtful[0]]!r}, is too ill conditioned to invert even in "
            f"float64 by solver {solver!r} ({num_samples} gradients, width {width}); "
            f"{ways}, or scale the loss down"
        )
    return found


def _everywhere(errors: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Errors of all blocks, where other processes hold some of them."""
    if mesh is None or errors.is_fully_addressable:
        return errors
    return jax.device_put(errors, jax.NamedSharding(mesh, PartitionSpec()))


def inverse_diagonals(
    gradients: jax.Array, damping: float, solver: str, names: Sequence[str]
) -> jax.Array:
    """diag(F⁻¹) of blocks of one shape.

    Args:
        gradients: [num_blocks, N, c].
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If the Fisher of a block is too ill conditioned.

    Example:
        >>> G = jnp.array([[[1.0, 0.0]]])  # one block, one gradient, two weights
        >>> wf.curvature.inverse_diagonals(
        ...     G, 1.0, "sample_space", ["w"]
        ... ).round(4).tolist()
        [[0.5, 1.0]]
    """
    return checked_blocks(diagonal_alone, gradients, (), damping, solver, names).value


def inverse_products(
    gradients: jax.Array,
    damping: float,
    vectors: jax.Array,
    solver: str,
    names: Sequence[str],
) -> jax.Array:
    """F⁻¹v of blocks of one shape, v being the block's own vector.

    Args:
        gradients: [num_blocks, N, c].
        damping: λ > 0.
        vectors: [num_blocks, c].
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        names: For each block the tensor it lies in, for errors.

    Returns:
        Array [num_blocks, c], float32.

    Raises:
        CurvatureError: If the Fisher of a block is too ill conditioned.

    Example:
        >>> G, v = jnp.array([[[1.0, 0.0]]]), jnp.array([[2.0, 1.0]])
        >>> wf.curvature.inverse_products(G, 1.0, v, "dense", ["w"]).round(4).tolist()
        [[1.0, 1.0]]
    """
    return checked_blocks(product, gradients, (vectors,), damping, solver, names).value
