"""Which weights stay: scores and what weights cost, made into a mask."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.settings import Settings
from woodfisher_jax.tracing.macs import (
    flat_costs,
    flops_factors,
    keep_within_macs,
    macs_per_weight,
    sparse_macs,
)
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import regroup


def num_kept(masks: Masks, order: FlatOrder, settings: Settings) -> tuple[int, ...]:
    """How many weights stay: one number in all, or one for each tensor.

    Raises:
        ValueError: If the masks keep fewer already, in layer scope in every tensor.
    """
    assert settings.sparsity is not None
    in_layers = settings.scope == "layer"
    sizes = np.diff(order.offsets).tolist() if in_layers else [order.size]
    active = _num_active(masks, order, settings)
    kept = [masks_.num_kept(size, settings.sparsity) for size in sizes]
    if all(k > a for k, a in zip(kept, active, strict=True)):
        raise ValueError(
            f"sparsity={settings.sparsity} is below the "
            f"{1 - sum(active) / order.size:.6g} that masks have already; a pruned "
            "weight does not come back"
        )
    return tuple(kept)


def _num_active(masks: Masks, order: FlatOrder, settings: Settings) -> list[int]:
    """How many weights there are now: in all, or in each tensor."""
    if settings.scope == "layer":
        return [masks_.count({path: masks[path]})[0] for path in order.paths]
    return [masks_.count(masks)[0]]


def nothing_goes(masks: Masks, order: FlatOrder, settings: Settings) -> bool:
    """Whether a step only moves the weights that are left, so that none is ranked.

    So it is where they are as few as they are to be, and the update is the joint one,
    which unlike the sum of single updates knows nothing of saliencies.
    """
    others = (settings.pattern, settings.swaps, settings.diagnostics)
    if settings.sparsity is None or settings.update != "joint" or any(others):
        return False
    active = _num_active(masks, order, settings)
    kept = num_kept(masks, order, settings)
    return all(k >= a for k, a in zip(kept, active, strict=True))


@partial(jax.jit, static_argnames="statistic")
def saliency(
    weights: jax.Array,
    diagonal: jax.Array | None,
    active: jax.Array,
    statistic: Callable[..., jax.Array],
) -> jax.Array:
    """The statistic of every weight [d]; 0 where one is pruned already.

    Args:
        weights: [d].
        diagonal: Of the curvature [d]; None for methods without one.
        active: Weights that are not pruned [d], bool.
        statistic: Of the method.
    """
    if diagonal is None:
        return statistic(weights)
    # A pruned weight need not be in any block.
    return statistic(weights, jnp.where(active, diagonal, 1.0))


def choose(
    scores: jax.Array,
    active: jax.Array,
    masks: Masks,
    order: FlatOrder,
    costs: Costs | None,
    settings: Settings,
    groups: Groups | None = None,
) -> jax.Array:
    """The new mask [d]: the highest scores, as many as sparsity or MACs allow.

    With ``flops_power`` the scores are first divided by that power of what the weights
    cost; see :func:`~woodfisher_jax.tracing.macs.flops_factors`.

    Args:
        scores: Saliency, finite [d].
        active: Weights that may stay [d], bool.
        masks: The same by path.
        order: The flat order.
        costs: For the options that need them.
        settings: Of the step.
        groups: What stays or goes together, scored alike; default single weights.

    Raises:
        ValueError: If the goal cannot be met; a pruned weight does not come back.
    """
    if costs is not None and settings.flops_power > 0:
        factors = flops_factors(
            costs.per_weight,
            masks,
            settings.flops_power,
            per_parameter=settings.flops_per_parameter,
            rescale=settings.flops_normalize,
        )
        divided = np.asarray(scores, np.float64) * flat_costs(order, factors)
        # Relative to the largest, for a power of MACs may leave float32.
        scores = jnp.asarray(divided / (divided.max() or 1.0), jnp.float32)
    if settings.flops_target is None:
        kept = num_kept(masks, order, settings)
        if groups is not None:
            return _keep_groups(scores, active, kept, groups)
        return _keep(scores, active, kept, order, settings.scope)
    assert costs is not None
    cut = keep_within_macs(
        scores,
        active,
        flat_costs(order, costs.per_weight),
        settings.flops_target * MILLION,
        other_macs=costs.other,
    )
    return jnp.asarray(cut.mask)


@partial(jax.jit, static_argnames=("order", "scope"))
def _keep(
    scores: jax.Array,
    active: jax.Array,
    kept: tuple[int, ...],
    order: FlatOrder,
    scope: str,
) -> jax.Array:
    bounds = [0, order.size] if scope == "global" else order.offsets
    parts = [
        masks_.keep_highest(scores[start:stop], active[start:stop], number)
        for (start, stop), number in zip(pairwise(bounds), kept, strict=True)
    ]
    return jnp.concatenate(parts)


# ----------------------------------------------------------------------------- groups


def sums_of_single(scores: jax.Array, groups: Groups) -> np.ndarray:
    """The statistic of groups whose weights do not know of each other.

    Args:
        scores: Saliency of single weights, 0 where one is pruned already [d].
        groups: Of the pattern.

    Returns:
        Sums over the weights that would go [groups, choices], float64.
    """
    single = np.asarray(scores, np.float64)
    if groups.removals is None:
        return np.bincount(groups.of, single, groups.number)[:, None]
    table = _by_slot(single, groups)
    goes = np.zeros((len(groups.removals), table.shape[1]))
    np.put_along_axis(goes, groups.removals, 1.0, axis=1)
    return table @ goes.T


def _by_slot(values: np.ndarray, groups: Groups) -> np.ndarray:
    """Values of the weights of N:M, [groups, M]."""
    table = np.zeros((groups.number, groups.slots.max() + 1), values.dtype)
    table[groups.of, groups.slots] = values
    return table


def shared(saliencies: Any, active: jax.Array, groups: Groups) -> jax.Array:
    """The saliency of whole groups as one score for each of their weights [d].

    Groups of different sizes compete by their saliency an active weight.

    Args:
        saliencies: Of groups, [groups, 1].
        active: Weights that are not pruned [d], bool.
        groups: Of the pattern.
    """
    may_go = np.asarray(active)
    number = np.bincount(groups.of, may_go, groups.number)
    each = np.asarray(saliencies, np.float64)[:, 0] / np.maximum(number, 1)
    return jnp.asarray(np.where(may_go, each[groups.of], 0.0), jnp.float32)


def choose_of_each(
    saliencies: Any,
    scores: jax.Array,
    active: jax.Array,
    groups: Groups,
    goal: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The mask of N:M: of each group goes what raises the loss least.

    Short of the pattern's own sparsity, groups where that is cheapest come first.

    Args:
        saliencies: Of what may go together, [groups, choices].
        scores: Of single weights [d].
        active: Weights that may stay [d], bool.
        groups: Of the pattern.
        goal: How many weights may stay, in all or in each tensor; default N a group.

    Returns:
        The new mask [d], in which at most N weights of a group stay; and the scores,
        those that go sharing the saliency of what goes.
    """
    assert groups.removals is not None
    may_stay = np.asarray(active)
    pruned = _by_slot(~may_stay, groups)
    values = np.array(saliencies)
    # What is pruned already costs nothing, and ties must not take others for it.
    some = np.flatnonzero(pruned.any(axis=1))
    taken = pruned[some][:, groups.removals].sum(axis=2)
    best = taken == taken.max(axis=1, keepdims=True)
    values[some] = np.where(best, values[some], np.inf)
    choice = np.argmin(values, axis=1)
    gone = np.zeros(pruned.shape, bool)
    np.put_along_axis(gone, groups.removals[choice], True, axis=1)
    lowest = np.take_along_axis(values, choice[:, None], axis=1)[:, 0]
    if goal is not None:
        more = np.sum(gone & ~pruned, axis=1)
        gone[~_cheapest(lowest, more, np.sum(~pruned, axis=1), groups, goal)] = False
    kept = may_stay & ~gone[groups.of, groups.slots]
    number = np.bincount(groups.of, may_stay & ~kept, groups.number)
    each = (lowest / np.maximum(number, 1))[groups.of]
    mixed = np.where(may_stay & ~kept, each, np.asarray(scores, np.float64))
    return jnp.asarray(kept), jnp.asarray(mixed, jnp.float32)


