"""A step tile by tile, wherever the gradients are."""

from typing import Any

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
        own = y if job.mean_samples is None else None
        diagonal = curvature.diagonal()
        if diagonal.touched is not None:
            report["untouched"] = untouched_shares(diagonal.touched, before, job)
        model = model_of(curvature, diagonal, slope, own)
        model = in_units(row, model, before.values, before.active)
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
        fisher = curvature

        def choose(
            support: jax.Array, missing: np.ndarray, least: float
        ) -> tuple[InverseFisher, ChosenDamping]:
            return fisher.with_chosen_damping(support, missing, y, least)

        curvature = damped_again(choose, fisher, dampings, before, kept, targets, job)

    def weights_by(curvature: Curvature) -> jax.Array:
        by, bounds = model._replace(curvature=curvature), job.order.layers
        change = moved(row, by, before.values, before.active, kept, y, bounds)
        return before.values + change.value

    def weights_with(damping: float) -> jax.Array | None:
        assert isinstance(curvature, InverseFisher)
        try:
            return weights_by(curvature.with_damping(damping))
        except CurvatureError:  # Too little damping.
            return None

    weights = weights_by(curvature)
    if len(dampings) > 1:
        assert isinstance(curvature, InverseFisher)
        weights = tried_dampings(
            weights, weights_with, dampings, before, kept, targets, problem, job
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


def _slope(
    fisher: InverseFisher, targets: jax.Array, problem: Problem, job: Job
) -> jax.Array:
    """ḡ of other samples, or of the Fisher's own rows [d]."""
    if job.mean_samples is not None:
        return moments_of_others(problem, job.mean_samples).mean
    return fisher.slope(targets)
