"""One pruning step: gradients, blocks, curvature, statistic, masks, update."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from woodfisher_jax.curvature import operators
from woodfisher_jax.info import PruneInfo, joined
from woodfisher_jax.recompute import levels
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.inputs import (
    check_loss,
    check_mean_samples,
    check_params,
    check_targets,
)
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.selection.patterns import GroupNames, groups_of
from woodfisher_jax.selection.scope import MILLION, count_costs, num_kept
from woodfisher_jax.settings import Progress, Settings, check_samples, check_settings
from woodfisher_jax.step import Examples, prune_step
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.masks import Masks, Prunable
from woodfisher_jax.trees.paths import Params, leaves_by_path


def prune(
    loss_fn: LossFn | None,
    params: Params,
    samples: Any = None,
    *,
    sparsity: float | None = None,
    method: str = "woodfisherblock",
    masks: Masks | None = None,
    prunable: Prunable = None,
    scope: str | None = None,
    pattern: str | GroupNames | None = None,
    flops_target: float | None = None,
    flops_power: float = 0.0,
    flops_per_parameter: bool = False,
    flops_normalize: str = "none",
    damping: float | str = 1e-5,
    weight_decay: float = 0.0,
    centered: bool = False,
    mean_samples: Any = None,
    targets: Any = None,
    pi: bool = False,
    hessian: str = "exact",
    num_probes: int = 64,
    probe_seed: int = 0,
    num_samples: int | None = None,
    batch_size: int = 1,
    microbatch_size: int | None = None,
    block_size: int | None = None,
    update: str = "sum",
    scale_update: float = 1.0,
    normalize_update: float | None = None,
    swaps: int = 0,
    recompute: int = 0,
    recompute_schedule: str = "linear",
    recompute_degree: float | None = None,
    solver: str = "auto",
    store: str = "auto",
    store_dtype: str = "float32",
    store_dir: str | Path | None = None,
    memory_limit: float | None = None,
    mesh: Mesh | None = None,
    diagnostics: bool = False,
    axis_order: blocks.AxisOrder = blocks.output_major,
    progress: Progress | None = None,
) -> tuple[Params, Masks, PruneInfo]:
    """Prunes a network to a sparsity in one step and adjusts the weights that stay.

    The weights with the lowest saliency go, ``ρ_q = w_q² / (2 [F⁻¹]_qq)``, and the
    others move by ``δw = -Σ_q w_q F⁻¹ e_q / [F⁻¹]_qq``, where F = λ I + (1/N) Σ g gᵀ is
    the damped empirical Fisher of the loss (other methods: see
    :data:`~woodfisher_jax.methods.METHODS`).

    Args:
        loss_fn: (params, batch) -> scalar, the mean loss over the batch. Use
            ``jax.tree_util.Partial(loss, arrays)`` where it depends on more arrays.
            None will do for methods by magnitude.
        params: Any pytree of floating-point arrays.
        samples: One batch (array, tuple or dict of arrays with a leading axis of
            examples), or an iterable of batches, which is kept in memory unless it is
            :class:`woodfisher_jax.trees.samples.Examples`; or a function of the
            number of the recomputation (from 0) that returns such samples anew. Methods
            by magnitude need none, but with FLOP options one example.
        sparsity: Fraction of all prunable weights to be zero afterwards, in [0, 1); or
            ``flops_target``. Default that of a pattern N:M; less leaves groups as they
            are where it would cost most.
        method: A name from the table; default "woodfisherblock".
        masks: What is pruned already, path -> bool; default nothing. It also says what
            is prunable. Pruned weights never come back.
        prunable: Predicate on (path, array) or regular expression on paths, if no masks
            are given; default arrays of two or more dimensions.
        scope: "global" (one threshold) or "layer" (the sparsity in each tensor);
            default the method's own.
        pattern: What stays or goes together, scored by its joint statistic: "2:4" (any
            N:M of consecutive inputs), "4x1" (any block of inputs by outputs),
            "filters", "heads:6" (attention heads), or a function (path, shape) ->
            group numbers; see :func:`~woodfisher_jax.selection.patterns.parse`. Default
            None, single weights.
        flops_target: Instead of a sparsity: millions of multiply-accumulates for one
            example to be left, in prunable layers and others; default None.
        flops_power: a, by which saliencies are divided by MACs^a of their layer, so
            that costly layers go first; default 0.
        flops_per_parameter: Whether a layer counts by the MACs of one of its weights
            instead of all; default False.
        flops_normalize: "log" for the binary logarithm of the MACs; default "none".
        damping: λ, added to the Fisher's diagonal; default 1e-5. "auto" for the one
            by which each gradient is best predicted from the others; see
            :mod:`~woodfisher_jax.equations.damping`.
        weight_decay: That of training; added to the damping; default 0.
        centered: Take the covariance of the gradients, F - ḡḡᵀ, in place of F; default
            False.
        mean_samples: Examples for ḡ alone in methods of first order, all of which are
            used, in the forms of ``samples``; default the same.
        targets: y, [N], for methods of first order: values by which the rows are to
            change, so that ``ḡ = -Gᵀy / N``; with gradients of ``r · f(w, x)`` the
            step moves the outputs f by as much along r. One number for all is the mean
            gradient times it; default -1.
        pi: For kfac, split the damping by the traces of the factors; default False.
        hessian: For naivehess, "exact" or "hutchinson"; default "exact".
        num_probes: P, vectors of random signs of "hutchinson"; default 64.
        probe_seed: Of these signs; default 0.
        num_samples: N, gradients in the Fisher; default as many as samples give.
        batch_size: m, examples each gradient is the mean over; default 1.
        microbatch_size: Most examples whose gradients a device forms at once; default
            64, or as many as fit.
        block_size: c, weights a block; default whole tensors, or for "woodfisher" all
            tensors in one block.
        update: How the other weights move: "sum", the paper's, as if each weight went
            alone; "joint", to the minimum of the quadratic model with all of them gone
            (methods with blocks); "none". Default "sum".
        scale_update: Factor on δw; 0 leaves the other weights where they are.
        normalize_update: Largest norm of δw in a tensor, in norms of its weights; a
            longer δw is shortened. Default None, no limit.
        swaps: Most rounds in which weights that would go take the places of weights
            that would stay, while the model loss of the joint update falls; see
            :mod:`~woodfisher_jax.equations.swaps`. Default 0; 20 is plenty.
        recompute: R, how often the curvature is computed again on the way to the
            target, at R sparsities between; default 0.
        recompute_schedule: "linear", "poly" for long steps first, or "exponential" for
            the same share of what is left at each; default "linear".
        recompute_degree: Exponent of "poly"; default 3.
        solver: "auto", or a key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
        store: Where gradients wait between statistic and update: "device", "host",
            "disk", or "recompute" (nowhere: they are formed twice, for a part of the
            weights at a time); default the first that fits.
        store_dtype: "float32" or "bfloat16", which halves the room and rounds the
            gradients to three digits; default "float32".
        store_dir: Parent of the folder for gradients on disk; default the system's
            folder for temporary files.
        memory_limit: Most bytes of memory to take; default what is free.
        mesh: Devices to spread samples and blocks over, the same in every process;
            default one.
        diagnostics: Whether ``info`` has what costs extra; default False.
        axis_order: How the entries of a tensor follow one another in blocks.
        progress: Called with (label, done, total) during long work.

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``.

    Raises:
        ValueError: If an argument is out of range or makes no sense for the method, a
            network cannot be counted or captured, or samples are too few.
        TypeError: If params are not floating point or loss_fn does not return a scalar.
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
    settings, examples, masks, order = _checked(
        params,
        _drawn(samples, 0),
        _drawn(mean_samples, 0),
        targets=targets,
        masks=masks,
        prunable=prunable,
        axis_order=axis_order,
        sparsity=sparsity,
        method=method,
        scope=scope,
        pattern=pattern,
        flops_target=flops_target,
        flops_power=flops_power,
        flops_per_parameter=flops_per_parameter,
        flops_normalize=flops_normalize,
        damping=damping,
        weight_decay=weight_decay,
        centered=centered,
        pi=pi,
        hessian=hessian,
        num_probes=num_probes,
        probe_seed=probe_seed,
        num_samples=num_samples,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        block_size=block_size,
        update=update,
        scale_update=scale_update,
        normalize_update=normalize_update,
        swaps=swaps,
        recompute=recompute,
        recompute_schedule=recompute_schedule,
        recompute_degree=recompute_degree,
        solver=solver,
        store=store,
        store_dtype=store_dtype,
        store_dir=store_dir,
        memory_limit=memory_limit,
        mesh=mesh,
        diagnostics=diagnostics,
        progress=progress,
    )
    goals = _goals(loss_fn, params, masks, examples, order, settings)
    infos = []
    for i, goal in enumerate(goals):
        if i and (callable(samples) or callable(mean_samples)):
            again = _drawn(samples, i) if callable(samples) else examples.curvature
            others = _drawn(mean_samples, i) if callable(mean_samples) else None
            examples = Examples(
                check_samples(goal, again, settings.num_samples)[1],
                examples.mean if others is None else check_mean_samples(others),
            )
        params, masks, info = prune_step(loss_fn, params, masks, examples, order, goal)
        infos.append(info)
    return params, masks, joined(infos)


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
    mean_samples = _drawn(options.pop("mean_samples", None), 0)
    settings, examples, masks, order = _checked(
        params, _drawn(samples, 0), mean_samples, **options
    )
    if settings.method.curvature is None:
        return None
    loss = as_partial(check_loss(loss_fn, params, examples.curvature))
    problem = operators.Problem(
        loss, params, masks, *examples, order=order, settings=settings
    )
    return operators.plan(problem)


