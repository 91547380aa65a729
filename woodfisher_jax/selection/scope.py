"""Which weights stay: scores made into a mask."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.costs import (
    MILLION,
    Costs,
    flops_factors,
    keep_within_macs,
)
from woodfisher_jax.selection.findings import stay_sparser
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.tracing.macs import flat_costs
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.blocks import FlatOrder, flat_mask
from woodfisher_jax.trees.masks import Masks


def bounds_of(order: FlatOrder, scope: str) -> tuple[int, ...]:
    """Where the ranges of the flat vector start and end that share a threshold."""
    return (0, order.size) if scope == "global" else order.layers


def num_kept(active: np.ndarray, order: FlatOrder, goal: Goal) -> tuple[int, ...]:
    """How many weights stay: one number in all, or one for each layer.

    Args:
        active: Weights that are not pruned [d], bool.
        order: The flat order.
        goal: With a sparsity and a scope.

    Raises:
        OptionError: If fewer are left already, in layer scope in every layer.
    """
    assert goal.sparsity is not None
    assert goal.scope is not None
    ranges = list(pairwise(bounds_of(order, goal.scope)))
    kept = [masks_.num_kept(stop - start, goal.sparsity) for start, stop in ranges]
    left = num_active(active, order, goal.scope)
    if all(k > n for k, n in zip(kept, left, strict=True)):
        raise OptionError(
            "sparsity",
            f"sparsity={goal.sparsity} is below the {1 - sum(left) / order.size:.6g} "
            "that masks have already; a pruned weight does not come back",
        )
    return tuple(kept)


def check_some_left(order: FlatOrder, goal: Goal) -> None:
    """Raises if a sparsity leaves no weight: in all, or in layer scope of any layer.

    Args:
        order: The flat order.
        goal: With a sparsity and a scope.

    Raises:
        OptionError: Naming the weights, and the largest sparsity that leaves one.
    """
    assert goal.sparsity is not None
    number, of = order.size, f"all tensors, {order.paths[0]!r} and others"
    if goal.scope == "layer":
        sizes = {n: stop - start for n, (start, stop) in order.layer_ranges.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        number, of = sizes[largest], f"{largest!r}, the largest layer"
    elif len(order.paths) == 1:
        of = repr(order.paths[0])
    if masks_.num_kept(number, goal.sparsity):
        return
    if number == 1:
        raise OptionError(
            "sparsity",
            f"sparsity={goal.sparsity} leaves nothing, for {of} has a single prunable "
            "weight; expected sparsity=0, or tensors of more weights in prunable",
        )
    raise OptionError(
        "sparsity",
        f"sparsity={goal.sparsity} leaves none of the {number} prunable weights of "
        f"{of}; expected at most {masks_.most_sparse(number)}, which leaves one",
    )


def sparser_layers(order: FlatOrder, masks: Masks, goal: Goal) -> list[str]:
    """What is said of layers of which masks leave less than a sparsity in each does.

    Args:
        order: The flat order.
        masks: By path.
        goal: With a scope; over all layers none is, for one takes more of the others.
    """
    if goal.scope != "layer" or goal.sparsity is None or goal.pattern is not None:
        return []
    active = flat_mask(order, masks)
    more = {
        name: np.count_nonzero(active[start:stop])
        - masks_.num_kept(stop - start, goal.sparsity)
        for name, (start, stop) in order.layer_ranges.items()
    }
    names = [name for name, number in more.items() if number < 0]
    # Where no weight is left to go, the step only moves the others, or is refused.
    some = names and max(more.values()) > 0
    return [stay_sparser(names, goal.sparsity)] if some else []


def num_active(active: np.ndarray, order: FlatOrder, scope: str) -> list[int]:
    """How many weights are not pruned: in all, or in each layer."""
    ranges = pairwise(bounds_of(order, scope))
    return [int(np.count_nonzero(active[start:stop])) for start, stop in ranges]


@partial(jax.jit, static_argnames=("bounds", "tensors"))
def keep(
    scores: jax.Array,
    active: jax.Array,
    kept: tuple[jax.Array | int, ...],
    bounds: tuple[int, ...],
    tensors: tuple[int, ...],
) -> jax.Array:
    """The mask of the highest scores, a number of them in each range.

    Args:
        scores: Finite [d].
        active: Weights that may stay [d], bool.
        kept: How many stay in each range.
        bounds: Where the ranges start, and last d.
        tensors: Where the tensors start, which share out equal scores, and last d.

    Returns:
        The new mask [d], nested in ``active``.
    """
    parts = [
        masks_.keep_highest(
            scores[start:stop],
            active[start:stop],
            jnp.asarray(number),
            tuple(bound - start for bound in tensors if start <= bound <= stop),
        )
        for (start, stop), number in zip(pairwise(bounds), kept, strict=True)
    ]
    return jnp.concatenate(parts)


def choose(
    scores: jax.Array,
    active: jax.Array,
    masks: Masks,
    order: FlatOrder,
    goal: Goal,
    costs: Costs | None = None,
    groups: Groups | None = None,
) -> jax.Array:
    """The new mask [d]: the highest scores, as many as sparsity or MACs allow.

    With ``flops_power`` the scores are first divided by that power of what the weights
    cost; see :func:`~woodfisher_jax.selection.costs.flops_factors`.

    Args:
        scores: Saliency, finite [d].
        active: Weights that may stay [d], bool.
        masks: The same by path.
        order: The flat order.
        goal: With a scope.
        costs: For the options that need them.
        groups: What stays or goes together, scored alike; default single weights.

    Raises:
        ValueError: If the goal cannot be met; a pruned weight does not come back.
    """
    assert goal.scope is not None
    if costs is not None and goal.flops_power > 0:
        factors = flops_factors(
            costs.per_weight,
            masks,
            goal.flops_power,
            per_parameter=goal.flops_per_parameter,
            rescale=goal.flops_normalize,
        )
        divided = np.asarray(scores, np.float64) * flat_costs(order, factors)
        # Relative to the largest, since a power of MACs may leave float32.
        scores = jnp.asarray(divided / (divided.max() or 1.0), jnp.float32)
    if goal.flops_target is None:
        kept = num_kept(np.asarray(active), order, goal)
        if groups is not None:
            return _keep_groups(scores, active, kept, groups)
        return keep(scores, active, kept, bounds_of(order, goal.scope), order.offsets)
    assert costs is not None
    cut = keep_within_macs(
        scores,
        active,
        flat_costs(order, costs.per_weight),
        goal.flops_target * MILLION,
        other_macs=costs.other,
        bounds=order.offsets,
    )
    return jnp.asarray(cut.mask)


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
    if groups.structures is not None:
        # What goes with a structure is not counted again.
        own = np.isin(np.arange(groups.number), list(groups.units.values()))
        each = np.where(own, each, 0.0)
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
        ranked = _ranked(mine, each, groups)
        left = active[mine].sum() - np.cumsum(more[ranked])
        chosen[ranked[: np.searchsorted(-left, -most) + 1]] = True
    return chosen


def _ranked(mine: np.ndarray, values: np.ndarray, groups: Groups) -> np.ndarray:
    """Some groups from the lowest value up, equal ones of all tensors by turns."""
    sizes = np.bincount(groups.layers)
    in_order = np.argsort(groups.layers, kind="stable")
    place = np.empty(groups.number, int)
    place[in_order] = np.arange(groups.number) - np.repeat(
        np.cumsum(sizes) - sizes, sizes
    )
    return mine[np.lexsort((place[mine] / sizes[groups.layers[mine]], values[mine]))]


def _in_scope(
    groups: Groups, kept: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, int]]:
    """All groups with one number, or those of each tensor with its own."""
    for tensor, most in enumerate(kept):
        mine = (groups.layers == tensor) | (len(kept) == 1)
        yield np.flatnonzero(mine), most


def _keep_groups(
    scores: jax.Array,
    active: jax.Array,
    kept: tuple[int, ...],
    groups: Groups,
) -> jax.Array:
    """Whole groups from the highest score down, as long as all their weights fit.

    In layer scope those of each tensor; equal scores are shared out over tensors, and
    in a tensor groups of lower number stay.
    """
    may_stay = np.asarray(active)
    number = np.bincount(groups.of, may_stay, groups.number)
    # Equal scores of a group add up without rounding, and their mean is exact.
    sums = np.bincount(groups.of, np.where(may_stay, scores, 0.0), groups.number)
    means = sums / np.maximum(number, 1)
    stays = np.zeros(groups.number, bool)
    for mine, most in _in_scope(groups, kept):
        ranked = _ranked(mine, -means, groups)
        ranked = ranked[number[ranked] > 0]
        stays[ranked[np.cumsum(number[ranked]) <= most]] = True
    return jnp.asarray(stays[groups.of] & may_stay)
