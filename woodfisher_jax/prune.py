"""The driver of a pruning step: checks arguments, plans memory, ensures precision."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.checked import TOLERANCE, CurvatureError
from woodfisher_jax.curvature.fisher import AUTO, WoodFisher
from woodfisher_jax.curvature.inverse import Grams, InMemory, InverseFisher
from woodfisher_jax.curvature.method import (
    Curvature,
    Inverse,
    Method,
    Quadratic,
    Sampled,
)
from woodfisher_jax.curvature.swaps import improve
from woodfisher_jax.equations.damping import MULTIPLES, ChosenDamping, choose_damping
from woodfisher_jax.info import Clock, PruneInfo, PruneWarning, joined
from woodfisher_jax.methods import (
    DEFAULT,
    check_together,
    resolve,
)
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.compute import Compute, one_lapack_thread, watched
from woodfisher_jax.rows.gradients import LossFn, as_partial, row_chunks
from woodfisher_jax.rows.inputs import (
    check_concrete,
    check_loss,
    check_mean_samples,
    check_params,
    check_targets,
    counted,
    counted_alike,
)
from woodfisher_jax.rows.memory_plan import MICROBATCH_SIZE, plan_rows
from woodfisher_jax.rows.moments import Moments, moments
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import (
    auto_axes,
    mesh_of,
    one_axis,
    outside_mesh,
    placed_as,
    replicate,
)
from woodfisher_jax.rows.values import missed, row_values
from woodfisher_jax.schedules import levels
from woodfisher_jax.selection import diagnostics as diagnostics_
from woodfisher_jax.selection import findings
from woodfisher_jax.selection import scope as scopes
from woodfisher_jax.selection.costs import MILLION, Costs, count_costs, macs_of
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.patterns import GroupNames, Groups, Pattern, groups_of
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.step import (
    Model,
    Step,
    in_units,
    model_of,
    moved,
    point_of,
    power_of_two,
    resident_damping,
    resident_step,
    resident_update,
    saliency,
    saliency_sum,
    undamped,
)
from woodfisher_jax.tracing.axes import Trace, traced
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.axes import WeightAxes, given_axes
from woodfisher_jax.trees.masks import Masks, Prunable
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import num_examples, regroup
from woodfisher_jax.trees.vectors import (
    check_finite,
    check_weights,
    from_vectors,
    to_vectors,
)

T = TypeVar("T")


@watched
@outside_mesh()
def prune(
    loss_fn: LossFn | None,
    params: Params,
    samples: Any = None,
    *,
    sparsity: float | None = None,
    method: str | Method | None = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    scope: str | None = None,
    pattern: str | GroupNames | Structures | None = None,
    flops_target: float | None = None,
    mean_samples: Any = None,
    targets: Any = None,
    compute: Compute | None = None,
    axes: Mapping[str, str | WeightAxes] | None = None,
    diagnostics: bool = False,
    **options: Any,
) -> tuple[Params, Masks, PruneInfo]:
    """Prunes a network to a sparsity in one step and updates the weights that stay.

    Removes the weights with the lowest saliency ``ρ_q = w_q² / (2 [F⁻¹]_qq)`` and moves
    the others by ``δw = -Σ_q w_q F⁻¹ e_q / [F⁻¹]_qq``, where F = λ I + (1/N) Σ g gᵀ is
    the damped empirical Fisher of the loss (other methods: see
    :data:`~woodfisher_jax.methods.METHODS`).

    Args:
        loss_fn: (params, batch) -> scalar, the mean loss over the batch. Use
            ``jax.tree_util.Partial(loss, arrays)`` where it depends on more arrays.
            None will do for methods by magnitude.
        params: Any pytree of floating-point arrays.
        samples: One batch (array, tuple, dict or other mapping of arrays with a leading
            axis of examples), or an iterable of batches such as a list, which is kept
            in memory unless it is :class:`woodfisher_jax.trees.samples.Examples`; or a
            function of the number of the recomputation (from 0) that returns such
            samples. Methods by magnitude need none, but with FLOP options one example.
        sparsity: Fraction of all prunable weights to be zero afterwards, in [0, 1); or
            ``flops_target``. Default that of a pattern N:M.
        method: A name of the table, such as the paper's "woodfisherblock"; or a method
            itself, such as ``wf.WoodFisher(damping=1e-4)``. Default
            :data:`~woodfisher_jax.methods.DEFAULT`: the paper's blocks with the joint
            update and ``damping="auto"``.
        masks: What is pruned already, path -> bool or a pytree of the structure of
            ``params``; default nothing. It also says what is prunable. Pruned weights
            never come back.
        prunable: Predicate on (path, array) or regular expression on paths, if no masks
            are given; default the weights of dense layers and convolutions, found by
            tracing the loss; without a loss arrays of two or more dimensions.
        scope: "global" (one threshold) or "layer" (the sparsity in each layer, of
            which a tensor may have several, stacked); default the method's own.
        pattern: What stays or goes together: "2:4" (any N:M of consecutive inputs),
            "4x1" (any block of inputs by outputs), "filters", "heads", "structures"
            (what :func:`woodfisher_jax.structures` finds, or that itself), or a
            function (path, shape) -> group numbers. Default None, single weights.
        flops_target: Instead of a sparsity: millions of multiply-accumulates of one
            example to be left, in all layers.
        mean_samples: Examples for ḡ alone in methods of first order, all of which are
            used, in the forms of ``samples``; default the same.
        targets: y, [N] or one number, for methods of first order: values by which the
            rows are to change, so that ``ḡ = -Gᵀy / N``; default -1, the mean gradient.
        compute: What may be taken of the machine; default
            :class:`~woodfisher_jax.rows.compute.Compute` as it is.
        axes: What the axes of tensors are, where the loss does not tell or is not to:
            from a regular expression on paths to one letter for each axis (o outputs, i
            inputs, k positions of a kernel, s stacked layers), such as
            ``{"conv": "oikk"}``; or from :func:`woodfisher_jax.find_axes`.
        diagnostics: Whether ``info`` has what costs extra (a pass of gradients);
            default False.
        **options: Any field of the method (``damping=1e-4``, ``num_samples=1000``,
            ``update="joint"``), of :class:`~woodfisher_jax.selection.goal.Goal`
            (``recompute=3``) or of ``Compute`` (``memory_limit=4e9``), by name. The
            tables are in ``docs/methods.md``.

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``, which
        have the sharding that they came with, as have their masks.

    Raises:
        ValueError: If an argument is out of range or makes no sense for the method, a
            network cannot be counted or captured, or samples are too few.
        TypeError: If params are not floating point, loss_fn does not return a scalar,
            or under ``jit``.
        CurvatureError: If the Fisher is too ill conditioned; nothing is changed then.
        MemoryLimitError: If the step cannot fit in memory; it says what would.
        StoreError: If the disk cannot hold the gradients.

    References:
        Singh & Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340.

    Example:
        >>> params = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "b": jnp.zeros(2)}
        >>> def loss_fn(params, x):
        ...     return jnp.mean((x @ params["w"] + params["b"] - 1) ** 2)
        >>> params, masks, info = wf.prune(loss_fn, params, jnp.eye(2), sparsity=0.5)
        >>> int(jnp.count_nonzero(params["w"])), list(masks), info.sparsity
        (2, ['w'], 0.5)
    """
    goal = {"sparsity": sparsity, "scope": scope, "pattern": pattern}
    given = params
    loss_fn, params, masks = auto_axes((loss_fn, params, masks))
    job = _checked(
        loss_fn,
        params,
        samples,
        method=method,
        masks=masks,
        prunable=prunable,
        mean_samples=mean_samples,
        targets=targets,
        compute=compute,
        axes=axes,
        diagnostics=diagnostics,
        flops_target=flops_target,
        **goal,
        **options,
    )
    infos = []
    masks = job.masks
    for number, level in enumerate(_levels(params, job)):
        again = job._replace(masks=masks, goal=level)
        if number:
            again = _drawn_again(again, samples, mean_samples, number)
        params, masks, info = _prune_once(params, again)
        infos.append(info)
    params = jax.tree.map(placed_as, params, given)
    leaves = leaves_by_path(params)
    masks = {path: placed_as(mask, leaves[path]) for path, mask in masks.items()}
    info = joined(infos)
    for text in info.warnings:
        # The caller's line: two decorators are in between.
        warnings.warn(text, PruneWarning, stacklevel=4)
    return params, masks, info


@outside_mesh()
def plan_pruning(
    loss_fn: LossFn | None, params: Params, samples: Any = None, **options: Any
) -> Needs | None:
    """What a pruning step needs, before it starts; nothing is computed.

    Args:
        loss_fn: As for :func:`prune`.
        params: As for :func:`prune`.
        samples: As for :func:`prune`.
        **options: As for :func:`prune`.

    Returns:
        The needs of one step (there are more with ``recompute``); None for magnitudes,
        which have no curvature.

    Raises:
        ValueError: If an argument is out of range or samples are too few.
        MemoryLimitError: If the step cannot fit in memory; it says what would.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.mean((x @ params["w"] - 1) ** 2)
        >>> needs = wf.plan_pruning(
        ...     loss_fn, {"w": jnp.ones((2, 3))}, jnp.eye(2), sparsity=0.5
        ... )
        >>> needs.num_weights, needs.num_samples, needs.blocks
        (6, 2, ((6, 1, 'sample_space'),))
    """
    loss_fn, params = auto_axes((loss_fn, params))
    job = _checked(loss_fn, params, samples, **options)
    if not isinstance(job.method, Sampled):
        return None
    return job.method.plan(_problem(params, job))


# ---------------------------------------------------------------- the arguments checked


class _Job(NamedTuple):
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


def _checked(
    loss_fn: LossFn | None,
    params: Params,
    samples: Any,
    *,
    method: str | Method | None = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    mean_samples: Any = None,
    targets: Any = None,
    compute: Compute | None = None,
    axes: Mapping[str, str | WeightAxes] | None = None,
    diagnostics: bool = False,
    **options: Any,
) -> _Job:
    check_concrete(loss_fn, params, samples, masks, mean_samples, targets, options)
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
    axes = {} if axes is None else axes
    known: dict[str, WeightAxes] | None = given_axes(axes, params) or None
    all_known: dict[str, WeightAxes] = {}
    unused: tuple[str, ...] = ()
    # Axes that were found before need not be found again.
    if not any(isinstance(own, WeightAxes) for own in axes.values()):
        trace = _traced(loss_fn, params, samples if kept is None else kept, row)
        if trace is not None:
            all_known = trace.all_axes() | (known or {})
            known, unused = trace.axes() | (known or {}), trace.unused()
    chosen = masks is not None or prunable is not None
    if masks is None:
        masks = masks_.init_masks(params, prunable, known)
    elif prunable is not None:
        raise ValueError(
            f"prunable={prunable!r} together with masks, which say already what is "
            "prunable; give one of the two"
        )
    masks = masks_.check_masks(params, masks)
    # The tree's own order, whatever jit or a checkpoint has made of the dict's.
    masks = {path: masks[path] for path in leaves_by_path(params) if path in masks}
    order = blocks.flat_order(masks, all_known or known)
    if isinstance(goal.pattern, Pattern):
        sample = samples if kept is None else kept
        pattern = _of_network(goal.pattern, loss_fn, params, sample)
        goal = goal.replace(pattern=pattern)
        groups_of(pattern, order)  # refuses tensors that it does not fit
    means = _drawn(mean_samples, 0)
    return _Job(
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
        unused=() if chosen else tuple(p for p in unused if p not in masks),
    )


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
    return traced(loss_fn, params, next(regroup(samples, batch_size)))


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


def _drawn_again(job: _Job, samples: Any, mean_samples: Any, number: int) -> _Job:
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


def _levels(params: Params, job: _Job) -> list[Goal]:
    """The goal of every step on the way, from what the masks have now."""
    goal, number = job.goal, job.goal.recompute
    if not number:
        return [goal]
    if goal.sparsity is not None:
        _check_reachable(job)
        start = masks_.sparsity(job.masks)
        way = levels(start, goal.sparsity, number, goal.degree)
        return [goal.replace(sparsity=level) for level in way]
    assert goal.flops_target is not None
    if isinstance(goal.pattern, Pattern) and goal.pattern.structures is not None:
        found = goal.pattern.structures
        total = found.account(found.gone(job.masks)).left["macs"]
    else:
        costs = _costs(params, job)
        assert costs is not None
        total = costs.total
    way = levels(total / MILLION, goal.flops_target, number, goal.degree, 0.0)
    return [goal.replace(flops_target=level) for level in way]


def _check_reachable(job: _Job) -> None:
    if isinstance(job.goal.pattern, Pattern) and job.goal.pattern.kinds:
        return  # Whole structures may be beyond it already.
    active = blocks.flat_mask(job.order, job.masks)
    scopes.num_kept(active, job.order, job.goal)


def _costs(params: Params, job: _Job) -> Costs | None:
    pattern = job.goal.pattern
    structured = isinstance(pattern, Pattern) and pattern.kinds
    if structured or not job.goal.counts_macs:
        return None
    everything = job.goal.flops_target is not None
    return count_costs(
        job.loss_fn, params, job.masks, job.samples, all_layers=everything
    )


def _problem(params: Params, job: _Job) -> Problem:
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


# ------------------------------------------------------------------------ the one step


class _Weights(NamedTuple):
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


class _Outcome(NamedTuple):
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


@one_lapack_thread()
def _prune_once(params: Params, job: _Job) -> tuple[Params, Masks, PruneInfo]:
    """One step on checked arguments."""
    clock = Clock()
    pattern, order = job.goal.pattern, job.order
    groups = groups_of(pattern, order) if isinstance(pattern, Pattern) else None
    if job.goal.sparsity is not None and not job.goal.completes_pattern:
        _check_reachable(job)  # before work starts
    costs = _costs(params, job)
    params, masks = replicate((params, job.masks), job.compute.mesh)
    params, values, active, finite = to_vectors(params, masks, order)
    check_weights(finite)
    before = _Weights(params, values, active, costs, groups)
    job = job._replace(masks=masks)
    if isinstance(job.method, Sampled):
        problem = _problem(params, job)
        built = job.method.build(problem)
        targets = _targets(job)
        with built.curvature as curvature:
            clock.mark("gradients")
            done = None
            if isinstance(curvature, InverseFisher):
                done = _in_memory(curvature, before, targets, problem, job, clock)
            if done is None:
                done = _in_pieces(curvature, before, targets, problem, job, clock)
        report = {"needs": built.needs, **done.report}
    else:
        clock.mark("gradients")
        kept, scores = _ranked(Model(), before, job)
        clock.mark("curvature")
        done, report = _Outcome(values, kept, scores, {}), {}
    check_finite(done.weights, order, "the updated weights of", "the update")
    new_params, new_masks = from_vectors(params, done.weights, done.kept, order)
    new_masks = {path: new_masks[path] for path in order.paths}  # jit sorts dicts
    report |= _compared(before, done, job)
    report |= _looked_at(before, done, job, new_masks)
    if isinstance(job.method, Sampled) and report["empty_outputs"]:
        _check_still_finite(problem, new_params, report["empty_outputs"])
    jax.block_until_ready(new_params)
    clock.mark("update")
    return new_params, new_masks, _info(done.kept, job, clock, report)


def _in_memory(
    fisher: InverseFisher,
    before: _Weights,
    targets: np.ndarray,
    problem: Problem,
    job: _Job,
    clock: Clock,
) -> _Outcome | None:
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
    auto, repairs = row.damping == AUTO, _only_repairs(before, job)
    joint_later = repairs or (auto and row.moves and row.update == "joint")
    job.compute.report("pruning step", 0, 1)
    strength, grams, dampings = fisher.damping, None, []
    if auto:
        missing = _missing(before, targets, job)
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
        _check_scores(scores, job)
        report["saliency_sum"] = float(found.saliency_sum)
        report["untouched"] = _untouched(found.touched, before, job)
    clock.mark("curvature")
    if joint_later:
        if auto:
            grams = _damped_again(
                programs.choose, grams, dampings, before, kept, targets, job
            )
            strength = dampings[-1].damping
        move = partial(programs.update, kept, grams)
        change = move(strength)
        if change is None:
            return None
        weights = change
    if len(dampings) > 1:
        weights = _tried_dampings(
            weights, move, dampings, before, kept, targets, problem, job
        )
    if dampings:
        report["dampings"] = tuple(dampings)
    job.compute.report("pruning step", 1, 1)
    return _Outcome(weights, kept, scores, report)


class _Programs(NamedTuple):
    """The programs of a step whose gradients are in memory, with their arguments.

    Attributes:
        source: The gradients.
        before: The weights.
        targets: y, [N].
        job: The step.
    """

    source: InMemory
    before: _Weights
    targets: np.ndarray
    job: _Job

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


def _targets(job: _Job) -> np.ndarray:
    """y, [N], of the slope ``ḡ = -Gᵀy / N``; zero without one."""
    y: Any = 0.0
    if job.method.first_order:
        y = -1.0 if job.targets is None else job.targets
    return np.broadcast_to(np.asarray(y, np.float32), (job.num_samples,))


def _only_repairs(before: _Weights, job: _Job) -> bool:
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


def _in_pieces(
    curvature: Curvature,
    before: _Weights,
    targets: np.ndarray,
    problem: Problem,
    job: _Job,
    clock: Clock,
) -> _Outcome:
    """The step with what happens on the host between its formulas."""
    row, y = job.method, jnp.asarray(targets)
    report: dict[str, Any] = {}
    repairs = _only_repairs(before, job)
    dampings: list[ChosenDamping] = []
    if isinstance(row, WoodFisher) and row.damping == AUTO:
        assert isinstance(curvature, InverseFisher)
        missing = _missing(before, targets, job)
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
            report["untouched"] = _untouched(diagonal.touched, before, job)
        model = model_of(curvature, diagonal, slope, own)
        model = in_units(row, model, before.values, before.active)
        kept, scores = _ranked(model, before, job)
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

        curvature = _damped_again(choose, fisher, dampings, before, kept, targets, job)

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
        weights = _tried_dampings(
            weights, weights_with, dampings, before, kept, targets, problem, job
        )
        curvature = curvature.with_damping(dampings[-1].damping)
    model = model._replace(curvature=curvature)
    if dampings:
        report["dampings"] = tuple(dampings)
    if job.diagnostics:
        step = jnp.where(kept, weights, 0.0) - before.values
        report |= _predicted(step, model, problem)
        if job.targets is None:
            report["measured_loss_increase"] = _measured(weights, kept, before, problem)
    return _Outcome(weights, kept, scores, report)


def _slope(
    fisher: InverseFisher, targets: jax.Array, problem: Problem, job: _Job
) -> jax.Array:
    """ḡ of other samples, or of the Fisher's own rows [d]."""
    if job.mean_samples is not None:
        return _moments_of_others(problem, job.mean_samples).mean
    return fisher.slope(targets)


