"""One pruning step: gradients, blocks, curvature, statistic, masks, update."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.pruning import blocks, curvature
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.fisher import choose_solver
from woodfisher_jax.pruning.gradients import Gradients, LossFn, gradient_chunks
from woodfisher_jax.pruning.masks import Masks, Prunable
from woodfisher_jax.pruning.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.pruning.settings import (
    Progress,
    Settings,
    check_loss,
    check_params,
    check_settings,
)
from woodfisher_jax.pruning.store import Store, gradients_by_block, mean_square


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
    """

    sparsity: float
    nonzero: int
    prunable: int
    sparsity_by_path: dict[str, float]
    num_samples: int
    seconds_gradients: float
    seconds_curvature: float
    seconds_update: float


def prune(
    loss_fn: LossFn,
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
    microbatch_size: int = 64,
    block_size: int | None = None,
    scale_update: float = 1.0,
    solver: str = "auto",
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
        microbatch_size: Most examples whose gradients are formed at once; default 64.
        block_size: c, weights a block; default whole tensors, or for "woodfisher" all
            tensors in one block.
        scale_update: Factor on δw; 0 leaves the other weights where they are.
        solver: "auto", or a key of :data:`~woodfisher_jax.pruning.fisher.SOLVERS`.
        axis_order: How the entries of a tensor follow one another in blocks.
        progress: Called with (label, done, total) during long work.

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``.

    Raises:
        ValueError: If an argument is out of range or samples are too few.
        TypeError: If params are not floating point or loss_fn does not return a scalar.
        CurvatureError: If the Fisher is too ill conditioned; nothing is changed then.

    References:
        Singh & Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340.
    """
    check_params(params)
    settings, samples = check_settings(
        samples,
        method=method,
        scope=scope,
        sparsity=sparsity,
        damping=damping,
        num_samples=num_samples,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        block_size=block_size,
        scale_update=scale_update,
        solver=solver,
        progress=progress,
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
    order = blocks.flat_order(masks, axis_order)
    return _prune(loss_fn, params, masks, samples, order, settings)


def _prune(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    order: blocks.FlatOrder,
    settings: Settings,
) -> tuple[Params, Masks, PruneInfo]:
    """The six steps, on checked arguments."""
    kept = _num_kept(masks, order, settings)
    row = settings.method
    layout = row.layout(order, settings.block_size) if row.layout else ()
    clock = [time.perf_counter()]

    # 1 and 2: gradients, laid out by block as they arrive.
    params, weights, old_mask = _flat(params, masks, order)
    _check_weights(params)
    store: Store = ()
    diagonal = None
    if row.curvature is not None:
        check_loss(loss_fn, params, samples)
        chunks = _gradients(loss_fn, params, masks, samples, settings)
        if row.curvature == "inverse":
            store = gradients_by_block(chunks, order, layout, settings.num_samples)
        else:
            squares = mean_square(chunks, settings.num_samples)
            diagonal = blocks.flatten(order, squares)
    jax.block_until_ready((store, diagonal))
    clock.append(time.perf_counter())

    # 3 to 5: curvature, statistic, masks.
    if row.curvature == "inverse":
        diagonal = _inverse_diagonal(store, order, layout, settings)
    new_mask, scores = _select(
        weights, diagonal, old_mask, kept, order, row.statistic, settings.scope
    )
    _check_finite(scores, order, "the saliency of", "its weights or its curvature")
    clock.append(time.perf_counter())

    # 6: the others make up for the newly pruned.
    if row.direction is not None and settings.scale_update != 0:
        directions = _directions(
            weights, diagonal, old_mask, new_mask, layout, row.direction
        )
        steps = _inverse_products(store, directions, order, layout, settings)
        weights = _moved(weights, steps, layout, settings.scale_update)
        _check_finite(weights, order, "the updated weights of", "the update")
    new_params, new_masks = _unflat(params, weights, new_mask, order)
    new_masks = {path: new_masks[path] for path in order.paths}  # jit sorts dicts
    jax.block_until_ready(new_params)
    clock.append(time.perf_counter())
    return new_params, new_masks, _info(new_masks, settings, clock)


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


def _info(masks: Masks, settings: Settings, clock: list[float]) -> PruneInfo:
    nonzero, prunable = masks_.count(masks)
    gradients, curvature_, update = np.diff(clock).tolist()
    return PruneInfo(
        sparsity=(prunable - nonzero) / prunable,
        nonzero=nonzero,
        prunable=prunable,
        sparsity_by_path=masks_.sparsity_by_path(masks),
        num_samples=settings.num_samples,
        seconds_gradients=gradients,
        seconds_curvature=curvature_,
        seconds_update=update,
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
) -> Iterator[Gradients]:
    """Gradient chunks, with progress."""
    chunks = gradient_chunks(
        loss_fn,
        params,
        masks,
        samples,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        microbatch_size=settings.microbatch_size,
    )
    done = 0
    settings.progress("gradients", 0, settings.num_samples)
    for chunk in chunks:
        yield chunk
        done += len(next(iter(chunk.values())))
        settings.progress("gradients", done, settings.num_samples)


# ------------------------------------------------------------------- steps 3 to 6


def _block_names(order: blocks.FlatOrder, group: np.ndarray) -> list[str]:
    tensors = np.searchsorted(order.offsets, group[:, 0], side="right") - 1
    return [order.paths[i] for i in tensors]


def _solver_for(gradients: jax.Array, settings: Settings) -> str:
    if settings.solver != "auto":
        return settings.solver
    return choose_solver(*gradients.shape[1:])


def _counter(
    label: str, layout: blocks.Layout, progress: Progress
) -> Callable[[int], None]:
    """Adds up finished blocks over all groups and reports them."""
    done, total = 0, sum(len(group) for group in layout)

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        progress(label, done, total)

    advance(0)
    return advance


def _inverse_diagonal(
    store: Store,
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    settings: Settings,
) -> jax.Array:
    """diag(F⁻¹) as one flat vector [d]."""
    advance = _counter("curvature blocks", layout, settings.progress)
    found = tuple(
        curvature.inverse_diagonals(
            gradients,
            settings.damping,
            _solver_for(gradients, settings),
            _block_names(order, group),
            advance,
        )
        for gradients, group in zip(store, layout, strict=True)
    )
    return _scatter(layout, found, order.size)


def _inverse_products(
    store: Store,
    vectors: tuple[jax.Array, ...],
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    settings: Settings,
) -> tuple[jax.Array, ...]:
    """F⁻¹ times a vector in blocks, for each group [num_blocks, c]."""
    advance = _counter("update blocks", layout, settings.progress)
    return tuple(
        curvature.inverse_products(
            gradients,
            settings.damping,
            vector,
            _solver_for(gradients, settings),
            _block_names(order, group),
            advance,
        )
        for gradients, vector, group in zip(store, vectors, layout, strict=True)
    )


@partial(jax.jit, static_argnames="direction")
def _directions(
    weights: jax.Array,
    diagonal: jax.Array,
    old_mask: jax.Array,
    new_mask: jax.Array,
    layout: blocks.Layout,
    direction: Callable[..., jax.Array],
) -> tuple[jax.Array, ...]:
    """The vector b of the update, cut into blocks."""
    vector = direction(weights, diagonal, old_mask & ~new_mask)
    return tuple(blocks.gather(vector, group) for group in layout)


@jax.jit
def _moved(
    weights: jax.Array,
    steps: tuple[jax.Array, ...],
    layout: blocks.Layout,
    scale: jax.Array,
) -> jax.Array:
    """Weights [d] after the scaled update."""
    return weights + scale * blocks.scatter(layout, steps, weights.shape[0])


_scatter = jax.jit(blocks.scatter, static_argnames="size")


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
