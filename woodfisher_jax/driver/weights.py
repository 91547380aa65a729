"""The weights before a step, and what the step decides of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.driver.job import Job
from woodfisher_jax.selection import scope as scopes
from woodfisher_jax.selection.costs import Costs
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees.paths import Params


class Weights(NamedTuple):
    """The prunable weights before a step.

    Attributes:
        params: Masked.
        values: w, [d].
        active: What is not pruned yet [d], bool.
        costs: For options that count MACs.
        groups: Of a pattern.
    """

    params: Params
    values: jax.Array
    active: jax.Array
    costs: Costs | None
    groups: Groups | None


class Outcome(NamedTuple):
    """What a step leaves, and what is reported of it.

    Attributes:
        weights: w + δw before the mask is applied, [d].
        kept: The new mask [d], bool.
        scores: The statistic; None where nothing was ranked.
        report: Fields of :class:`PruneInfo`.
    """

    weights: jax.Array
    kept: jax.Array
    scores: jax.Array | None
    report: dict[str, Any]


def only_repairs(before: Weights, job: Job) -> bool:
    """Whether a step only moves the weights that are left, so that none is ranked.

    So it is where they are as few as they are to be, and the update is the joint one,
    which unlike the sum of single updates needs no saliencies.
    """
    row, goal = job.method, job.goal
    if not isinstance(row, WoodFisher) or row.update != "joint" or row.swaps:
        return False
    if goal.sparsity is None or goal.pattern is not None or job.diagnostics:
        return False
    assert goal.scope is not None
    active = np.asarray(before.active)
    left = scopes.num_active(active, job.order, goal.scope)
    kept = scopes.num_kept(active, job.order, goal)
    return all(k >= n for k, n in zip(kept, left, strict=True))
