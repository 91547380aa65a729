"""The arguments of a pruning step, checked, and what follows from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.curvature.method import Method, Sampled
from woodfisher_jax.methods import DEFAULT, check_together, resolve
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.inputs import (
    check_concrete,
    check_function,
    check_loss,
    check_mean_samples,
    check_params,
    check_targets,
    counted,
    counted_alike,
)
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import mesh_of, one_axis, replicate
from woodfisher_jax.schedules import levels
from woodfisher_jax.selection import scope as scopes
from woodfisher_jax.selection.chosen_structures import check_structures
from woodfisher_jax.selection.costs import MILLION, Costs, count_costs
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.selection.patterns import groups_of
from woodfisher_jax.selection.structures import structures
from woodfisher_jax.tracing.axes import Trace, traced
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.axes import WeightAxes, given_axes
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.prunable import Prunable, given_masks
from woodfisher_jax.trees.samples import regroup


class Job(NamedTuple):
    """One pruning step with its arguments checked.

    Attributes:
        loss_fn: As given.
        method: With its options.
        goal: With a scope.
        compute: With the mesh in one axis.
        masks: In the tree's order.
        order: The flat order of the masks.
        samples: For the curvature, counted, or one example to count MACs with; None
            where neither is needed.
        num_samples: N; 0 for methods without gradients.
        mean_samples: For the mean gradient alone, or None.
        targets: By which the rows are to change [N], or on average [], or None.
        diagnostics: Whether to compute what is only of interest.
        unused: Tensors that would be prunable by default, if the loss read them.
    """

    loss_fn: LossFn | None
    method: Method
    goal: Goal
    compute: Compute
    masks: Masks
    order: blocks.FlatOrder
    samples: Any
    num_samples: int
    mean_samples: Any
    targets: np.ndarray | None
    diagnostics: bool
    unused: tuple[str, ...] = ()


def checked_job(
    loss_fn: LossFn | None,
    params: Params,
    samples: Any,
    *,
    caller: str = "wf.prune",
    method: str | Method | None = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    mean_samples: Any = None,
    targets: Any = None,
    compute: Compute | None = None,
    axes: Mapping[str, str | WeightAxes] | None = None,
    diagnostics: bool = False,
    **options: Any,
) -> Job:
    """The job that the arguments of :func:`woodfisher_jax.prune` ask for.

    Raises:
        ValueError: If one is out of range, or two contradict each other.
    """
    check_concrete(
        caller,
        (loss_fn, params, samples, masks, mean_samples, targets, options),
        instead=", or compose wf.gradient_rows and wf.step, which are pure",
    )
    if loss_fn is not None:
        check_function("loss_fn", loss_fn, "(params, batch) -> scalar, or None")
    check_params(params)
    if compute is None:
        compute = Compute()
    elif not isinstance(compute, Compute):
        raise OptionError("compute", f"compute={compute!r}; expected a wf.Compute")
    method = DEFAULT if method is None else method
    row, goal, compute = resolve(method, compute, options)
    check_together(method, row, goal, mean_samples, targets)
    compute = compute.replace(mesh=one_axis(compute.mesh or mesh_of(params)))
    kept, number = counted_alike(
        lambda: _counted(_drawn(samples, 0), row, goal), compute.mesh, "samples"
    )
    sample = samples if kept is None else kept
    known = _known_axes({} if axes is None else axes, loss_fn, params, sample, row)
    chosen = masks is not None or prunable is not None
    masks = given_masks(params, masks, prunable, known.multiplied)
    # The tree's own order, whatever jit or a checkpoint has made of the dict's.
    masks = {path: masks[path] for path in leaves_by_path(params) if path in masks}
    order = blocks.flat_order(masks, known.every or known.multiplied)
    goal = _goal_of_network(goal, order, masks, loss_fn, params, sample)
    means = _drawn(mean_samples, 0)
    return Job(
        loss_fn=loss_fn,
        method=row,
        goal=goal,
        compute=compute,
        masks=masks,
        order=order,
        samples=kept,
        num_samples=number,
        mean_samples=None if means is None else check_mean_samples(means, compute.mesh),
        targets=None if targets is None else check_targets(targets, number),
        diagnostics=diagnostics,
        unused=() if chosen else tuple(p for p in known.unused if p not in masks),
    )


class _KnownAxes(NamedTuple):
    """What is known of the axes of tensors.

    Attributes:
        multiplied: Of tensors that are in a product, and those that are given; None
            where there are none.
        every: Of all tensors that the loss reads; empty where it was not traced.
        unused: Tensors that would be prunable by default, if the loss read them.
    """

    multiplied: dict[str, WeightAxes] | None
    every: dict[str, WeightAxes]
    unused: tuple[str, ...]


def _known_axes(
    axes: Mapping[str, str | WeightAxes],
    loss_fn: LossFn | None,
    params: Params,
    samples: Any,
    row: Method,
) -> _KnownAxes:
    """The axes that are given, and those that the program of the loss tells."""
    given: dict[str, WeightAxes] = given_axes(axes, params)
    # Axes that were found before need not be found again.
    if not any(isinstance(own, WeightAxes) for own in axes.values()):
        trace = _traced(loss_fn, params, samples, row)
        if trace is not None:
            return _KnownAxes(
                trace.axes() | given, trace.all_axes() | given, trace.unused()
            )
    return _KnownAxes(given or None, {}, ())


def _goal_of_network(
    goal: Goal,
    order: blocks.FlatOrder,
    masks: Masks,
    loss_fn: LossFn | None,
    params: Params,
    samples: Any,
) -> Goal:
    """The goal with the structures of the network, if it fits the tensors."""
    if isinstance(goal.pattern, Pattern):
        pattern = _of_network(goal.pattern, loss_fn, params, samples)
        goal = goal.replace(pattern=pattern)
        groups = groups_of(pattern, order)  # refuses tensors that it does not fit
        if groups.structures is not None:
            check_structures(masks, order, groups, goal)
    elif goal.sparsity is not None:
        scopes.check_some_left(order, goal)
    return goal


def _of_network(
    pattern: Pattern, loss_fn: LossFn | None, params: Params, samples: Any
) -> Pattern:
    """The pattern with the structures of the network, if it needs them."""
    if not pattern.kinds or pattern.structures is not None:
        return pattern
    if loss_fn is None or samples is None or callable(samples):
        raise OptionError(
            "pattern",
            f"pattern={pattern.name!r} without loss_fn and samples; expected both, or "
            "pattern=wf.structures(net_fn, params, inputs)",
        )
    found = structures(loss_fn, params, next(regroup(samples, 1)))
    return pattern._replace(structures=found)


def _traced(
    loss_fn: LossFn | None, params: Params, samples: Any, row: Method
) -> Trace | None:
    """The program of the loss; None where it or its samples are not there.

    Conventions then tell what the axes of tensors are.
    """
    if loss_fn is None or samples is None or callable(samples):
        return None
    batch_size = row.batch_size if isinstance(row, Sampled) else 1
    return traced(loss_fn, params, next(regroup(samples, batch_size)), "loss_fn")


def _drawn(samples: Any, number: int) -> Any:
    """Samples as they are, or those that a function returns for a recomputation."""
    return samples(number) if callable(samples) else samples


def _counted(samples: Any, row: Method, goal: Goal) -> tuple[Any, int]:
    """What is needed of the samples, and N."""
    if isinstance(row, Sampled):
        return counted(samples, row.num_samples, row.batch_size)
    if not goal.counts_macs:
        return None, 0
    if samples is None:
        raise OptionError(
            "samples",
            "samples is missing; expected at least one example, since the "
            "multiply-accumulates are counted by tracing loss_fn with it",
        )
    return next(regroup(samples, 1)), 0


def drawn_again(job: Job, samples: Any, mean_samples: Any, number: int) -> Job:
    """The same step with samples of their own for a recomputation."""
    if callable(samples):
        counted_again = counted_alike(
            lambda: _counted(samples(number), job.method, job.goal),
            job.compute.mesh,
            "samples",
        )
        job = job._replace(samples=counted_again[0])
    if callable(mean_samples):
        means = check_mean_samples(mean_samples(number), job.compute.mesh)
        job = job._replace(mean_samples=means)
    return job


def levels_of(params: Params, job: Job) -> list[Goal]:
    """The goal of every step on the way, from what the masks have now."""
    goal, number = job.goal, job.goal.recompute
    if not number:
        return [goal]
    if goal.sparsity is not None:
        check_reachable(job)
        start = masks_.sparsity(job.masks)
        way = levels(start, goal.sparsity, number, goal.degree)
        return [goal.replace(sparsity=level) for level in way]
    assert goal.flops_target is not None
    if isinstance(goal.pattern, Pattern) and goal.pattern.structures is not None:
        found = goal.pattern.structures
        total = found.account(found.gone(job.masks)).left["macs"]
    else:
        costs = costs_of(params, job)
        assert costs is not None
        total = costs.total
    way = levels(total / MILLION, goal.flops_target, number, goal.degree, 0.0)
    return [goal.replace(flops_target=level) for level in way]


def check_reachable(job: Job) -> None:
    """Refuses a sparsity that a pattern cannot reach."""
    if isinstance(job.goal.pattern, Pattern) and job.goal.pattern.kinds:
        return  # Whole structures may be beyond it already.
    active = blocks.flat_mask(job.order, job.masks)
    scopes.num_kept(active, job.order, job.goal)


def costs_of(params: Params, job: Job) -> Costs | None:
    """What each weight costs, where the goal or the pattern counts that."""
    pattern = job.goal.pattern
    structured = isinstance(pattern, Pattern) and pattern.kinds
    if structured or not job.goal.counts_macs:
        return None
    everything = job.goal.flops_target is not None
    return count_costs(
        job.loss_fn, params, job.masks, job.samples, all_layers=everything
    )


def problem_of(params: Params, job: Job) -> Problem:
    """What the curvature is estimated from, replicated over the devices."""
    assert isinstance(job.method, Sampled)
    loss = as_partial(check_loss(job.loss_fn, params, job.samples))
    return Problem(
        replicate(loss, job.compute.mesh),
        params,
        job.masks,
        job.samples,
        job.order,
        job.num_samples,
        job.method.batch_size,
        job.compute,
    )


def targets_of(job: Job) -> np.ndarray:
    """y, [N], of the slope ``ḡ = -Gᵀy / N``; zero without one."""
    y: Any = 0.0
    if job.method.first_order:
        y = -1.0 if job.targets is None else job.targets
    return np.broadcast_to(np.asarray(y, np.float32), (job.num_samples,))
