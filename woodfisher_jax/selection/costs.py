"""What weights cost in multiply-accumulates, as a factor on saliency or as a goal."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.tracing.macs import flat_costs, macs_per_weight, sparse_macs
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import Masks, count
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import regroup

MILLION = 1e6


class Costs(NamedTuple):
    """What the network and its weights cost, for one example.

    Attributes:
        per_weight: MACs of one weight of each prunable tensor.
        other: MACs of the other layers' weights that are not zero; 0 where they are not
            asked for.
        total: MACs under the masks that the costs were counted with.
    """

    per_weight: dict[str, float]
    other: float
    total: float


def count_costs(
    loss_fn: LossFn | None,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    all_layers: bool,
) -> Costs:
    """Counts MACs by tracing the loss with one example.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree.
        masks: From path to bool.
        samples: The first example is traced.
        all_layers: Whether layers that are not prunable are counted too.

    Raises:
        ValueError: If there is no loss, or the products of a tensor cannot be counted.
    """
    if loss_fn is None:
        raise OptionError(
            "loss_fn",
            "loss_fn=None with flops_power or flops_target; expected a loss, from "
            "which the multiply-accumulates are counted",
        )
    example = next(regroup(samples, 1))
    prunable = macs_per_weight(loss_fn, params, example, masks)
    other = 0.0
    if all_layers:
        everything = macs_per_weight(loss_fn, params, example)
        leaves = leaves_by_path(params)
        # Another pruner may have been there: its zeros cost nothing either.
        other = sum(
            cost * float(jnp.count_nonzero(leaves[path]))
            for path, cost in everything.items()
            if path not in masks
        )
    return Costs(prunable, other, other + sparse_macs(prunable, params, masks))


class MacsCut(NamedTuple):
    """A mask that meets a number of MACs.

    Attributes:
        mask: Weights that stay [d], bool.
        macs: MACs of one example under the mask, with those outside of it.
        nonzero: How many weights stay.
    """

    mask: np.ndarray
    macs: float
    nonzero: int


def macs_of(kept: jax.Array, order: FlatOrder, costs: Costs) -> float:
    """MACs of one example under a mask [d], in all layers that were counted."""
    flat = flat_costs(order, costs.per_weight)
    return costs.other + float(flat[np.asarray(kept)].sum())


# ------------------------------------------------------------------ FLOP-aware saliency


def _identity(macs: float) -> float:
    return macs


RESCALINGS: dict[str, Callable[[float], float]] = {
    "none": _identity,
    "log": np.log2,
}
"""What becomes of a layer's MACs before the power is taken."""


def flops_factors(
    per_weight: Mapping[str, float],
    masks: Mapping[str, jax.Array],
    power: float,
    *,
    per_parameter: bool = False,
    rescale: str = "none",
) -> dict[str, float]:
    """Factors on the saliency that let weights in costly layers go first.

    ``1 / f_l^a`` with ``f_l = nonzero_l · cost_l``, the MACs of the layer as it is
    pruned now, or with ``per_parameter`` ``f_l = cost_l``, those of one weight.

    The FLOP-aware WoodFisher (arXiv:2004.14340).

    Note: the original adds 1e-10 to ``f_l^a``, and offers to divide MACs by a million,
    which multiplies all factors alike and changes no mask. A layer without weights has
    factor 1 here.

    Args:
        per_weight: MACs of one weight, for each path of ``masks``.
        masks: The masks before this pruning step.
        power: a >= 0; 0 makes every factor 1.
        per_parameter: Whether a layer counts by one of its weights or by all of them.
        rescale: "log" takes the binary logarithm of the MACs; default "none".

    Returns:
        From path to factor, to multiply the scores of its weights with.

    Raises:
        ValueError: If a layer's MACs (or their logarithm) are not positive, so that it
            has no factor.
    """
    factors = {}
    for path, mask in masks.items():
        nonzero, _ = count({path: mask})
        if power == 0 or nonzero == 0:
            factors[path] = 1.0
            continue
        macs = per_weight[path] * (1 if per_parameter else nonzero)
        size = float(RESCALINGS[rescale](macs)) if macs > 0 else 0.0
        if size <= 0:
            raise ValueError(
                f"flops_power={power}: {path!r} counts {macs:g} multiply-accumulates, "
                f"rescaled ({rescale}) {size:g}; expected a positive number. Leave it "
                "out of the masks, or count otherwise"
            )
        factors[path] = size**-power
    return factors


