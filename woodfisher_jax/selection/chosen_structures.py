"""Which structures go, by the saliencies of their groups."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.accounts import cheapest, lowest_of_each
from woodfisher_jax.selection.costs import MILLION
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees.blocks import FlatOrder, flat_mask
from woodfisher_jax.trees.masks import Masks, num_kept


def check_structures(
    masks: Masks, order: FlatOrder, groups: Groups, goal: Goal
) -> None:
    """Refuses a goal that whole structures cannot meet, one of each family staying.

    Args:
        masks: Before the step.
        order: The flat order.
        groups: With units and structures.
        goal: With a sparsity or a target of MACs.

    Raises:
        OptionError: With what is left then.
    """
    found, pattern = groups.structures, goal.pattern
    assert found is not None
    assert isinstance(pattern, Pattern)
    gone = found.gone({path: np.asarray(mask) for path, mask in masks.items()})
    account = found.account(gone, order.paths)
    for units in found.units:
        left = [unit for unit in units if unit not in gone]
        for unit in left[1:]:
            if unit in groups.units:
                account.remove(unit)
    fewest = account.left
    reason = "one structure stays of each row of wf.structures(net_fn, params, inputs)"
    if goal.flops_target is not None:
        least = fewest["macs"] / MILLION
        if goal.flops_target < least:
            raise OptionError(
                "flops_target",
                f"flops_target={goal.flops_target} million multiply-accumulates with "
                f"pattern={pattern.name!r}; expected more than {least:.4g}, for "
                f"{reason}; or make more tensors prunable",
            )
    elif goal.scope != "layer" and goal.sparsity is not None:
        kept = num_kept(order.size, goal.sparsity)
        number = round(fewest["size"])
        if kept < number:
            most = math.floor(1e4 * (1 - number / order.size)) / 1e4
            raise OptionError(
                "sparsity",
                f"sparsity={goal.sparsity} with pattern={pattern.name!r} leaves "
                f"{kept:,} of {order.size:,} prunable weights; expected at most "
                f"{most:g} ({number:,} weights), for {reason}; or make more tensors "
                "prunable",
            )


def keep_structures(
    saliencies: Any,
    active: jax.Array,
    masks: Masks,
    order: FlatOrder,
    groups: Groups,
    goal: Goal,
) -> jax.Array:
    """The mask without whole structures, those of the lowest saliency for their cost.

    With a sparsity the cost is prunable weights, and structures go until no more than
    the goal's number stay; in layer scope the same share of each family goes, by
    saliency alone. With MACs the cost is MACs.

    Args:
        saliencies: Of groups, [groups, 1].
        active: Weights that are not pruned [d], bool.
        masks: The same by path.
        order: The flat order.
        groups: With units and structures.
        goal: With a scope.

    Raises:
        OptionError: If structures alone cannot meet the goal.
    """
    found = groups.structures
    assert found is not None
    values = np.asarray(saliencies, np.float64)[:, 0]
    losses = {unit: max(values[group], 0.0) for unit, group in groups.units.items()}
    gone = found.gone({path: np.asarray(mask) for path, mask in masks.items()})
    if goal.flops_target is not None:
        budget = {"macs": goal.flops_target * MILLION}
        gone = cheapest(found.units, losses, found.account(gone), budget, gone)
    elif goal.scope == "layer":
        assert goal.sparsity is not None
        gone = lowest_of_each(found.units, losses, goal.sparsity, gone)
    else:
        account = found.account(gone, order.paths)
        assert goal.sparsity is not None
        # Whole structures may be beyond the goal already, and then none goes.
        most = num_kept(order.size, goal.sparsity)
        gone = cheapest(found.units, losses, account, {"size": most}, gone)
    kept = {path: jnp.asarray(m) for path, m in found.masks(masks, gone).items()}
    return active & jnp.asarray(flat_mask(order, kept))
