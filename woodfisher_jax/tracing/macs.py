"""Multiply-accumulates (MACs) of dense layers and convolutions, dense and masked.

A weight costs one MAC for each use: one in a dense layer on a vector, one for each
output position in a convolution. A network costs ``Σ size · cost`` and a pruned one
``Σ nonzero · cost``; no model is executed. By the usual convention, padding is counted,
and biases, normalisation and activations are not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.tracing.layers import Convolution, Other, Product, Use, find_uses
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import MasksLike, count, paired
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import batch_length


class LayerMacs(NamedTuple):
    """MACs of one weight tensor, for one example.

    Attributes:
        path: Path of the weight tensor.
        size: Number of weights.
        nonzero: Number of weights that are not pruned.
        per_weight: MACs of one weight.
        dense: MACs of all weights.
        sparse: MACs of the weights that are not pruned.
    """

    path: str
    size: int
    nonzero: int
    per_weight: float
    dense: float
    sparse: float


def product_macs(product: Product) -> int:
    """MACs of one layer on the batch that it was traced with.

    ``outputs · inputs of each output``; in a transposed convolution, whose dilated
    input is mostly zeros, each weight is used once for every input position.

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
    """MACs of one weight of each tensor, for one example.

    ``MACs of the tensor's layers / (weights · examples)``; for a tensor that several
    layers share, their sum. Nothing is executed.

    Args:
        apply_fn: (params, batch) -> output, or a loss.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        example: A batch of one example or more, arrays or ``jax.ShapeDtypeStruct``
            with a leading axis.
        paths: The tensors to count; those that no layer multiplies (biases, embeddings,
            normalisation) cost 0. Default: all that some layer multiplies.

    Returns:
        From path to MACs; by default in the order in which the program uses the
        tensors.

    Raises:
        ValueError: If a path does not exist, or the products of its tensor cannot be
            counted: they are in a loop, or of tensors computed from it.
    """
    uses = find_uses(apply_fn, params, example)
    leaves = leaves_by_path(params)
    wanted = list(uses) if paths is None else list(paths)
    unknown = [path for path in wanted if path not in uses]
    if unknown:
        raise ValueError(
            f"paths names {unknown[0]!r}, which is not in params; expected some of "
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
            "tensor unchanged. Leave it out of paths, and out of the masks if MACs are "
            "a target"
        )
    return sum(product_macs(use) for use in uses if isinstance(use, Product))


def macs_table(
    per_weight: Mapping[str, float],
    params: Params,
    masks: MasksLike | None = None,
) -> tuple[LayerMacs, ...]:
    """MACs of each layer, dense and masked.

    Args:
        per_weight: The result of :func:`macs_per_weight`.
        params: The pytree, for the shapes.
        masks: From path to bool, or a pytree of the structure of ``params``; a tensor
            without a mask is dense. Default: none has one.

    Returns:
        One entry for each entry of ``per_weight``, in order.
    """
    leaves, rows = leaves_by_path(params), []
    masks = {} if masks is None else paired(params, masks)
    for path, cost in per_weight.items():
        size = int(np.prod(leaves[path].shape))
        nonzero = count({path: masks[path]})[0] if path in masks else size
        rows.append(LayerMacs(path, size, nonzero, cost, size * cost, nonzero * cost))
    return tuple(rows)


def dense_macs(per_weight: Mapping[str, float], params: Params) -> float:
    """MACs of one example through the dense network: ``Σ size · cost``."""
    return sum(row.dense for row in macs_table(per_weight, params))


def sparse_macs(
    per_weight: Mapping[str, float], params: Params, masks: MasksLike
) -> float:
    """MACs of one example with masks: ``Σ nonzero · cost``; see :func:`macs_table`."""
    return sum(row.sparse for row in macs_table(per_weight, params, masks))


def flat_costs(order: FlatOrder, per_weight: Mapping[str, float]) -> np.ndarray:
    """MACs of every prunable weight, in the flat order.

    Args:
        order: The flat order of the masks.
        per_weight: MACs of one weight of each tensor.

    Returns:
        Array [d], float64.
    """
    costs = [per_weight[path] for path in order.paths]
    return np.repeat(np.asarray(costs, np.float64), np.diff(order.offsets))