# ------------------------------------------------------------------------- FLOP target


def keep_within_macs(
    scores: np.ndarray | jax.Array,
    mask: np.ndarray | jax.Array,
    costs: np.ndarray,
    target: float,
    *,
    other_macs: float = 0.0,
    tolerance: float = 1e5,
    bounds: tuple[int, ...] | None = None,
) -> MacsCut:
    """Keeps as many of the highest scores as a number of MACs allows.

    The mask of the global threshold at the lowest sparsity at which
    ``other_macs + Σ_kept cost <= target``, found at once from the running sum over
    sorted scores. Of equal scores each tensor keeps its share, and in a tensor those of
    lower index stay. The result is nested in ``mask``.

    Note: the original bisects the sparsity, and each trial moves the weights again by
    the update between two trial masks. Masks alone are searched here; the one update
    is the caller's.

    Args:
        scores: Finite scores, higher = more important [d].
        mask: Weights that may stay [d], bool.
        costs: MACs of one weight and one example [d].
        target: MACs of one example to be left.
        other_macs: MACs of layers that are not prunable; default 0.
        tolerance: How far below ``target`` the result may be, in MACs; default 0.1
            million.
        bounds: Where tensors start, and last d; default one tensor.

    Returns:
        A :class:`MacsCut`.

    Raises:
        ValueError: If the target is above the MACs under ``mask`` by more than the
            tolerance, below what is not prunable, or missed by more than the tolerance,
            for a single weight costs that much.
    """
    scores, mask = np.asarray(scores), np.asarray(mask)
    active = np.flatnonzero(mask)
    before = other_macs + float(costs[active].sum())
    if target > before + tolerance:
        raise ValueError(
            f"flops_target={target:g} multiply-accumulates is above the {before:g} "
            "that the masks leave already; a pruned weight does not come back"
        )
    if target < other_macs:
        raise ValueError(
            f"flops_target={target:g} multiply-accumulates is below the {other_macs:g} "
            "of layers that are not prunable; raise it or make more layers prunable"
        )
    ranked = active[np.argsort(-scores[active], kind="stable")]

    def cut() -> tuple[np.ndarray, int]:
        running = other_macs + np.cumsum(costs[ranked], dtype=np.float64)
        return running, int(np.searchsorted(running, target, side="right"))

    running, kept = cut()
    if bounds is not None and kept < len(ranked):
        equal = scores[ranked] == scores[ranked[kept]]
        ranked[equal] = _by_turns(ranked[equal], bounds)
        running, kept = cut()
    macs = float(running[kept - 1]) if kept else float(other_macs)
    if target - macs > tolerance:
        raise ValueError(
            f"flops_target={target:g} cannot be met within {tolerance:g} multiply-"
            f"accumulates: {macs:g} are left, and the next weight costs "
            f"{costs[ranked[kept]]:g}; raise the tolerance"
        )
    chosen = np.zeros(mask.shape, bool)
    chosen[ranked[:kept]] = True
    return MacsCut(chosen, macs, kept)


def _by_turns(entries: np.ndarray, bounds: tuple[int, ...]) -> np.ndarray:
    """Sorted entries of several tensors, of which any first few are shared out."""
    tensors = np.searchsorted(bounds, entries, side="right") - 1
    sizes = np.bincount(tensors)
    place = np.arange(len(entries)) - (np.cumsum(sizes) - sizes)[tensors]
    return entries[np.argsort(place / sizes[tensors], kind="stable")]
