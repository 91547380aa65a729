"""A step tile by tile, wherever the gradients are."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.curvature.fisher import AUTO, WoodFisher
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.method import Curvature
from woodfisher_jax.curvature.swaps import improve
from woodfisher_jax.driver.dampings import damped_again, missing_weights, tried_dampings
from woodfisher_jax.driver.job import Job
from woodfisher_jax.driver.ranking import ranked
from woodfisher_jax.driver.reporting import (
    measured,
    moments_of_others,
    predicted,
    untouched_shares,
)
from woodfisher_jax.driver.weights import Outcome, Weights, only_repairs
from woodfisher_jax.equations.damping import ChosenDamping
from woodfisher_jax.info import Clock
from woodfisher_jax.loss_model import Model, in_units, model_of, moved, saliency_sum
from woodfisher_jax.rows.problem import Problem


def in_tiles(
    curvature: Curvature,
    before: Weights,
    targets: np.ndarray,
    problem: Problem,
    job: Job,
    clock: Clock,
) -> Outcome:
    """The step with what happens on the host between its formulas."""
    row, y = job.method, jnp.asarray(targets)
    report: dict[str, Any] = {}
    repairs = only_repairs(before, job)
    dampings: list[ChosenDamping] = []
    if isinstance(row, WoodFisher) and row.damping == AUTO:
        assert isinstance(curvature, InverseFisher)
        missing = missing_weights(before, targets, job)
        curvature, chosen = curvature.with_chosen_damping(before.active, missing, y)
        dampings.append(chosen)
    slope = None
    if row.first_order and not repairs:
        assert isinstance(curvature, InverseFisher)
        slope = _slope(curvature, y, problem, job)
    model, kept, scores = Model(curvature), before.active, None
    if not repairs:
        model = _model(curvature, slope, y, before, job, report)
        kept, scores = ranked(model, before, job)
    if isinstance(row, WoodFisher) and row.swaps:
        assert isinstance(curvature, InverseFisher)
        mean = jnp.zeros_like(before.values) if slope is None else slope
        support = improve(
            curvature, before.values, before.active, kept, y, mean, row.swaps
        )
        kept, report["swap_losses"] = support.kept, support.losses
    if scores is not None:
        newly = before.active & ~kept
        report["saliency_sum"] = float(saliency_sum(scores, newly, model.slope))
    clock.mark("curvature")
    if dampings:
        assert isinstance(curvature, InverseFisher)
        choose = partial(_chosen, curvature, y)
        curvature = damped_again(
            choose, curvature, dampings, before, kept, targets, job
        )
    update = _Update(model, before, kept, y, job)
    weights = update.by(curvature)
    if len(dampings) > 1:
        assert isinstance(curvature, InverseFisher)
        moved_by = partial(update.with_damping, curvature)
        weights = tried_dampings(
            weights, moved_by, dampings, before, kept, targets, problem, job
        )
        curvature = curvature.with_damping(dampings[-1].damping)
    model = model._replace(curvature=curvature)
    if dampings:
        report["dampings"] = tuple(dampings)
    if job.diagnostics:
        step = jnp.where(kept, weights, 0.0) - before.values
        report |= predicted(step, model, problem)
        if job.targets is None:
            report["measured_loss_increase"] = measured(weights, kept, before, problem)
    return Outcome(weights, kept, scores, report)


def _model(
    curvature: Curvature,
    slope: jax.Array | None,
    targets: jax.Array,
    before: Weights,
    job: Job,
    report: dict[str, Any],
) -> Model:
    """The model by which weights are ranked; reports which no sample has touched."""
    own = targets if job.mean_samples is None else None
    diagonal = curvature.diagonal()
    if diagonal.touched is not None:
        report["untouched"] = untouched_shares(diagonal.touched, before, job)
    model = model_of(curvature, diagonal, slope, own)
    return in_units(job.method, model, before.values, before.active)


def _chosen(
    fisher: InverseFisher,
    targets: jax.Array,
    support: jax.Array,
    missing: np.ndarray,
    least: float,
) -> tuple[InverseFisher, ChosenDamping]:
    """The Fisher with a damping that is chosen for a support."""
    return fisher.with_chosen_damping(support, missing, targets, least)


class _Update(NamedTuple):
    """The update for a mask, by one curvature or another.

    Attributes:
        model: By which the mask was chosen.
        before: The weights before the step.
        kept: The mask [d], bool.
        targets: y, [N].
        job: The step.
    """

    model: Model
    before: Weights
    kept: jax.Array
    targets: jax.Array
    job: Job

    def by(self, curvature: Curvature) -> jax.Array:
        """The weights after it, before the mask is applied [d]."""
        model, bounds = self.model._replace(curvature=curvature), self.job.order.layers
        values, active = self.before.values, self.before.active
        change = moved(
            self.job.method, model, values, active, self.kept, self.targets, bounds
        )
        return values + change.value

    def with_damping(self, fisher: InverseFisher, damping: float) -> jax.Array | None:
        """The weights by a Fisher with another damping; None if that is too little."""
        try:
            return self.by(fisher.with_damping(damping))
        except CurvatureError:
            return None


def _slope(
    fisher: InverseFisher, targets: jax.Array, problem: Problem, job: Job
) -> jax.Array:
    """ḡ of other samples, or of the Fisher's own rows [d]."""
    if job.mean_samples is not None:
        return moments_of_others(problem, job.mean_samples).mean
    return fisher.slope(targets)
