"""Multiply-accumulates (MACs) of dense layers and convolutions, dense and under masks.

A weight costs one MAC wherever its layer uses it: once in a dense layer on a vector,
once for each output position in a convolution. So a network costs ``Σ size · cost`` and
a pruned one ``Σ nonzero · cost``, and no model has to run to know what a mask saves.
Biases, normalisation and activations are not counted, padding is: the usual convention.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.tracing.layers import Convolution, Other, Product, Use, find_uses
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import count
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import batch_length


class LayerMacs(NamedTuple):
    """One row of a table of MACs, all for one example.

    Attributes:
        path: The weight tensor.
        size: Its number of weights.
        nonzero: How many of them are not pruned.
        per_weight: MACs of one weight.
        dense: MACs of all weights.
        sparse: MACs of those that are not pruned.
    """

    path: str
    size: int
    nonzero: int
    per_weight: float
    dense: float
    sparse: float


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


def product_macs(product: Product) -> int:
    """MACs of one layer on the batch that it was traced with.

    ``outputs · inputs summed over for each``; in a transposed convolution, whose
    dilated input is mostly holes, each weight meets every input position once.

    Args:
        product: The layer.
    """
    output, geometry = product.output.shape, product.geometry
    left, right = product.operands
    if not isinstance(geometry, Convolution):
        summed = [left[axis] for axis in geometry.contract[0]]
        return int(np.prod([*output, *summed], dtype=np.int64))
    axes = geometry.axes
    positions = [
        output[after] if dilation == 1 else left[before]
        for after, before, dilation in zip(
            axes.out_spec[2:], axes.lhs_spec[2:], geometry.input_dilation, strict=True
        )
    ]
    batch = left[axes.lhs_spec[0]]
    return int(np.prod([batch, *positions, *right], dtype=np.int64))


def macs_per_weight(
    apply_fn: Callable[[Params, Any], Any],
    params: Params,
    example: Any,
    paths: Iterable[str] | None = None,
) -> dict[str, float]:
    """What one weight of each tensor costs, in MACs for one example.

    ``MACs of the tensor's layers / (weights · examples)``. A tensor that several layers
    share costs the sum. Nothing is executed.

    Args:
        apply_fn: (params, batch) -> output, or a loss.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        example: A batch of one example or more, arrays or ``jax.ShapeDtypeStruct``
            with a leading axis.
        paths: The tensors wanted; those that only meet activations otherwise (biases,
            embeddings, normalisation) cost 0. Default all that some layer multiplies.

    Returns:
        From path to MACs; by default in the order in which the program uses the
        tensors.

    Raises:
        ValueError: If a tensor that is wanted is not there, or its products cannot be
            counted: they are in a loop, or of tensors computed from it.
    """
    uses = find_uses(apply_fn, params, example)
    leaves = leaves_by_path(params)
    wanted = list(uses) if paths is None else list(paths)
    unknown = [path for path in wanted if path not in uses]
    if unknown:
        raise ValueError(
            f"paths names {unknown[0]!r}, which is not in params; there are "
            f"{list(leaves)}"
        )
    length = batch_length(example)
    costs = {
        path: _macs(path, uses[path]) / (int(np.prod(leaves[path].shape)) * length)
        for path in wanted
    }
    if paths is None:
        # In the order of the program: a tree of dicts is sorted by name.
        layers = [u for own in uses.values() for u in own if isinstance(u, Product)]
        ranked = sorted(layers, key=lambda use: use.position)
        return {use.path: costs[use.path] for use in ranked if costs[use.path]}
    return costs


def _macs(path: str, uses: tuple[Use, ...]) -> int:
    hidden = [u for u in uses if isinstance(u, Other) and u.hides_product]
    if hidden:
        raise ValueError(
            f"the multiply-accumulates of {path!r} cannot be counted: it "
            f"{hidden[0].reason}; expected dense layers and convolutions that take the "
            "tensor as it is. Leave it out of paths, and out of the masks if MACs are "
            "a target"
        )
    return sum(product_macs(use) for use in uses if isinstance(use, Product))


def macs_table(
    per_weight: Mapping[str, float],
    params: Params,
    masks: Mapping[str, jax.Array] | None = None,
) -> tuple[LayerMacs, ...]:
    """MACs a layer, dense and under masks.

    Args:
        per_weight: What :func:`macs_per_weight` returned.
        params: The pytree, for the shapes.
        masks: From path to bool; what they do not name is dense. Default nothing
            pruned.

    Returns:
        One row for each entry of ``per_weight``, in order.
    """
    leaves, rows = leaves_by_path(params), []
    for path, cost in per_weight.items():
        size = int(np.prod(leaves[path].shape))
        pruned = masks is not None and path in masks
        nonzero = count({path: masks[path]})[0] if masks and pruned else size
        rows.append(LayerMacs(path, size, nonzero, cost, size * cost, nonzero * cost))
    return tuple(rows)


def dense_macs(per_weight: Mapping[str, float], params: Params) -> float:
    """MACs of one example through the dense network: ``Σ size · cost``."""
    return sum(row.dense for row in macs_table(per_weight, params))


def sparse_macs(
    per_weight: Mapping[str, float], params: Params, masks: Mapping[str, jax.Array]
) -> float:
    """MACs of one example under masks: ``Σ nonzero · cost``; see :func:`macs_table`."""
    return sum(row.sparse for row in macs_table(per_weight, params, masks))


def flat_costs(order: FlatOrder, per_weight: Mapping[str, float]) -> np.ndarray:
    """MACs of every prunable weight, in the flat order.

    Args:
        order: The flat order of the masks.
        per_weight: MACs of one weight, for each of its tensors.

    Returns:
        Array [d], float64.
    """
    costs = [per_weight[path] for path in order.paths]
    return np.repeat(np.asarray(costs, np.float64), np.diff(order.offsets))


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
        ValueError: If power is negative, rescale is unknown, or a layer's MACs (or
            their logarithm) are not positive, so that it has no factor.
    """
    if not (power >= 0 and np.isfinite(power)):
        raise ValueError(f"flops_power={power}; expected a finite number of 0 or more")
    if rescale not in RESCALINGS:
        raise ValueError(
            f"flops_normalize={rescale!r}; expected one of {', '.join(RESCALINGS)}"
        )
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
) -> MacsCut:
    """Keeps as many of the highest scores as a number of MACs allows.

    The mask of the global threshold at the lowest sparsity at which
    ``other_macs + Σ_kept cost <= target``, found at once from the running sum over
    sorted scores. Of equal scores those of lower index stay, and the result is nested
    in ``mask``.

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
    running = other_macs + np.cumsum(costs[ranked], dtype=np.float64)
    kept = int(np.searchsorted(running, target, side="right"))
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
