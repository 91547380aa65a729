"""Structures that layer-wise pruning takes from the layers that read them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.patterns import Pattern
from woodfisher_jax.selection.structures import Family, Structures
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.trees.masks import num_kept


class Reader(NamedTuple):
    """A layer that alone reads the structures of a family.

    Attributes:
        family: Whose structures they are.
        path: Of the layer's weights.
        labels: The number of the structure that each weight reads, of the tensor's
            shape.
        number: How many structures go.
    """

    family: Family
    path: str
    labels: np.ndarray
    number: int

    def columns(self, layer: Layer) -> np.ndarray:
        """The order of a layer's inputs in which those of a structure are together.

        Raises:
            OptionError: If a structure does not lie along the inputs of the layer.
        """
        labels = self.labels.reshape(-1)[layer.entries()]
        if len(labels) != 1 or (labels != labels[:, :1]).any():
            raise OptionError(
                "pattern",
                f"structures of {self.path!r} do not lie along the inputs of one "
                "layer; leave it out with prunable, or prune with wf.prune_structures",
            )
        return np.argsort(labels[0, 0], kind="stable")


def readers(
    found: Structures,
    shapes: Mapping[str, tuple[int, ...]],
    level: float,
) -> dict[str, Reader]:
    """The layers that alone read a family of structures, by the path of their weights.

    Structures that several layers read stay: what one of them can do without, another
    may need.

    Args:
        found: Structures of the network.
        shapes: Of the tensors that may be pruned.
        level: Share of the structures of each family that goes; one stays at least.

    Raises:
        OptionError: If there is none.
    """
    chosen = {}
    for family in found.families:
        own = [member for member in family.members if member.role == "inputs"]
        if len(own) != 1 or own[0].path not in shapes:
            continue
        (member,) = own
        labels = np.full(shapes[member.path], -1)
        along = np.moveaxis(labels, member.axis, -1)
        along[..., member.entries.reshape(-1)] = np.repeat(
            np.arange(len(member.entries)), member.entries.shape[1]
        )
        total = len(family.units)
        number = total - max(1, num_kept(total, level))
        if (labels >= 0).all():
            chosen[member.path] = Reader(family, member.path, labels, number)
    if not chosen:
        raise OptionError(
            "pattern",
            "structures: no prunable layer reads some that no other layer reads; "
            "wf.structures(net_fn, params, inputs) lists what there is, and "
            "wf.prune_structures also prunes what several layers read",
        )
    return chosen


def structured(rule: Pattern | None) -> bool:
    """Whether a pattern is one of structures."""
    return rule is not None and bool(rule.kinds)


def only_read(
    layers: dict[Product, list[Layer]], chosen: Mapping[str, Reader]
) -> dict[Product, list[Layer]]:
    """The layers of these readers."""
    return {product: own for product, own in layers.items() if product.path in chosen}
