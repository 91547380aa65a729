"""Which axes of a program's arrays are the same: dimensions, unified and split.

An axis of an array is a tuple of dimensions, whose sizes multiply to its length, the
slowest first. Two dimensions are unified where the program lets their entries meet one
to one; a reshape that cuts an axis splits its dimension, and with it all that are
unified with it.
"""

import math
from collections.abc import Sequence

Axis = tuple[int, ...]
"""The dimensions of an axis, slowest first; none where its length is 1."""


class Dims:
    """All dimensions of a program, by number.

    Attributes:
        sizes: Of each dimension.
    """

    def __init__(self) -> None:
        """None yet."""
        self.sizes: list[int] = []
        self._above: list[int] = []
        # The parts of a class by its representative, and of each member by itself: a
        # weight whose two axes are unified has two sets of parts.
        self._class_parts: dict[int, Axis] = {}
        self._own_parts: dict[int, Axis] = {}

    def new(self, size: int) -> int:
        """A dimension that is no other's."""
        self.sizes.append(size)
        self._above.append(len(self._above))
        return len(self._above) - 1

    def axis(self, size: int) -> Axis:
        """An axis of a dimension of its own."""
        return (self.new(size),)

    def class_of(self, dim: int) -> int:
        """The representative of all dimensions unified with this one."""
        while self._above[dim] != dim:
            self._above[dim] = self._above[self._above[dim]]
            dim = self._above[dim]
        return dim

    def leaves(self, dim: int) -> Axis:
        """The dimension's own parts, which are split no further."""
        parts = self.parts(dim)
        return tuple(leaf for part in parts for leaf in self.leaves(part)) or (dim,)

    def unify(self, first: Axis, second: Axis) -> None:
        """Makes two axes of one length the same, as far as their sizes factor."""
        left, right = self._cut([first]), self._cut([second])
        if math.prod(self._size(left)) != math.prod(self._size(right)):
            return
        while left and right:
            a, b = self.sizes[left[0]], self.sizes[right[0]]
            if a == b:
                self._join(left.pop(0), right.pop(0))
            elif a % b == 0:
                left[:1] = self._split(left[0], b)
            elif b % a == 0:
                right[:1] = self._split(right[0], a)
            else:
                return

    def reshaped(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """The axes after a reshape; where sizes do not factor, dimensions of their own.

        Args:
            axes: Before.
            shape: Lengths after; of the same number of entries.
        """
        old = self._cut(axes)
        found: list[Axis] = []
        for length in shape:
            taken: list[int] = []
            while old and math.prod(self._size(taken)) < length:
                missing = length // math.prod(self._size(taken))
                size = self.sizes[old[0]]
                if missing % size == 0:
                    taken.append(old.pop(0))
                elif size % missing == 0:
                    old[:1] = self._split(old[0], missing)
                else:
                    break
            if math.prod(self._size(taken)) == length:
                found.append(tuple(taken))
                continue
            # From here on entries of several dimensions are mixed.
            return found + [self.axis(n) for n in shape[len(found) :]]
        return found

    def _cut(self, axes: Sequence[Axis]) -> list[int]:
        """The leaves of axes one after another, without those of size 1."""
        leaves = [leaf for axis in axes for dim in axis for leaf in self.leaves(dim)]
        return [leaf for leaf in leaves if self.sizes[leaf] != 1]

    def _size(self, dims: Sequence[int]) -> list[int]:
        return [self.sizes[dim] for dim in dims]

    def parts(self, dim: int) -> Axis:
        """The two or more dimensions that this one is split into; none of a leaf."""
        if dim not in self._own_parts:
            shared = self._class_parts.get(self.class_of(dim), ())
            own = tuple(self.new(self.sizes[part]) for part in shared)
            self._own_parts[dim] = own
            for part, other in zip(own, shared, strict=True):
                self._join(part, other)
            if not shared:
                del self._own_parts[dim]
                return ()
        return self._own_parts[dim]

    def _split(self, dim: int, first: int) -> Axis:
        """Splits a leaf into a slow part of the given size and the rest."""
        parts = (self.new(first), self.new(self.sizes[dim] // first))
        self._own_parts[dim] = parts
        self._class_parts[self.class_of(dim)] = parts
        return parts

    def _join(self, first: int, second: int) -> None:
        a, b = self.class_of(first), self.class_of(second)
        if a == b:
            return
        mine, others = self._class_parts.get(a), self._class_parts.pop(b, None)
        self._above[b] = a
        if mine is None and others is not None:
            self._class_parts[a] = others
        elif mine is not None and others is not None:
            self.unify(mine, others)
