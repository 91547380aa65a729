"""Multiply-accumulates (MACs) of dense layers and convolutions, dense and masked.

A weight costs one MAC for each use: one in a dense layer on a vector, one for each
output position in a convolution. A network costs ``Σ size · cost`` and a pruned one
``Σ nonzero · cost``; no model is executed. By the usual convention, padding is counted,
and biases, normalisation and activations are not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.tracing.axes import Trace, traced
from woodfisher_jax.tracing.dimensions.products import Occurrence
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
    trace = traced(apply_fn, params, example)
    leaves = leaves_by_path(params)
    wanted = list(leaves) if paths is None else list(paths)
    unknown = [path for path in wanted if path not in leaves]
    if unknown:
        raise ValueError(
            f"paths names {unknown[0]!r}, which is not in params; expected some of "
            f"{list(leaves)}"
        )
    length = batch_length(example)
    costs = {
        path: _macs(trace, path) / (int(np.prod(leaves[path].shape)) * length)
        for path in wanted
    }
    if paths is None:
        # In the order of the program: a tree of dicts is sorted by name.
        ranked = dict.fromkeys(u.path for u in trace.uses if isinstance(u, Occurrence))
        return {path: costs[path] for path in ranked if costs[path]}
    return costs


def _macs(trace: Trace, path: str) -> int:
    hidden, own = trace.hidden(path), trace.occurrences(path)
    if any(product.macs is None for product in own):
        hidden = (
            hidden or "is in a loop or branch that runs a number of times not known"
        )
    if hidden:
        raise ValueError(
            f"the multiply-accumulates of {path!r} cannot be counted: it {hidden}; "
            "expected dense layers and convolutions. Leave it out of paths, and out of "
            "the masks if MACs are a target"
        )
    return sum(product.macs or 0 for product in own)


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
