"""From the statistic to the mask, of single weights and of groups."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.method import Inverse
from woodfisher_jax.driver.job import Job
from woodfisher_jax.driver.weights import Weights
from woodfisher_jax.loss_model import (
    Model,
    point_of,
    power_of_two,
    saliency,
    without_units,
)
from woodfisher_jax.selection import scope as scopes
from woodfisher_jax.selection.chosen_structures import keep_structures
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees.vectors import check_finite


def ranked(model: Model, before: Weights, job: Job) -> tuple[jax.Array, jax.Array]:
    """The mask, and the scores that it follows from, [d] each."""
    if before.groups is not None and model.curvature is None:
        # Groups take the squares of magnitudes.
        largest = jnp.max(jnp.where(before.active, jnp.abs(before.values), 0.0))
        model = model._replace(unit=power_of_two(1 / largest))
    scores = saliency(job.method, model, before.values, before.active)
    check_scores(without_units(scores, model.unit), job)
    if before.groups is None:
        kept = scopes.choose(
            scores, before.active, job.masks, job.order, job.goal, before.costs
        )
    else:
        kept, scores = _ranked_groups(model, scores, before, before.groups, job)
    return kept, without_units(scores, model.unit)


def check_scores(scores: jax.Array, job: Job) -> None:
    """Refuses a statistic that is not finite."""
    what = "its weights or its curvature"
    check_finite(scores, job.order, "the saliency of", what)


def _ranked_groups(
    model: Model, scores: jax.Array, before: Weights, groups: Groups, job: Job
) -> tuple[jax.Array, jax.Array]:
    """The same for a pattern.

    By magnitude a group is worth the sum of its squares, by Optimal Brain Damage that
    of its saliencies, by Optimal Brain Surgeon its joint saliency.
    """
    active, goal = before.active, job.goal
    if model.curvature is None:
        scores = scores * scores
    values: Any
    if isinstance(model.curvature, Inverse):
        point = model.unit * point_of(before.values, model.slope)
        point = jnp.where(active, point, 0.0)
        values = model.curvature.group_saliency(point, groups)
    else:
        values = scopes.sums_of_single(scores, groups)
    if groups.removals is not None:
        most = None
        if not goal.completes_pattern:
            most = scopes.num_kept(np.asarray(active), job.order, goal)
        return scopes.choose_of_each(values, scores, active, groups, most)
    scores = scopes.shared(values, active, groups)
    if groups.structures is not None:
        kept = keep_structures(values, active, job.masks, job.order, groups, goal)
        # A weight that only makes what goes, and reads what stays, is not counted.
        left = np.bincount(groups.of, np.asarray(kept), groups.number)
        return kept, jnp.where(kept | jnp.asarray(left[groups.of] == 0), scores, 0.0)
    kept = scopes.choose(
        scores, active, job.masks, job.order, goal, before.costs, groups
    )
    return kept, scores
