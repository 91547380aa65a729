"""What a step reports, and what it finds odd."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.method import Quadratic
from woodfisher_jax.driver.job import Job
from woodfisher_jax.driver.programs import from_vectors
from woodfisher_jax.driver.weights import Outcome, Weights
from woodfisher_jax.info import Clock, PruneInfo
from woodfisher_jax.loss_model import Model
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.gradients import row_chunks
from woodfisher_jax.rows.memory_plan import MICROBATCH_SIZE, plan_rows
from woodfisher_jax.rows.moments import Moments, moments
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.values import row_values
from woodfisher_jax.selection import diagnostics as diagnostics_
from woodfisher_jax.selection import findings
from woodfisher_jax.selection.costs import macs_of
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.masks import Masks, left_out
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import num_examples


def info_of(
    kept: jax.Array, job: Job, clock: Clock, report: dict[str, Any]
) -> PruneInfo:
    """What is reported of a step."""
    seconds = clock.seconds()
    ranges = list(pairwise(job.order.offsets))
    stays = np.asarray(kept)
    counts = [int(np.count_nonzero(stays[start:stop])) for start, stop in ranges]
    sizes = [stop - start for start, stop in ranges]
    return PruneInfo(
        sparsity=(job.order.size - sum(counts)) / job.order.size,
        nonzero=sum(counts),
        prunable=job.order.size,
        sparsity_by_path={
            path: (size - count) / size
            for path, size, count in zip(job.order.paths, sizes, counts, strict=True)
        },
        num_samples=job.num_samples,
        seconds_gradients=seconds["gradients"],
        seconds_curvature=seconds["curvature"],
        seconds_update=seconds["update"],
        objective="loss" if job.targets is None or not job.targets.ndim else "distance",
    )._replace(**report)


def compared(before: Weights, done: Outcome, job: Job) -> dict[str, Any]:
    """The mask beside MACs, the statistic and global magnitude."""
    report: dict[str, Any] = {}
    if before.costs is not None and job.goal.flops_target is not None:
        report["macs"] = macs_of(done.kept, job.order, before.costs)
    if done.scores is None:
        return report
    arrays = (before.values, done.scores, before.active, done.kept)
    values, scores, active, kept = (np.asarray(array) for array in arrays)
    report["saliency_histogram"] = diagnostics_.saliency_histogram(scores, active, kept)
    if job.diagnostics:
        sizes = np.abs(values[active])
        report["magnitude_overlap"] = diagnostics_.magnitude_overlap(
            values, active, kept
        )
        report["magnitude_correlation"] = diagnostics_.rank_correlation(
            scores[active], sizes
        )
    return report


def untouched_shares(touched: jax.Array, before: Weights, job: Job) -> dict[str, float]:
    """Of each tensor the share of weights that no sample knows anything of."""
    return findings.untouched(np.asarray(touched), np.asarray(before.active), job.order)


def looked_at(before: Weights, done: Outcome, job: Job, masks: Masks) -> dict[str, Any]:
    """What is left of tensors and outputs, and what has come back."""
    new = blocks.flat_mask(job.order, masks)
    gone = findings.emptied(np.asarray(before.active), new, job.order)
    in_each = job.goal.scope == "layer" and job.goal.sparsity is not None
    silent = done.report.get("untouched", {})
    texts = findings.messages(silent, gone, job.unused, in_each)
    was_zero = (np.asarray(before.values) == 0) & np.asarray(before.active)
    is_not = (np.asarray(done.weights) != 0) & np.asarray(done.kept)
    return {
        "empty_outputs": findings.outputs_without_inputs(new, job.order),
        "revived": int(np.count_nonzero(was_zero & is_not)),
        "warnings": tuple(texts),
    }


def check_still_finite(
    problem: Problem, params: Params, emptied: Mapping[str, int]
) -> None:
    """A loss that divides by what an output's weights are has no value without them.

    Raises:
        OptionError: If the loss of the first sample is not finite.
    """
    if not np.isfinite(row_values(problem._replace(num_samples=1), params)).all():
        raise OptionError(
            "loss_fn",
            f"loss_fn is not finite after the step: {sorted(emptied)} have outputs "
            "without any weight, and something divides by the size of these weights, "
            "as weight normalisation does; add an epsilon to the norm there, or "
            f"{left_out(*sorted(emptied))}",
        )


def predicted(step: jax.Array, model: Model, problem: Problem) -> dict[str, Any]:
    """The quadratic model of the loss for the step that was taken.

    None without a quadratic form: a curvature that is no model of the loss predicts
    nothing.
    """
    if not isinstance(model.curvature, Quadratic):
        return {}
    found = _moments_of(problem)
    mean = model.slope.mean if model.slope else found.mean
    linear = float(jnp.dot(mean, step))
    return {
        "gradient_term": linear,
        "predicted_loss_increase": linear + model.curvature.quadratic_form(step) / 2,
        "fisher_trace": found.trace(problem.order),
    }


def measured(
    weights: jax.Array, kept: jax.Array, before: Weights, problem: Problem
) -> float:
    """By how much the loss of the curvature's samples has risen."""
    after, _ = from_vectors(before.params, weights, kept, problem.order)
    losses = [row_values(problem, params) for params in (before.params, after)]
    return float(np.mean(losses[1] - losses[0], dtype=np.float64))


def _moments_of(problem: Problem) -> Moments:
    """Moments of the problem's gradients, by a pass of their own."""
    needs, _ = plan_rows(problem, layouts=None, block_size=None)
    return moments(row_chunks(problem, needs.microbatch_size))


def moments_of_others(problem: Problem, samples: Any) -> Moments:
    """The same of other samples, all of them."""
    number = num_examples(samples)
    assert number is not None
    most = min(number, problem.compute.microbatch_size or MICROBATCH_SIZE)
    length = next(n for n in range(most, 0, -1) if number % n == 0)
    return _moments_of(
        problem._replace(
            samples=samples, num_samples=number // length, batch_size=length
        )
    )