def _drawn(samples: Any, index: int) -> Any:
    """Samples as they are, or those that a function returns for a recomputation."""
    return samples(index) if callable(samples) else samples


def _checked(
    params: Params,
    samples: Any,
    mean_samples: Any,
    *,
    targets: Any = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    axis_order: blocks.AxisOrder = blocks.output_major,
    **options: Any,
) -> tuple[Settings, Examples, Masks, blocks.FlatOrder]:
    """Settings, samples, masks in the tree's order, and the flat order."""
    check_params(params)
    settings, samples = check_settings(
        samples, mean_samples=mean_samples, targets=targets, **options
    )
    if masks is None:
        masks = masks_.init_masks(params, prunable)
    elif prunable is not None:
        raise ValueError(
            f"prunable={prunable!r} together with masks, which say already what is "
            "prunable; give one of the two"
        )
    masks_.check_masks(params, masks)
    # The tree's own order, whatever jit or a checkpoint has made of the dict's.
    masks = {path: masks[path] for path in leaves_by_path(params) if path in masks}
    others = None if mean_samples is None else check_mean_samples(mean_samples)
    rows = None if targets is None else check_targets(targets, settings.num_samples)
    examples = Examples(samples, others, rows)
    order = blocks.flat_order(masks, axis_order)
    if settings.pattern is not None:
        groups_of(settings.pattern, order)  # refuses tensors that it does not fit
    return settings, examples, masks, order


def _goals(
    loss_fn: LossFn | None,
    params: Params,
    masks: Masks,
    examples: Examples,
    order: blocks.FlatOrder,
    settings: Settings,
) -> list[Settings]:
    """The settings of every step on the way, from what the masks have now."""
    if not settings.recompute:
        return [settings]
    number, degree = settings.recompute, settings.recompute_degree
    if settings.sparsity is not None:
        num_kept(masks, order, settings)  # refuses a target that is passed already
        start = masks_.sparsity(masks)
        way = levels(start, settings.sparsity, number, degree)
        return [settings._replace(sparsity=level) for level in way]
    costs = count_costs(loss_fn, params, masks, examples.curvature, settings)
    assert costs is not None
    assert settings.flops_target is not None
    way = levels(costs.total / MILLION, settings.flops_target, number, degree, 0.0)
    return [settings._replace(flops_target=level) for level in way]
