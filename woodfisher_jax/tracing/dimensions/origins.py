"""The tensors that a program's arrays come from, and their axes in these arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from woodfisher_jax.tracing.dimensions.dims import Axis, Dims


class Source(NamedTuple):
    """A tensor that an array holds the numbers of.

    Attributes:
        axes: Of the array, in dimensions of the tensor; other dimensions where an axis
            is not the tensor's.
        stacked: Dimensions of which the array holds one entry, each in its turn.
        mixed: Whether the array holds sums of the tensor's entries in several orders.
    """

    axes: tuple[Axis, ...]
    stacked: frozenset[int] = frozenset()
    mixed: bool = False


class Array(NamedTuple):
    """What is known of an array of the program.

    Attributes:
        axes: Its dimensions, axis by axis.
        active: Whether it depends on the batch.
        sources: The tensors whose entries it holds, moved, scaled or combined.
        touched: All tensors that it depends on, if it does not depend on the batch.
        scaled: If it is activations times tensors entry by entry, these.
        apart: The dimensions that the products of two activations which it comes from,
            without a weight between, keep apart.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    sources: Mapping[str, Source] = {}
    touched: frozenset[str] = frozenset()
    scaled: Mapping[str, Source] = {}
    apart: frozenset[int] = frozenset()

    def moved(self, axes: Callable[[tuple[Axis, ...]], tuple[Axis, ...]]) -> "Array":
        """The array with its axes, and those of its tensors, changed alike."""

        def changed(sources: Mapping[str, Source]) -> dict[str, Source]:
            return {
                path: source._replace(axes=axes(source.axes))
                for path, source in sources.items()
            }

        return self._replace(
            axes=axes(self.axes),
            sources=changed(self.sources),
            scaled=changed(self.scaled),
        )

    def stacked(self, axes: Sequence[int]) -> "Array":
        """The array of which the program holds one entry of some axes at a time."""
        sources = {
            path: source._replace(
                stacked=source.stacked.union(*(source.axes[i] for i in axes))
            )
            for path, source in self.sources.items()
        }
        return self._replace(sources=sources)

    def without(self, gone: Sequence[int]) -> "Array":
        """The array without some axes."""
        return self.moved(
            lambda axes: tuple(axis for i, axis in enumerate(axes) if i not in gone)
        )


def touched(arrays: Sequence[Array]) -> frozenset[str]:
    """All tensors that arrays depend on."""
    return frozenset().union(*(a.touched for a in arrays))


class Origins:
    """The tensors of a program, and what their dimensions are in its arrays.

    Attributes:
        dims: Of all arrays.
        shapes: The shape of each tensor by path.
        raw: The axes of each tensor, in dimensions of its own.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The tensors are in no array yet.

        Args:
            shapes: The shape of each tensor by path.
        """
        self.dims = Dims()
        self.shapes = dict(shapes)
        self.raw = {
            path: tuple(self.dims.axis(n) for n in shape)
            for path, shape in shapes.items()
        }
        # Of an axis that is part of a longer one, or has others as its parts: the
        # dimensions whose role is its own.
        self._stands_for: dict[int, Axis] = {}

    # ----------------------------------------------------------------------- dimensions

    def length(self, axis: Axis) -> int:
        """The number of entries along an axis."""
        return math.prod(self.dims.sizes[dim] for dim in axis)

    def unify(self, first: Sequence[Axis], second: Sequence[Axis]) -> None:
        """Makes the axes of two arrays the same, one by one."""
        for a, b in zip(first, second, strict=True):
            self.dims.unify(a, b)

    def add_meaning(self, dim: int, others: Axis) -> None:
        """Says that the role of a dimension is that of others too."""
        self._stands_for[dim] = (*self._stands_for.get(dim, ()), *others)

    def alias(self, length: int, dims: Axis) -> Axis:
        """An axis of which other dimensions are part, or which is part of them."""
        axis = self.dims.axis(length)
        self.add_meaning(axis[0], dims)
        return axis

    def meant(self, dim: int) -> list[int]:
        """A dimension and those whose role is its own."""
        others = self._stands_for.get(dim, ())
        return [dim, *(d for other in others for d in self.meant(other))]

    def own_leaves(self, path: str) -> list[tuple[int, tuple[int, ...]]]:
        """The leaves of a tensor's axes, each with all that it is part of."""

        def below(dim: int, above: Axis) -> list[tuple[int, Axis]]:
            parts, chain = self.dims.parts(dim), (dim, *above)
            if not parts:
                return [(dim, chain)]
            return [found for part in parts for found in below(part, chain)]

        return [
            found for axis in self.raw[path] for dim in axis for found in below(dim, ())
        ]

    def dims_of(self, path: str) -> set[int]:
        """A tensor's dimensions and all their parts."""
        return {dim for _, chain in self.own_leaves(path) for dim in chain}

    def places(self, path: str, source: Source) -> list[set[int]]:
        """The tensor's own dimensions in each axis of an array that holds it."""
        own = self.dims_of(path)
        return [
            {
                meant
                for dim in axis
                for leaf in self.dims.leaves(dim)
                for meant in self.meant(leaf)
            }
            & own
            for axis in source.axes
        ]

    # --------------------------------------------------------------------------- arrays

    def tensors(self) -> list[Array]:
        """The tensors as arrays of the program, in order."""
        return [
            Array(axes, False, {path: Source(axes)}, frozenset([path]))
            for path, axes in self.raw.items()
        ]

    def fresh(self, shape: Sequence[int], active: bool = False) -> Array:
        """An array whose dimensions are no other's."""
        return Array(tuple(self.dims.axis(n) for n in shape), active)

    def mixed(self, inputs: Sequence[Array], shape: Sequence[int]) -> Array:
        """An array that is computed from others, and of which no axis is known."""
        active = any(a.active for a in inputs)
        result = self.fresh(shape, active)
        return result._replace(touched=frozenset() if active else touched(inputs))

    def merged(self, arrays: Sequence[Array]) -> dict[str, Source]:
        """The sources of all; of two of one tensor that which has more of its axes."""
        found: dict[str, Source] = {}
        for array in arrays:
            for path, source in array.sources.items():
                mine = self.places(path, source)
                other = self.places(path, found[path]) if path in found else []
                if path not in found or sum(map(len, mine)) > sum(map(len, other)):
                    found[path] = source
                elif sum(map(len, mine)) == sum(map(len, other)) and mine != other:
                    found[path] = found[path]._replace(mixed=True)
        return found

    def joined(self, inputs: Sequence[Array], shape: Sequence[int]) -> Array:
        """The result of an elementwise primitive: its operands' axes are the same."""
        own = [self.broadcast(a, shape) for a in inputs if a.axes]
        first, *rest = own
        for other in rest:
            self.unify(first.axes, other.axes)
        active = any(a.active for a in inputs)
        return Array(
            # Activations keep the dimensions of the layer that gave them.
            next((a.axes for a in own if a.active), first.axes),
            active,
            # An activation plus or times a tensor is no view of the tensor.
            self.merged(own) if not active or not rest else {},
            frozenset() if active else touched(inputs),
        )

    def broadcast(self, array: Array, shape: Sequence[int]) -> Array:
        """An array with new dimensions where its length is not that of a shape."""
        more = {
            i: self.dims.axis(n)
            for i, (axis, n) in enumerate(zip(array.axes, shape, strict=True))
            if self.length(axis) != n
        }
        if not more:
            return array
        return array.moved(
            lambda axes: tuple(more.get(i, axis) for i, axis in enumerate(axes))
        )
