"""One pruning step: gradients, blocks, curvature, statistic, masks, update."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.pruning import blocks, curvature
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.fisher import SOLVERS, choose_solver
from woodfisher_jax.pruning.gradients import Gradients, LossFn, gradient_chunks
from woodfisher_jax.pruning.masks import Masks, Prunable
from woodfisher_jax.pruning.methods import Method, method_named, scope_of
from woodfisher_jax.pruning.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.pruning.samples import batch_length, num_examples, regroup

Progress = Callable[[str, int, int], None]
"""Called during long work with (label, done, total)."""


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


class _Settings(NamedTuple):
    """The arguments of :func:`prune` that its steps share, validated."""

    method: Method
    scope: str
    sparsity: float
    damping: float
    num_samples: int
    batch_size: int
    microbatch_size: int
    block_size: int | None
    scale_update: float
    solver: str
    progress: Progress | None


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
        block_size: c, weights a block; default whole tensors.
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
    _check_params(params)
    _check_sparsity(sparsity)
    row = method_named(method)
    scope = scope_of(method, scope)
    if masks is None:
        masks = masks_.init_masks(params, prunable)
    masks_.check_masks(params, masks)
    if row.curvature is None:
        samples, num_samples = None, 0
    else:
        _check_ranges(damping, num_samples, batch_size, microbatch_size, block_size)
        samples, num_samples = _count_samples(samples, num_samples, batch_size)
    if solver != "auto" and solver not in SOLVERS:
        raise ValueError(
            f"solver={solver!r}; expected 'auto' or one of {list(SOLVERS)}"
        )
    settings = _Settings(
        method=row,
        scope=scope,
        sparsity=float(sparsity),
        damping=float(damping),
        num_samples=num_samples,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        block_size=block_size,
        scale_update=float(scale_update),
        solver=solver,
        progress=progress,
    )
    order = blocks.flat_order(masks, axis_order)
    params = masks_.apply_masks(params, masks)
    return _prune_step(loss_fn, params, masks, samples, order, settings)


def _prune_step(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    order: blocks.FlatOrder,
    settings: _Settings,
) -> tuple[Params, Masks, PruneInfo]:
    row = settings.method
    layout = row.layout(order, settings.block_size) if row.layout else ()
    leaves = leaves_by_path(params)
    weights = blocks.flatten(order, {p: leaves[p] for p in order.paths})
    weights = weights.astype(jnp.float32)
    old_mask = blocks.flatten(order, masks)

    # 1 and 2: gradients, laid out by block as they arrive.
    clock = [time.perf_counter()]
    gradients: Any = None
    if row.curvature is not None:
        _check_loss(loss_fn, params, samples)
        chunks = _with_progress(
            gradient_chunks(
                loss_fn,
                params,
                masks,
                samples,
                num_samples=settings.num_samples,
                batch_size=settings.batch_size,
                microbatch_size=settings.microbatch_size,
            ),
            settings,
        )
        if row.curvature == "inverse":
            gradients = _store_by_block(chunks, order, layout, settings.num_samples)
        else:
            gradients = _mean_square(chunks, order, settings.num_samples)
        jax.block_until_ready(gradients)
    clock.append(time.perf_counter())

    # 3 to 5: curvature, statistic, masks.
    diagonal = None
    if row.curvature == "inverse":
        diagonal = _inverse_diagonal(gradients, order, layout, settings)
    elif row.curvature == "diagonal":
        diagonal = gradients
    scores = row.statistic(weights, *([] if diagonal is None else [diagonal]))
    _check_scores(scores, order)
    new_mask = _select(scores, old_mask, order, settings)
    clock.append(time.perf_counter())

    # 6: the others make up for the newly pruned.
    if row.direction is not None and settings.scale_update != 0:
        direction = row.direction(weights, diagonal, old_mask & ~new_mask)
        step = _inverse_product(gradients, direction, order, layout, settings)
        weights = weights + settings.scale_update * step
    new_params, new_masks = _rebuild(params, weights, new_mask, order)
    jax.block_until_ready(new_params)
    clock.append(time.perf_counter())

    nonzero, total = masks_.count(new_masks)
    info = PruneInfo(
        (total - nonzero) / total,
        nonzero,
        total,
        masks_.sparsity_by_path(new_masks),
        settings.num_samples,
        *np.diff(clock).tolist(),
    )
    return new_params, new_masks, info


# ------------------------------------------------------------------- steps 1 and 2


def _with_progress(chunks: Iterable[Gradients], settings: _Settings) -> Iterable:
    progress, done = settings.progress or (lambda label, done, total: None), 0
    progress("gradients", 0, settings.num_samples)
    for chunk in chunks:
        yield chunk
        done += len(next(iter(chunk.values())))
        progress("gradients", done, settings.num_samples)


@partial(jax.jit, donate_argnums=0)
def _store_rows(
    store: tuple[jax.Array, ...],
    rows: jax.Array,
    layout: tuple[jax.Array, ...],
    start: jax.Array,
) -> tuple[jax.Array, ...]:
    """Writes gradients [n, d] into the stores [num_blocks, N, c] from row ``start``."""
    return tuple(
        jax.lax.dynamic_update_slice(
            kept, jnp.moveaxis(blocks.gather(rows, group), 0, 1), (0, start, 0)
        )
        for kept, group in zip(store, layout, strict=True)
    )


def _store_by_block(
    chunks: Iterable[Gradients],
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    num_samples: int,
) -> tuple[jax.Array, ...]:
    """Gathers the gradients of all samples, for each group [num_blocks, N, c]."""
    store = tuple(
        jnp.zeros((len(group), num_samples, group.shape[1]), jnp.float32)
        for group in layout
    )
    indices = tuple(jnp.asarray(group) for group in layout)
    start = 0
    for chunk in chunks:
        rows = blocks.flatten(order, chunk)
        store = _store_rows(store, rows, indices, jnp.int32(start))
        start += len(rows)
    return store


def _mean_square(
    chunks: Iterable[Gradients], order: blocks.FlatOrder, num_samples: int
) -> jax.Array:
    """Diagonal of the empirical Fisher [d], without keeping any gradient."""
    total = jnp.zeros(order.size, jnp.float32)
    for chunk in chunks:
        rows = blocks.flatten(order, chunk)
        total = total + jnp.sum(rows * rows, axis=0)
    return total / num_samples


# ----------------------------------------------------------------------- steps 3 to 6


def _block_names(order: blocks.FlatOrder, group: np.ndarray) -> list[str]:
    tensors = np.searchsorted(order.offsets, group[:, 0], side="right") - 1
    return [order.paths[i] for i in tensors]


def _solver_for(gradients: jax.Array, settings: _Settings) -> str:
    if settings.solver != "auto":
        return settings.solver
    return choose_solver(*gradients.shape[1:])


def _counter(
    label: str, layout: blocks.Layout, progress: Progress | None
) -> Callable[[int], None]:
    """Adds up finished blocks over all groups and reports them."""
    done, total = 0, sum(len(group) for group in layout)

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(label, done, total)

    advance(0)
    return advance


def _inverse_diagonal(
    gradients: tuple[jax.Array, ...],
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    settings: _Settings,
) -> jax.Array:
    """diag(F⁻¹) as one flat vector [d]."""
    advance = _counter("curvature blocks", layout, settings.progress)
    found = tuple(
        curvature.inverse_diagonals(
            kept,
            settings.damping,
            _solver_for(kept, settings),
            _block_names(order, group),
            advance,
        )
        for kept, group in zip(gradients, layout, strict=True)
    )
    return blocks.scatter(layout, found, order.size)


def _inverse_product(
    gradients: tuple[jax.Array, ...],
    direction: jax.Array,
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    settings: _Settings,
) -> jax.Array:
    """F⁻¹ times a flat vector [d]."""
    advance = _counter("update blocks", layout, settings.progress)
    found = tuple(
        curvature.inverse_products(
            kept,
            settings.damping,
            blocks.gather(direction, group),
            _solver_for(kept, settings),
            _block_names(order, group),
            advance,
        )
        for kept, group in zip(gradients, layout, strict=True)
    )
    return blocks.scatter(layout, found, order.size)


def _select(
    scores: jax.Array,
    old_mask: jax.Array,
    order: blocks.FlatOrder,
    settings: _Settings,
) -> jax.Array:
    """The new flat mask: one threshold for all tensors, or one for each."""
    if settings.scope == "global":
        kept = masks_.num_kept(order.size, settings.sparsity)
        active = int(jnp.sum(old_mask))
        if kept > active:
            raise ValueError(
                f"sparsity={settings.sparsity} is below the "
                f"{1 - active / order.size:.6g} that masks have already; a pruned "
                "weight does not come back"
            )
        return masks_.keep_highest(scores, old_mask, jnp.int32(kept))
    parts = []
    for start, stop in pairwise(order.offsets):
        kept = masks_.num_kept(stop - start, settings.sparsity)
        part = slice(start, stop)
        parts.append(masks_.keep_highest(scores[part], old_mask[part], jnp.int32(kept)))
    return jnp.concatenate(parts)


def _rebuild(
    params: Params, weights: jax.Array, mask: jax.Array, order: blocks.FlatOrder
) -> tuple[Params, Masks]:
    leaves = leaves_by_path(params)
    tensors = blocks.unflatten(order, weights)
    _check_update(tensors)
    new_masks = blocks.unflatten(order, mask)
    cast = {path: t.astype(leaves[path].dtype) for path, t in tensors.items()}
    return masks_.apply_masks(replace_leaves(params, cast), new_masks), new_masks


# ------------------------------------------------------------------------- the checks


def _check_params(params: Params) -> None:
    for path, leaf in leaves_by_path(params).items():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params[{path!r}] has type {kind}; expected floating-point arrays "
                "only. Keep counters and indices out of params, in the closure of "
                "loss_fn for instance"
            )


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity}; expected a fraction in [0, 1), such as 0.9"
        )


def _check_ranges(
    damping: float,
    num_samples: int | None,
    batch_size: int,
    microbatch_size: int,
    block_size: int | None,
) -> None:
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping={damping}; expected a positive number, such as 1e-5")
    whole = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "microbatch_size": microbatch_size,
        "block_size": block_size,
    }
    for name, value in whole.items():
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"{name}={value}; expected a whole number, 1 or more")


def _count_samples(
    samples: Any, num_samples: int | None, batch_size: int
) -> tuple[Any, int]:
    """Samples that can be read more than once, and N."""
    if samples is None:
        raise ValueError("samples is missing; this method estimates curvature from it")
    total = num_examples(samples)
    if total is None and num_samples is None:
        samples = list(samples)
        total = num_examples(samples)
    if total is None and num_samples is not None:
        # An iterator can be read once only, and the loss is checked on an example.
        needed = num_samples * batch_size
        taken: list = []
        for batch in regroup(samples, min(needed, 1024)):
            taken.append(batch)
            if sum(batch_length(b) for b in taken) >= needed:
                break
        samples, total = taken, sum(batch_length(b) for b in taken)
    assert total is not None
    wanted = total // batch_size if num_samples is None else num_samples
    if wanted < 1 or wanted * batch_size > total:
        raise ValueError(
            f"samples hold {total} examples, but num_samples={num_samples} gradients "
            f"of batch_size={batch_size} need {max(wanted, 1) * batch_size}; give more "
            "examples or lower one of the two"
        )
    return samples, wanted


def _check_loss(loss_fn: LossFn, params: Params, samples: Any) -> None:
    example = next(regroup(samples, 1))
    shape = jax.eval_shape(loss_fn, params, example)
    if not hasattr(shape, "shape") or shape.shape != ():
        raise TypeError(
            "loss_fn must return a scalar, the mean loss over the batch; for a batch "
            f"of one example it returned {shape}"
        )


def _check_scores(scores: jax.Array, order: blocks.FlatOrder) -> None:
    if bool(jnp.all(jnp.isfinite(scores))):
        return
    for path, tensor in blocks.unflatten(order, scores).items():
        if not bool(jnp.all(jnp.isfinite(tensor))):
            raise ValueError(
                f"the saliency of {path!r} is not finite; its weights or its curvature "
                "overflow float32. Scale the loss, or look for weights that are nan"
            )


def _check_update(tensors: dict[str, jax.Array]) -> None:
    for path, tensor in tensors.items():
        if not bool(jnp.all(jnp.isfinite(tensor))):
            raise ValueError(
                f"the updated weights of {path!r} are not finite; raise damping or "
                "lower scale_update"
            )
