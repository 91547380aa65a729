"""The driver of pruning steps, one after another."""

from collections.abc import Mapping
from typing import Any

import jax

from woodfisher_jax.curvature.method import Method, Sampled
from woodfisher_jax.driver.job import (
    Job,
    checked_job,
    drawn_again,
    levels_of,
    problem_of,
)
from woodfisher_jax.driver.one_step import prune_once
from woodfisher_jax.info import (
    PruneInfo,
    is_unwarned,
    joined,
    warn_of,
    warn_of_texts,
    with_warnings,
)
from woodfisher_jax.methods import DEFAULT, check_names
from woodfisher_jax.rows.compute import Compute, watched
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.rows.inputs import check_no_shapes
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.sharding import auto_axes, outside_mesh, placed_as
from woodfisher_jax.selection.named_patterns import GroupNames
from woodfisher_jax.selection.scope import sparser_layers
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.prunable import Prunable
from woodfisher_jax.trees.samples import regroup


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
            ``jax.tree_util.Partial(loss, arrays)`` where it depends on more arrays: as
            under ``jax.jit``, what it closes over is read at its first call only.
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
            tracing the loss; without a loss arrays of two or more dimensions, and
            one with a name as of an embedding or a position is refused.
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
        have the sharding that they came with, as have their masks. They are JAX's
        arrays, so that float64 of NumPy is float32 unless ``jax_enable_x64`` is set.

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
    check_names(options, DEFAULT if method is None else method, prune)
    check_no_shapes(params)
    given = params
    loss_fn, params, masks = auto_axes((loss_fn, params, masks))
    job = checked_job(
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
        sparsity=sparsity,
        scope=scope,
        pattern=pattern,
        **options,
    )
    # An outer call looks itself, at its own function and the goal of all its steps.
    said = [] if is_unwarned() else _oddities(params, job)
    warn_of_texts(
        said, stacklevel=4
    )  # The caller's line: two decorators are in between.
    infos = []
    masks = job.masks
    for number, level in enumerate(levels_of(params, job)):
        again = job._replace(masks=masks, goal=level)
        if number:
            again = drawn_again(again, samples, mean_samples, number)
        params, masks, info = prune_once(params, again)
        infos.append(info)
    params = jax.tree.map(placed_as, params, given)
    leaves = leaves_by_path(params)
    masks = {path: placed_as(mask, leaves[path]) for path, mask in masks.items()}
    warn_of(infos, stacklevel=4)
    return params, masks, joined(with_warnings(infos, said))


def _oddities(params: Params, job: Job) -> list[str]:
    """What is warned of before the first step."""
    found = sparser_layers(job.order, job.masks, job.goal)
    if job.loss_fn is not None and isinstance(job.method, Sampled):
        few = next(regroup(job.samples, 2))
        found += training_mode("loss_fn", job.loss_fn, params, few, outputs=False)
    return found


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
    method = options.get("method")
    check_names(options, DEFAULT if method is None else method, plan_pruning, prune)
    loss_fn, params = auto_axes((loss_fn, params))
    job = checked_job(loss_fn, params, samples, caller="wf.plan_pruning", **options)
    if not isinstance(job.method, Sampled):
        return None
    return job.method.plan(problem_of(params, job))
