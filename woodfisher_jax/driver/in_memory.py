"""A step in whole programs, where gradients are few."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.curvature.checked import TOLERANCE
from woodfisher_jax.curvature.fisher import AUTO, WoodFisher
from woodfisher_jax.curvature.inverse import Grams, InverseFisher
from woodfisher_jax.curvature.sources import InMemory
from woodfisher_jax.driver.dampings import damped_again, missing_weights, tried_dampings
from woodfisher_jax.driver.job import Job
from woodfisher_jax.driver.programs import (
    resident_damping,
    resident_step,
    resident_update,
)
from woodfisher_jax.driver.ranking import check_scores
from woodfisher_jax.driver.reporting import untouched_shares
from woodfisher_jax.driver.weights import Outcome, Weights, only_repairs
from woodfisher_jax.equations.damping import ChosenDamping, choose_damping
from woodfisher_jax.info import Clock
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.selection import scope as scopes
from woodfisher_jax.step import Step, undamped


def in_memory(
    fisher: InverseFisher,
    before: Weights,
    targets: np.ndarray,
    problem: Problem,
    job: Job,
    clock: Clock,
) -> Outcome | None:
    """The step in whole programs, where gradients are few and the host takes no part.

    One program; for the joint update with a chosen damping three: what dampings are
    chosen by, the mask, and the update, which is tried with several.

    None elsewhere, and where the Fisher of a block is too ill conditioned: tile by tile
    the error names the tensor.
    """
    row, goal, source = job.method, job.goal, fisher.source.resident()
    assert isinstance(row, WoodFisher)
    on_host = goal.pattern or goal.counts_macs or row.swaps
    if source is None or on_host or job.diagnostics or job.mean_samples is not None:
        return None
    programs = _Programs(source, before, targets, job)
    auto, repairs = row.damping == AUTO, only_repairs(before, job)
    joint_later = repairs or (auto and row.moves and row.update == "joint")
    job.compute.report("pruning step", 0, 1)
    strength, grams, dampings = fisher.damping, None, []
    if auto:
        missing = missing_weights(before, targets, job)
        grams, chosen = programs.choose(before.active, missing)
        strength, dampings = chosen.damping, [chosen]
    weights, kept, scores = before.values, before.active, None
    report: dict[str, Any] = {}
    if not repairs:
        method = row.replace(update="none") if joint_later else row
        found = programs.step(strength, grams, method)
        if not float(found.error) <= TOLERANCE:
            return None
        weights, kept, scores = found.weights, found.mask, found.scores
        check_scores(scores, job)
        report["saliency_sum"] = float(found.saliency_sum)
        report["untouched"] = untouched_shares(found.touched, before, job)
    clock.mark("curvature")
    if joint_later:
        if auto:
            grams = damped_again(
                programs.choose, grams, dampings, before, kept, targets, job
            )
            strength = dampings[-1].damping
        move = partial(programs.update, kept, grams)
        change = move(strength)
        if change is None:
            return None
        weights = change
    if len(dampings) > 1:
        weights = tried_dampings(
            weights, move, dampings, before, kept, targets, problem, job
        )
    if dampings:
        report["dampings"] = tuple(dampings)
    job.compute.report("pruning step", 1, 1)
    return Outcome(weights, kept, scores, report)


class _Programs(NamedTuple):
    """The programs of a step whose gradients are in memory, with their arguments.

    Attributes:
        source: The gradients.
        before: The weights.
        targets: y, [N].
        job: The step.
    """

    source: InMemory
    before: Weights
    targets: np.ndarray
    job: Job

    def choose(
        self, support: jax.Array, missing: np.ndarray, least: float = 0.0
    ) -> tuple[Grams | None, ChosenDamping]:
        """Gram matrices over a support, where they serve, and the damping."""
        grams, found = resident_damping(
            self.source, support, missing, self.targets, method=self._static()
        )
        return grams, choose_damping(found, self.job.num_samples, least)

    def step(self, damping: Any, grams: Grams | None, method: WoodFisher) -> Step:
        """Statistic, mask and update."""
        order, goal = self.job.order, self.job.goal
        assert goal.scope is not None
        return resident_step(
            self.source,
            self.before.values,
            self.before.active,
            scopes.num_kept(np.asarray(self.before.active), order, goal),
            damping,
            self.targets,
            grams,
            method=undamped(method),
            bounds=order.layers,
            ranges=scopes.bounds_of(order, goal.scope),
        )

    def update(
        self, kept: jax.Array, grams: Grams | None, damping: Any
    ) -> jax.Array | None:
        """The weights after the joint update; None if the damping is too little."""
        found = resident_update(
            self.source,
            self.before.values,
            kept,
            damping,
            self.targets,
            grams,
            method=self._static(),
            bounds=self.job.order.layers,
        )
        return found.value if float(found.error) <= TOLERANCE else None

    def _static(self) -> WoodFisher:
        assert isinstance(self.job.method, WoodFisher)
        return undamped(self.job.method)
