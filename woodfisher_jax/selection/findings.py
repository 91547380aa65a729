"""What a step should be looked at for: no gradient before it, nothing left after it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from woodfisher_jax.equations.damping import NO_GRADIENTS
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import most_sparse

SHOWN = 8
"""Names of tensors in one message, at most."""


def untouched(
    touched: np.ndarray, active: np.ndarray, order: FlatOrder
) -> dict[str, float]:
    """Share of each tensor's weights of which no sample knows anything.

    Args:
        touched: Weights that some sample knows something of [d], bool.
        active: Weights that are not pruned [d], bool.
        order: The flat order.

    Returns:
        From path to a share of the active weights; 0 where there are none.

    Raises:
        ValueError: If no sample knows anything of any weight.
    """
    unknown = active & ~touched
    if active.any() and np.array_equal(unknown, active):
        raise ValueError(NO_GRADIENTS)
    return {
        path: float(np.sum(unknown[start:stop]) / max(1, np.sum(active[start:stop])))
        for path, (start, stop) in zip(
            order.paths, pairwise(order.offsets), strict=True
        )
    }


def emptied(before: np.ndarray, after: np.ndarray, order: FlatOrder) -> dict[str, int]:
    """The layers whose last weights a step has removed.

    Args:
        before: The mask before the step [d], bool.
        after: The mask after it [d], bool.
        order: The flat order.

    Returns:
        How many weights each has, by its name of :attr:`FlatOrder.layer_ranges`.
    """
    return {
        name: stop - start
        for name, (start, stop) in order.layer_ranges.items()
        if before[start:stop].any() and not after[start:stop].any()
    }


def outputs_without_inputs(mask: np.ndarray, order: FlatOrder) -> dict[str, int]:
    """How many outputs of each tensor have no weight left, where there are any.

    Args:
        mask: What is left [d], bool.
        order: The flat order; tensors of unknown axes are left out.

    Example:
        >>> order = wf.blocks.flat_order({"kernel": jnp.ones((2, 2))})
        >>> mask = np.array([True, True, False, False])
        >>> wf.selection.findings.outputs_without_inputs(mask, order)
        {'kernel': 1}
    """
    found = {}
    ranges = pairwise(order.offsets)
    for path, axes, (start, stop) in zip(order.paths, order.axes, ranges, strict=True):
        if axes.roles and stop > start:
            layers, outputs, _, _ = axes.sizes
            left = mask[start:stop].reshape(layers * outputs, -1).any(axis=1)
            if gone := int(np.sum(~left)):
                found[path] = gone
    return found


def messages(
    unknown: Mapping[str, float],
    gone: Mapping[str, int],
    unused: Sequence[str],
    in_each: bool = False,
) -> list[str]:
    """What is said of a step, one sentence each.

    Args:
        unknown: Of :func:`untouched`.
        gone: Of :func:`emptied`.
        unused: Tensors that would be prunable by default, if the loss read them.
        in_each: Whether a sparsity of each layer was asked for.
    """
    found = []
    if unused:
        found.append(
            f"loss_fn does not use {_names(unused)}, which stay as they are; say what "
            "is prunable if that is meant"
        )
    if silent := [path for path, share in unknown.items() if share == 1]:
        found.append(
            f"no sample has a gradient for {_names(silent)}: their weights are ranked "
            "as if the loss did not depend on them. Leave them out of prunable, or "
            "look for stop_gradient, an unused layer, batch norm in training mode or "
            "too few samples"
        )
    if gone:
        ways = "lower sparsity, leave them out of prunable, or use scope='layer'"
        if in_each:
            most = most_sparse(min(gone.values()))
            level = f"{most}, which leaves one in each" if most else "0"
            ways = f"lower sparsity to {level}, or leave them out of prunable"
        found.append(f"no weight is left of {_names(list(gone))}; {ways}")
    return found


def stay_sparser(names: Sequence[str], sparsity: float) -> str:
    """What is said of layers of which masks leave less than a sparsity does.

    Args:
        names: Of the layers.
        sparsity: That each layer, or all together, were to have.
    """
    return (
        f"masks leave fewer weights of {_names(names)} than sparsity={sparsity} does, "
        "and a pruned weight does not come back: these layers stay as sparse as they "
        "are, and all together are sparser than asked for; lower sparsity to balance "
        "that, or prune the dense params without masks"
    )


def _names(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:SHOWN]))
    return shown + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
