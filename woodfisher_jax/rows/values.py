"""What a step has made of the functions whose gradients the rows are."""

import math
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from woodfisher_jax.rows.gradients import chunk_length, grouped_chunks
from woodfisher_jax.rows.memory_plan import MICROBATCH_SIZE
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import (
    AXIS,
    num_devices,
    on_each_device,
    replicate,
    shard_rows,
)
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import Batch


def row_values(problem: Problem, params: Params) -> np.ndarray:
    """The loss of each row's m examples at other parameters, [N].

    Args:
        problem: The loss and its samples.
        params: Where the loss is evaluated.
    """
    mesh, m, number = problem.compute.mesh, problem.batch_size, problem.num_samples
    loss, params = replicate((problem.loss_fn, params), mesh)
    devices = num_devices(mesh)
    most = problem.compute.microbatch_size or MICROBATCH_SIZE
    groups = devices * chunk_length(number, m, most, devices)
    found: list[np.ndarray] = []
    for grouped, wanted in grouped_chunks(problem, groups):
        values = _values(loss, params, shard_rows(grouped, mesh), mesh)
        found.append(np.asarray(replicate(values, mesh))[:wanted])
    return np.concatenate(found)


@partial(jax.jit, static_argnames="mesh")
def _values(
    loss_fn: Partial, params: Params, groups: Batch, mesh: Mesh | None
) -> jax.Array:
    samples, everywhere = PartitionSpec(AXIS), PartitionSpec()
    each = jax.vmap(lambda loss, params, group: loss(params, group), (None, None, 0))
    specs = (everywhere, everywhere, samples)
    return on_each_device(each, mesh, specs, samples)(loss_fn, params, groups)


def missed(
    problem: Problem, start: np.ndarray, params: Params, targets: np.ndarray
) -> float:
    """How far a step is from what it was to do, on the samples of its rows.

    ``mean (ℓ_n(w') - ℓ_n(w) - y_n)²``, whose linear model the joint update minimizes.

    Args:
        problem: The losses ℓ and their samples.
        start: ℓ(w), [N].
        params: w'.
        targets: y, [N]; zero where the losses are to stay.

    Returns:
        A number that is lower after a better step; infinite if a loss is not finite.
    """
    values = row_values(problem, params).astype(np.float64)
    found = float(np.mean(np.square(values - start - targets)))
    return found if math.isfinite(found) else math.inf
