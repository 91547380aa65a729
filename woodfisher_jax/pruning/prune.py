"""One pruning step: gradients, blocks, curvature, statistic, masks, update."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.pruning import blocks, resources
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.gradients import (
    Gradients,
    LossFn,
    as_partial,
    gradient_chunks,
)
from woodfisher_jax.pruning.inverse import InverseFisher
from woodfisher_jax.pruning.masks import Masks, Prunable
from woodfisher_jax.pruning.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.pruning.resources import Needs
from woodfisher_jax.pruning.settings import (
    Progress,
    Settings,
    check_loss,
    check_params,
    check_settings,
)
from woodfisher_jax.pruning.sharding import replicate
from woodfisher_jax.pruning.store import mean_square


class PruneInfo(NamedTuple):
    """What one pruning step did.

    Attributes:
        sparsity: Fraction of the prunable weights that are zero now.
        nonzero: How many prunable weights stay.
        prunable: How many prunable weights there are.
        sparsity_by_path: Sparsity of each prunable parameter.
        num_samples: N, gradients that the curvature was estimated from; 0 for methods
            without one.
        seconds_gradients: Wall time of the gradients.
        seconds_curvature: Wall time of the curvature's diagonal, scores and masks.
        seconds_update: Wall time of the update of the remaining weights.
        needs: What the step was planned to take; None without gradients.
    """

    sparsity: float
    nonzero: int
    prunable: int
    sparsity_by_path: dict[str, float]
    num_samples: int
    seconds_gradients: float
    seconds_curvature: float
    seconds_update: float
    needs: Needs | None = None


def prune(
    loss_fn: LossFn | None,
    params: Params,
    samples: Any = None,
    *,
    sparsity: float,
    method: str = "woodfisherblock",
    masks: Masks | None = None,
    prunable: Prunable = None,
    scope: str | None = None,
    damping: float = 1e-5,
    num_samples: int | None = None,
    batch_size: int = 1,
    microbatch_size: int | None = None,
    block_size: int | None = None,
    scale_update: float = 1.0,
    solver: str = "auto",
    store: str = "auto",
    store_dtype: str = "float32",
    store_dir: str | Path | None = None,
    memory_limit: float | None = None,
    mesh: Mesh | None = None,
    axis_order: blocks.AxisOrder = blocks.output_major,
    progress: Progress | None = None,
) -> tuple[Params, Masks, PruneInfo]:
    """Prunes a network to a sparsity in one step and adjusts the weights that stay.

    The weights with the lowest saliency go, ``ρ_q = w_q² / (2 [F⁻¹]_qq)``, and the
    others move by ``δw = -Σ_q w_q F⁻¹ e_q / [F⁻¹]_qq``, where F = λ I + (1/N) Σ g gᵀ is
    the damped empirical Fisher of the loss (other methods: see
    :data:`~woodfisher_jax.pruning.methods.METHODS`).

    Args:
        loss_fn: (params, batch) -> scalar, the mean loss over the batch. Use
            ``jax.tree_util.Partial(loss, arrays)`` where it depends on more arrays.
            None will do for methods by magnitude.
        params: Any pytree of floating-point arrays.
        samples: One batch (array, tuple or dict of arrays with a leading axis of
            examples), or an iterable of batches. Methods by magnitude need none.
        sparsity: Fraction of all prunable weights to be zero afterwards, in [0, 1).
        method: A name from the table; default "woodfisherblock".
        masks: What is pruned already, path -> bool; default nothing. It also says what
            is prunable. Pruned weights never come back.
        prunable: Predicate on (path, array) or regular expression on paths, if no masks
            are given; default arrays of two or more dimensions.
        scope: "global" (one threshold) or "layer" (the sparsity in each tensor);
            default the method's own.
        damping: λ, added to the Fisher's diagonal; default 1e-5.
        num_samples: N, gradients in the Fisher; default as many as samples give.
        batch_size: m, examples each gradient is the mean over; default 1.
        microbatch_size: Most examples whose gradients a device forms at once; default
            64, or as many as fit.
        block_size: c, weights a block; default whole tensors, or for "woodfisher" all
            tensors in one block.
        scale_update: Factor on δw; 0 leaves the other weights where they are.
        solver: "auto", or a key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
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
        axis_order: How the entries of a tensor follow one another in blocks.
        progress: Called with (label, done, total) during long work.

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``.

    Raises:
        ValueError: If an argument is out of range or samples are too few.
        TypeError: If params are not floating point or loss_fn does not return a scalar.
        CurvatureError: If the Fisher is too ill conditioned; nothing is changed then.
        MemoryLimitError: If the step cannot fit in memory; it says what would.
        StoreError: If the disk cannot hold the gradients.

    References:
        Singh & Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340.
    """
    settings, samples, masks, order = _checked(
        params,
        samples,
        masks=masks,
        prunable=prunable,
        axis_order=axis_order,
        sparsity=sparsity,
        method=method,
        scope=scope,
        damping=damping,
        num_samples=num_samples,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        block_size=block_size,
        scale_update=scale_update,
        solver=solver,
        store=store,
        store_dtype=store_dtype,
        store_dir=store_dir,
        memory_limit=memory_limit,
        mesh=mesh,
        progress=progress,
    )
    return _prune(loss_fn, params, masks, samples, order, settings)


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
        The needs; None for a method without gradients.

    Raises:
        ValueError: If an argument is out of range or samples are too few.
        MemoryLimitError: If the step cannot fit in memory; it says what would.
    """
    settings, samples, masks, order = _checked(params, samples, **options)
    row = settings.method
    if row.curvature is None:
        return None
    assert loss_fn is not None
    layout = row.layout(order, settings.block_size) if row.layout else ()
    loss = as_partial(loss_fn)
    return resources.plan(loss, params, masks, samples, order, layout, settings)[0]


