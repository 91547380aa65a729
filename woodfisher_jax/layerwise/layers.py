"""The layers of a network that are pruned one after another."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.tracing.capture import weight_entries
from woodfisher_jax.tracing.layers import Other, Product, Use
from woodfisher_jax.tracing.segments import Program
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.blocks import FlatOrder, as_read, flat_order
from woodfisher_jax.trees.masks import Masks, left_out


class Layer(NamedTuple):
    """A layer to be pruned.

    Attributes:
        product: Where it is in the program.
        number: Its number in a tensor of stacked layers.
        groups: Which groups of the product belong to it.
        columns: The order of its inputs in which those of a group of a pattern follow
            one another.
        shape: Of its weight tensor.
        size: How many weights it has.
    """

    product: Product
    number: int
    groups: np.ndarray
    columns: np.ndarray
    shape: tuple[int, ...]
    size: int

    def entries(self) -> np.ndarray:
        """Places of its weights in the flat tensor, [groups, outputs, inputs].

        Formed when they are needed: for all layers of a network they would take more
        memory than the weights.
        """
        return weight_entries(self.product, self.shape)[self.groups][..., self.columns]


def find_layers(
    program: Program, masks: Masks, axes: Axes, rule: Pattern | None
) -> dict[Product, list[Layer]]:
    """The layers of the masks' tensors, by product.

    Raises:
        OptionError: If a tensor is not the weight of layers that can be followed, or a
            pattern does not fit it.
    """
    _check_uses({path: program.uses.get(path, ()) for path in masks})
    found: dict[Product, list[Layer]] = {}
    for path, mask in masks.items():
        shape = tuple(mask.shape)
        products = [u for u in program.uses[path] if isinstance(u, Product)]
        order = flat_order({path: mask}, axes)
        _check_once(path, shape, products)
        for product in products:
            found[product] = list(_parts(product, order, rule))
    return found


def has_product(uses: Sequence[Use]) -> bool:
    """Whether a tensor is the weight of a layer, whatever else it is."""
    return any(isinstance(use, Product) for use in uses)


def untied(axes: Axes, uses: Mapping[str, Sequence[Use]]) -> Axes:
    """The axes without those of weights that are read otherwise as well.

    A classifier that is the embedding is one: what its rows are worth as an embedding,
    the inputs of the classifier do not tell.
    """
    return {
        path: found
        for path, found in axes.items()
        if not any(isinstance(u, Other) and not u.hides_product for u in uses[path])
    }


def _check_uses(uses: Mapping[str, Sequence[Use]]) -> None:
    """Raises unless all that reads the tensors are layers; with all that are not."""
    refused = {path: why for path, own in uses.items() if (why := _no_layer(own))}
    if not refused:
        return
    (path, why), *others = refused.items()
    more = f" (and {', '.join(repr(p) for p, _ in others)} as little)" if others else ""
    raise OptionError(
        "prunable",
        f"layer-wise pruning: {path!r} {why}{more}; {left_out(*refused)}, or prune "
        "with wf.prune_outputs",
    )


def _no_layer(uses: Sequence[Use]) -> str:
    """Why a tensor is not the weight of layers alone; "" if it is."""
    if not uses:
        return "is not used by net_fn"
    others = (use.reason for use in uses if isinstance(use, Other))
    products = all(isinstance(use, Product) for use in uses)
    return next(others, "" if products else "is no layer's weight")


def _check_once(path: str, shape: tuple[int, ...], products: list[Product]) -> None:
    """Raises unless every weight belongs to exactly one layer."""
    counts = np.zeros(int(np.prod(shape)), np.int32)
    for product in products:
        places = weight_entries(product, shape).reshape(-1)
        counts += np.bincount(places, minlength=len(counts)).astype(np.int32)
    if (counts == 1).all():
        return
    how = "in several layers" if counts.max() > 1 else "only in part"
    raise OptionError(
        "prunable",
        f"layer-wise pruning: {path!r} of shape {shape} is used {how}; expected each "
        "of its weights in one layer, whose inputs are then known; "
        f"{left_out(path)}, or prune with wf.prune_outputs",
    )


def _parts(product: Product, order: FlatOrder, rule: Pattern | None) -> Iterator[Layer]:
    """The layers that one product has: several for stacked ones, as of experts."""
    axes = order.axes[0]
    read = np.empty(order.size, np.int64)
    read[as_read(axes, np.arange(order.size).reshape(order.shapes[0]))] = np.arange(
        order.size
    )
    entries = weight_entries(product, order.shapes[0])
    place = read[entries]
    owner = place // (order.size // axes.sizes[0])
    of = None
    if rule is not None:
        _, numbers = rule.names(order.paths[0], order.shapes[0], axes)
        of = np.broadcast_to(numbers, axes.sizes).reshape(-1)
    for number in np.unique(owner):
        groups = np.flatnonzero((owner == number).all(axis=(1, 2)))
        columns = np.arange(entries.shape[2])
        if rule is not None and of is not None:
            names = of[place[groups]]
            columns = np.argsort(names[0, 0], kind="stable")
            names = names[..., columns].reshape(*names.shape[:2], -1, rule.size or 1)
            if (names != names[..., :1]).any():
                raise OptionError(
                    "pattern",
                    f"pattern={rule.name!r}: the groups of {product.path!r} do not lie "
                    "along the inputs of its layer; "
                    f"{left_out(product.path)}",
                )
        yield Layer(
            product,
            int(number),
            groups,
            columns,
            order.shapes[0],
            entries[groups].size,
        )