def _cheapest(
    saliencies: np.ndarray,
    more: np.ndarray,
    active: np.ndarray,
    groups: Groups,
    goal: tuple[int, ...],
) -> np.ndarray:
    """Groups that obey first, so many that no more weights stay than the goal says.

    Args:
        saliencies: Of what goes for it [groups].
        more: How many weights that is [groups].
        active: How many are not pruned [groups].
        groups: Of the pattern.
        goal: How many weights may stay, in all or in each tensor.
    """
    chosen = np.zeros(groups.number, bool)
    each = saliencies / np.maximum(more, 1)
    for mine, most in _in_scope(groups, goal):
        ranked = mine[np.argsort(each[mine], kind="stable")]
        left = active[mine].sum() - np.cumsum(more[ranked])
        chosen[ranked[: np.searchsorted(-left, -most) + 1]] = True
    return chosen


def _in_scope(
    groups: Groups, kept: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, int]]:
    """All groups with one number, or those of each tensor with its own."""
    for tensor, most in enumerate(kept):
        mine = (groups.tensors == tensor) | (len(kept) == 1)
        yield np.flatnonzero(mine), most


def _keep_groups(
    scores: jax.Array,
    active: jax.Array,
    kept: tuple[int, ...],
    groups: Groups,
) -> jax.Array:
    """Whole groups from the highest score down, as long as all their weights fit.

    In layer scope those of each tensor; of equal scores, groups of lower number stay.
    """
    may_stay = np.asarray(active)
    number = np.bincount(groups.of, may_stay, groups.number)
    # Equal scores of a group add up without rounding, and their mean is exact.
    sums = np.bincount(groups.of, np.where(may_stay, scores, 0.0), groups.number)
    means = sums / np.maximum(number, 1)
    stays = np.zeros(groups.number, bool)
    for mine, most in _in_scope(groups, kept):
        ranked = mine[np.argsort(-means[mine], kind="stable")]
        ranked = ranked[number[ranked] > 0]
        stays[ranked[np.cumsum(number[ranked]) <= most]] = True
    return jnp.asarray(stays[groups.of] & may_stay)