def _checked(
    params: Params,
    samples: Any,
    *,
    masks: Masks | None = None,
    prunable: Prunable = None,
    axis_order: blocks.AxisOrder = blocks.output_major,
    **options: Any,
) -> tuple[Settings, Any, Masks, blocks.FlatOrder]:
    """Settings, samples, masks in the tree's order, and the flat order."""
    check_params(params)
    settings, samples = check_settings(samples, **options)
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
    return settings, samples, masks, blocks.flat_order(masks, axis_order)


def _prune(
    loss_fn: LossFn | None,
    params: Params,
    masks: Masks,
    samples: Any,
    order: blocks.FlatOrder,
    settings: Settings,
) -> tuple[Params, Masks, PruneInfo]:
    """The six steps, on checked arguments."""
    kept = _num_kept(masks, order, settings)
    row, needs = settings.method, None
    clock = _Clock()
    params, masks = replicate((params, masks), settings.mesh)
    params, weights, old_mask = _flat(params, masks, order)
    _check_weights(params)
    with ExitStack() as stack:
        # 1 and 2: gradients, laid out by block as they arrive.
        inverse = diagonal = None
        if row.curvature is not None:
            assert loss_fn is not None
            check_loss(loss_fn, params, samples)
            loss = replicate(as_partial(loss_fn), settings.mesh)
            layout = row.layout(order, settings.block_size) if row.layout else ()
            needs, storage = resources.plan(
                loss, params, masks, samples, order, layout, settings
            )
            gradients = partial(
                _gradients,
                loss,
                params,
                masks,
                samples,
                settings,
                needs.microbatch_size,
            )
            if storage is not None:
                inverse = stack.enter_context(
                    InverseFisher(gradients, storage, settings)
                )
            else:
                squares = mean_square(gradients(order), settings.num_samples)
                diagonal = blocks.flatten(order, squares)
        jax.block_until_ready(diagonal)
        clock.mark(inverse)

        # 3 to 5: curvature, statistic, masks.
        if inverse is not None:
            diagonal = inverse.diagonal()
        new_mask, scores = _select(
            weights, diagonal, old_mask, kept, order, row.statistic, settings.scope
        )
        _check_finite(scores, order, "the saliency of", "its weights or its curvature")
        clock.mark(inverse)

        # 6: the others make up for the newly pruned.
        if inverse is not None and row.direction and settings.scale_update != 0:
            direction = _direction(weights, diagonal, old_mask, new_mask, row.direction)
            weights = weights + settings.scale_update * inverse.product(direction)
            _check_finite(weights, order, "the updated weights of", "the update")
    new_params, new_masks = _unflat(params, weights, new_mask, order)
    new_masks = {path: new_masks[path] for path in order.paths}  # jit sorts dicts
    jax.block_until_ready(new_params)
    clock.mark(inverse)
    return new_params, new_masks, _info(new_masks, settings, clock, needs)


def _num_kept(
    masks: Masks, order: blocks.FlatOrder, settings: Settings
) -> tuple[int, ...]:
    """How many weights stay: one number in all, or one for each tensor.

    Raises:
        ValueError: If the masks keep fewer already, in layer scope in every tensor.
    """
    if settings.scope == "layer":
        sizes = np.diff(order.offsets).tolist()
        active = [masks_.count({path: masks[path]})[0] for path in order.paths]
    else:
        sizes, active = [order.size], [masks_.count(masks)[0]]
    kept = [masks_.num_kept(size, settings.sparsity) for size in sizes]
    if all(k > a for k, a in zip(kept, active, strict=True)):
        raise ValueError(
            f"sparsity={settings.sparsity} is below the "
            f"{1 - sum(active) / order.size:.6g} that masks have already; a pruned "
            "weight does not come back"
        )
    return tuple(kept)


