"""What a step should be looked at for: no gradient before it, nothing left after it."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from woodfisher_jax.trees.blocks import FlatOrder

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
        raise ValueError(
            "no weight has a gradient (a curvature, for naivehess) in any of the "
            "samples, or its square is below 1e-38, so that they rank nothing. With "
            "batch norm in training mode or a contrastive loss the gradient of one "
            "example is zero: use running averages, or batch_size above 1. Else look "
            "for stop_gradient, or a loss_fn that does not use its params"
        )
    return {
        path: float(np.sum(unknown[start:stop]) / max(1, np.sum(active[start:stop])))
        for path, (start, stop) in zip(
            order.paths, pairwise(order.offsets), strict=True
        )
    }


def emptied(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> list[str]:
    """The tensors whose last weights a step has removed.

    Args:
        before: Masks before the step.
        after: Masks after it.
    """
    return [p for p, mask in after.items() if not mask.any() and before[p].any()]


def outputs_without_inputs(
    masks: Mapping[str, np.ndarray], output_axes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many outputs of each tensor have no weight left, where there are any.

    Args:
        masks: From path to bool.
        output_axes: The axis of a tensor's outputs; default the last of tensors of two
            or more axes, as in kernels (..., in, out). A tensor without one is left
            out.

    Example:
        >>> kernel = jnp.array([[True, False], [True, False]])
        >>> wf.selection.findings.outputs_without_inputs({"kernel": kernel})
        {'kernel': 1}
    """
    if output_axes is None:
        output_axes = {path: -1 for path, mask in masks.items() if mask.ndim > 1}
    found = {}
    for path, axis in output_axes.items():
        outputs = np.moveaxis(masks[path], axis, 0).reshape(masks[path].shape[axis], -1)
        if gone := int(np.sum(~outputs.any(axis=1))):
            found[path] = gone
    return found


def messages(unknown: Mapping[str, float], gone: list[str]) -> list[str]:
    """What is said of a step, one sentence each.

    Args:
        unknown: Of :func:`untouched`.
        gone: Of :func:`emptied`.
    """
    found = []
    if silent := [path for path, share in unknown.items() if share == 1]:
        found.append(
            f"no sample has a gradient for {_names(silent)}: their weights are ranked "
            "as if the loss did not depend on them. Leave them out of prunable, or "
            "look for stop_gradient, an unused layer or too few samples"
        )
    if gone:
        found.append(
            f"no weight is left of {_names(gone)}; lower sparsity, leave them out of "
            "prunable, or use scope='layer'"
        )
    return found


def _names(paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:SHOWN]))
    return shown + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