def _missing(before: _Weights, targets: np.ndarray, job: _Job) -> np.ndarray:
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


def _damped_again(
    choose: Callable[[jax.Array, Any, float], tuple[T, ChosenDamping]],
    known: T,
    dampings: list[ChosenDamping],
    before: _Weights,
    kept: jax.Array,
    targets: np.ndarray,
    job: _Job,
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
    if _only_repairs(before, job):
        dampings.append(dampings[0])  # chosen on the same weights
    elif pruned.any() or targets.any():
        # Less damping than chose the mask would step beyond where the model holds.
        known, chosen = choose(kept, pruned, dampings[0].multiple)
        dampings.append(chosen)
    return known


def _tried_dampings(
    weights: jax.Array,
    moved_by: Callable[[float], jax.Array | None],
    dampings: list[ChosenDamping],
    before: _Weights,
    kept: jax.Array,
    targets: np.ndarray,
    problem: Problem,
    job: _Job,
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


# ------------------------------------------------------------------- scores and masks


def _ranked(model: Model, before: _Weights, job: _Job) -> tuple[jax.Array, jax.Array]:
    """The mask, and the scores that it follows from, [d] each."""
    if before.groups is not None and model.curvature is None:
        # Groups take the squares of magnitudes.
        largest = jnp.max(jnp.where(before.active, jnp.abs(before.values), 0.0))
        model = model._replace(unit=power_of_two(1 / largest))
    scores = saliency(job.method, model, before.values, before.active)
    _check_scores(scores / model.unit / model.unit, job)
    if before.groups is None:
        kept = scopes.choose(
            scores, before.active, job.masks, job.order, job.goal, before.costs
        )
    else:
        kept, scores = _ranked_groups(model, scores, before, before.groups, job)
    return kept, scores / model.unit / model.unit


def _check_scores(scores: jax.Array, job: _Job) -> None:
    what = "its weights or its curvature"
    check_finite(scores, job.order, "the saliency of", what)


def _ranked_groups(
    model: Model, scores: jax.Array, before: _Weights, groups: Groups, job: _Job
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
        kept = scopes.keep_structures(
            values, active, job.masks, job.order, groups, goal
        )
        return kept, scores
    kept = scopes.choose(
        scores, active, job.masks, job.order, goal, before.costs, groups
    )
    return kept, scores


# ------------------------------------------------------------------------- diagnostics


def _info(
    kept: jax.Array, job: _Job, clock: Clock, report: dict[str, Any]
) -> PruneInfo:
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
    )._replace(**report)


def _compared(before: _Weights, done: _Outcome, job: _Job) -> dict[str, Any]:
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


def _untouched(touched: jax.Array, before: _Weights, job: _Job) -> dict[str, float]:
    return findings.untouched(np.asarray(touched), np.asarray(before.active), job.order)


def _looked_at(
    before: _Weights, done: _Outcome, job: _Job, masks: Masks
) -> dict[str, Any]:
    """What is left of tensors and outputs, and what has come back."""
    new = blocks.flat_mask(job.order, masks)
    gone = findings.emptied(np.asarray(before.active), new, job.order)
    texts = findings.messages(done.report.get("untouched", {}), gone, job.unused)
    was_zero = (np.asarray(before.values) == 0) & np.asarray(before.active)
    is_not = (np.asarray(done.weights) != 0) & np.asarray(done.kept)
    return {
        "empty_outputs": findings.outputs_without_inputs(new, job.order),
        "revived": int(np.count_nonzero(was_zero & is_not)),
        "warnings": tuple(texts),
    }


def _check_still_finite(
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
            "as weight normalisation does; add an epsilon to the norm there, or leave "
            "the tensors out with prunable",
        )


def _predicted(step: jax.Array, model: Model, problem: Problem) -> dict[str, Any]:
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


def _measured(
    weights: jax.Array, kept: jax.Array, before: _Weights, problem: Problem
) -> float:
    """By how much the loss of the curvature's samples has risen."""
    after, _ = from_vectors(before.params, weights, kept, problem.order)
    losses = [row_values(problem, params) for params in (before.params, after)]
    return float(np.mean(losses[1] - losses[0], dtype=np.float64))


def _moments_of(problem: Problem) -> Moments:
    """Moments of the problem's gradients, by a pass of their own."""
    needs, _ = plan_rows(problem, layouts=None, block_size=None)
    return moments(row_chunks(problem, needs.microbatch_size))


def _moments_of_others(problem: Problem, samples: Any) -> Moments:
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