class _Clock:
    """Wall time of the phases; gradients formed within another count as gradients."""

    def __init__(self) -> None:
        self.marks = [(time.perf_counter(), 0.0)]

    def mark(self, inverse: InverseFisher | None) -> None:
        """Ends a phase."""
        forming = inverse.seconds_gradients if inverse else 0.0
        self.marks.append((time.perf_counter(), forming))

    def phases(self) -> tuple[float, float, float]:
        """Seconds for gradients, curvature and update."""
        seconds, forming = np.diff(np.asarray(self.marks), axis=0).T
        first, second, third = seconds - [0, *forming[1:]]
        return float(first + forming[1:].sum()), float(second), float(third)


def _info(
    masks: Masks, settings: Settings, clock: _Clock, needs: Needs | None
) -> PruneInfo:
    nonzero, prunable = masks_.count(masks)
    gradients, curvature_, update = clock.phases()
    return PruneInfo(
        sparsity=(prunable - nonzero) / prunable,
        nonzero=nonzero,
        prunable=prunable,
        sparsity_by_path=masks_.sparsity_by_path(masks),
        num_samples=settings.num_samples,
        seconds_gradients=gradients,
        seconds_curvature=curvature_,
        seconds_update=update,
        needs=needs,
    )


# ------------------------------------------------- between pytrees and flat vectors


@partial(jax.jit, static_argnames="order")
def _flat(
    params: Params, masks: Masks, order: blocks.FlatOrder
) -> tuple[Params, jax.Array, jax.Array]:
    """Masked params, their prunable weights [d] in float32 and the mask [d]."""
    params = masks_.apply_masks(params, masks)
    leaves = leaves_by_path(params)
    weights = {path: leaves[path].astype(jnp.float32) for path in order.paths}
    return params, blocks.flatten(order, weights), blocks.flatten(order, masks)


@partial(jax.jit, static_argnames="order")
def _unflat(
    params: Params, weights: jax.Array, mask: jax.Array, order: blocks.FlatOrder
) -> tuple[Params, Masks]:
    leaves = leaves_by_path(params)
    masks = blocks.unflatten(order, mask)
    new = {
        path: tensor.astype(leaves[path].dtype)
        for path, tensor in blocks.unflatten(order, weights).items()
    }
    return masks_.apply_masks(replace_leaves(params, new), masks), masks


@jax.jit
def _finite(params: Params) -> dict[str, jax.Array]:
    return {p: jnp.all(jnp.isfinite(a)) for p, a in leaves_by_path(params).items()}


def _check_weights(params: Params) -> None:
    for path, finite in _finite(params).items():
        if not finite:
            raise ValueError(
                f"params[{path!r}] holds nan or inf where it is not masked; expected "
                "finite weights"
            )


def _check_finite(
    vector: jax.Array, order: blocks.FlatOrder, what: str, cause: str
) -> None:
    finite = np.isfinite(np.asarray(vector))
    if not finite.all():
        entry = int(np.argmin(finite))
        tensor = int(np.searchsorted(order.offsets, entry, side="right")) - 1
        raise ValueError(
            f"{what} {order.paths[tensor]!r} is not finite: {cause} overflows float32 "
            "or is nan. Look for weights that are nan, raise damping or scale the loss"
        )


# ------------------------------------------------------------------ steps 1 and 2


def _gradients(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    settings: Settings,
    microbatch_size: int,
    order: blocks.FlatOrder,
) -> Iterator[Gradients]:
    """Gradient chunks of some tensors, with progress."""
    chunks = gradient_chunks(
        loss_fn,
        params,
        {path: masks[path] for path in order.paths},
        samples,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        microbatch_size=microbatch_size,
        mesh=settings.mesh,
    )
    done = 0
    settings.progress("gradients", 0, settings.num_samples)
    for chunk in chunks:
        yield chunk
        done += len(next(iter(chunk.values())))
        settings.progress("gradients", done, settings.num_samples)


# ------------------------------------------------------------------- steps 3 to 6


@partial(jax.jit, static_argnames="direction")
def _direction(
    weights: jax.Array,
    diagonal: jax.Array,
    old_mask: jax.Array,
    new_mask: jax.Array,
    direction: Callable[..., jax.Array],
) -> jax.Array:
    """The vector b of the update [d]."""
    return direction(weights, diagonal, old_mask & ~new_mask)


@partial(jax.jit, static_argnames=("order", "statistic", "scope"))
def _select(
    weights: jax.Array,
    diagonal: jax.Array | None,
    old_mask: jax.Array,
    kept: tuple[int, ...],
    order: blocks.FlatOrder,
    statistic: Callable[..., jax.Array],
    scope: str,
) -> tuple[jax.Array, jax.Array]:
    """The new mask [d] and the scores [d] that it was chosen by."""
    scores = statistic(weights) if diagonal is None else statistic(weights, diagonal)
    bounds = [0, order.size] if scope == "global" else order.offsets
    parts = [
        masks_.keep_highest(scores[start:stop], old_mask[start:stop], number)
        for (start, stop), number in zip(pairwise(bounds), kept, strict=True)
    ]
    return jnp.concatenate(parts), scores
