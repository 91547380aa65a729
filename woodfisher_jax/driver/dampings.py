"""Which damping a step takes where it is to be chosen."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.driver.job import Job
from woodfisher_jax.driver.programs import from_vectors
from woodfisher_jax.driver.weights import Weights, only_repairs
from woodfisher_jax.equations.damping import MULTIPLES, ChosenDamping
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.values import missed, row_values
from woodfisher_jax.trees import masks as masks_

T = TypeVar("T")


def missing_weights(before: Weights, targets: np.ndarray, job: Job) -> np.ndarray:
    """The weights that global magnitude would prune: a guess at what goes [d].

    All of them where the goal is no sparsity, or nothing else is to be predicted.
    """
    goal, values = job.goal.sparsity, np.asarray(before.values)
    number = len(values)
    if goal is not None:
        number -= masks_.num_kept(number, goal)
    sizes = np.where(before.active, np.abs(values), -1.0)
    missing = np.zeros_like(values)
    lowest = np.argpartition(sizes, number - 1)[:number]
    missing[lowest] = values[lowest]
    return missing if missing.any() or targets.any() else values


def damped_again(
    choose: Callable[[jax.Array, Any, float], tuple[T, ChosenDamping]],
    known: T,
    dampings: list[ChosenDamping],
    before: Weights,
    kept: jax.Array,
    targets: np.ndarray,
    job: Job,
) -> T:
    """For the joint update the damping is chosen for what the mask has pruned.

    Args:
        choose: (support, v, least multiple) -> what is known of the support, and its
            damping.
        known: Of the weights before the step.
        dampings: The chosen one, which another may follow.
        before: The weights before the step.
        kept: The new mask [d], bool.
        targets: y, [N].
        job: The step.
    """
    assert isinstance(job.method, WoodFisher)
    if job.method.update != "joint" or not job.method.moves:
        return known
    pruned = np.where(kept, np.float32(0), before.values)
    if only_repairs(before, job):
        dampings.append(dampings[0])  # chosen on the same weights
    elif pruned.any() or targets.any():
        # Less damping than chose the mask would step beyond where the model holds.
        known, chosen = choose(kept, pruned, dampings[0].multiple)
        dampings.append(chosen)
    return known


def tried_dampings(
    weights: jax.Array,
    moved_by: Callable[[float], jax.Array | None],
    dampings: list[ChosenDamping],
    before: Weights,
    kept: jax.Array,
    targets: np.ndarray,
    problem: Problem,
    job: Job,
) -> jax.Array:
    """Ten times the damping, and again, while that brings the losses nearer to their y.

    Leave-one-out asks how well the rows predict one another where they were formed, not
    how far from there they hold. Where losses are to stay and more damping does not
    help, less may: in a network that fits its data, the few rows with large gradients
    rule the choice, and all the losses change. With targets of their own there is no
    such search, for it would fit the noise of the rows.

    Args:
        weights: By the last of the dampings [d].
        moved_by: Damping -> weights, or None where that is too little.
        dampings: The last is replaced by the best.
        before: Before the step.
        kept: The new mask [d], bool.
        targets: y, [N].
        problem: The losses.
        job: The step.

    Returns:
        The weights by the best damping.
    """
    start = row_values(problem, before.params)

    def reached(weights: jax.Array) -> float:
        params, _ = from_vectors(before.params, weights, kept, job.order)
        return missed(problem, start, params, targets)

    lowest, chosen = reached(weights), dampings[-1]
    for factor in (10.0, 0.1) if job.targets is None else (10.0,):
        while MULTIPLES[0] <= dampings[-1].multiple * factor <= MULTIPLES[-1]:
            next_one = dampings[-1]._replace(
                damping=dampings[-1].damping * factor,
                multiple=dampings[-1].multiple * factor,
            )
            trial = moved_by(next_one.damping)
            if trial is None:
                break
            now = reached(trial)
            if not now < lowest:
                break
            lowest, dampings[-1], weights = now, next_one, trial
        if dampings[-1] != chosen:
            break
    return weights
