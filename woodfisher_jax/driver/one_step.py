"""One pruning step on checked arguments."""

import jax

from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.method import Sampled
from woodfisher_jax.driver.in_memory import in_memory
from woodfisher_jax.driver.in_tiles import in_tiles
from woodfisher_jax.driver.job import (
    Job,
    check_reachable,
    costs_of,
    problem_of,
    targets_of,
)
from woodfisher_jax.driver.programs import from_vectors, to_vectors
from woodfisher_jax.driver.ranking import ranked
from woodfisher_jax.driver.reporting import (
    check_still_finite,
    compared,
    info_of,
    looked_at,
)
from woodfisher_jax.driver.weights import Outcome, Weights
from woodfisher_jax.info import Clock, PruneInfo
from woodfisher_jax.loss_model import Model
from woodfisher_jax.rows.compute import one_lapack_thread
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.selection.patterns import groups_of
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.vectors import check_finite, check_weights


@one_lapack_thread()
def prune_once(params: Params, job: Job) -> tuple[Params, Masks, PruneInfo]:
    """One step on checked arguments."""
    clock = Clock()
    pattern, order = job.goal.pattern, job.order
    groups = groups_of(pattern, order) if isinstance(pattern, Pattern) else None
    if job.goal.sparsity is not None and not job.goal.completes_pattern:
        check_reachable(job)  # before work starts
    costs = costs_of(params, job)
    params, masks = replicate((params, job.masks), job.compute.mesh)
    params, values, active = to_vectors(params, masks, order)
    check_weights(params)
    before = Weights(params, values, active, costs, groups)
    job = job._replace(masks=masks)
    if isinstance(job.method, Sampled):
        problem = problem_of(params, job)
        built = job.method.build(problem)
        targets = targets_of(job)
        with built.curvature as curvature:
            clock.mark("gradients")
            done = None
            if isinstance(curvature, InverseFisher):
                done = in_memory(curvature, before, targets, problem, job, clock)
            if done is None:
                done = in_tiles(curvature, before, targets, problem, job, clock)
        report = {"needs": built.needs, **done.report}
    else:
        clock.mark("gradients")
        kept, scores = ranked(Model(), before, job)
        clock.mark("curvature")
        done, report = Outcome(values, kept, scores, {}), {}
    check_finite(done.weights, order, "the updated weights of", "the update")
    new_params, new_masks = from_vectors(params, done.weights, done.kept, order)
    report |= compared(before, done, job)
    report |= looked_at(before, done, job, new_masks)
    if isinstance(job.method, Sampled) and report["empty_outputs"]:
        check_still_finite(problem, new_params, report["empty_outputs"])
    jax.block_until_ready(new_params)
    clock.mark("update")
    return new_params, new_masks, info_of(done.kept, job, clock, report)
