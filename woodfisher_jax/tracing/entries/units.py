"""Which entries of a program's arrays can only be taken out together.

An axis of an array is a list of entries, and an entry a list of units: it is taken out
if any of its units is. Two entries that meet one to one have the same units. Where an
axis is cut into several, its entries become products: entry ``i n + j`` has a unit of
row i and one of column j.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Entry = tuple[int, ...]
"""Units, any of which takes the entry out; none for an entry that always stays."""

Axis = tuple[Entry, ...]
"""The entries along an axis of an array."""

STAYS: Axis = ((),)
"""An axis of length 1."""


class Array(NamedTuple):
    """What is known of an array.

    Attributes:
        axes: Its entries, axis by axis.
        active: Whether it depends on the inputs.
        of: If not, the tensors that it is computed from.
        vanishes: If so, whether it is plainly zero where weights among these are.
        value: If so, its numbers there, as far as they are known.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    of: frozenset[str] = frozenset()
    vanishes: bool = False
    value: Callable[[], Any] | None = None


class Units:
    """All units of a program, by number; units that are the same have one class."""

    def __init__(self) -> None:
        """None yet."""
        self._above: list[int] = []
        self._made_of: dict[int, Entry] = {}
        self._reasons: dict[int, str] = {}
        self._heads: set[int] = set()
        self._varying: set[int] = set()

    def axis(self, size: int, reason: str = "") -> Axis:
        """An axis with units of its own, which stay if there is a reason."""
        if size == 1:
            return STAYS
        first = len(self._above)
        self._above += range(first, first + size)
        if reason:
            self._reasons.update(dict.fromkeys(range(first, first + size), reason))
        return tuple((unit,) for unit in range(first, first + size))

    def array(
        self, shape: Sequence[int], active: bool = False, reason: str = ""
    ) -> Array:
        """An array whose axes have units of their own; see :meth:`axis`."""
        return Array(tuple(self.axis(n, reason) for n in shape), active)

    def class_of(self, unit: int) -> int:
        """The representative of all units that are the same."""
        while self._above[unit] != unit:
            self._above[unit] = self._above[self._above[unit]]
            unit = self._above[unit]
        return unit

    def classes(self, entry: Entry) -> Entry:
        """The classes that an entry is made of, in order."""
        found: dict[int, None] = {}
        for unit in entry:
            own = self.class_of(unit)
            parts = self._made_of.get(own)
            found.update(dict.fromkeys([own] if parts is None else self.classes(parts)))
        return tuple(found)

    def reason(self, class_: int) -> str:
        """Why a unit stays; "" where it can be taken out."""
        return self._reasons.get(self.class_of(class_), "")

    def is_head(self, class_: int) -> bool:
        """Whether a product of two activations keeps the unit apart."""
        return self.class_of(class_) in self._heads

    def varies(self, class_: int) -> bool:
        """Whether the unit meets activations that are the same for all entries."""
        return self.class_of(class_) in self._varying

    # -------------------------------------------------------------------- what is said

    def fix(self, axis: Iterable[Entry], reason: str) -> None:
        """Says that entries stay."""
        for entry in axis:
            for class_ in self.classes(entry):
                self._reasons.setdefault(class_, reason)

    def fix_array(self, array: Array, reason: str) -> None:
        """Says that all entries of an array stay."""
        for axis in array.axes:
            self.fix(axis, reason)

    def mark_heads(self, axis: Axis) -> None:
        """Says that a product of two activations keeps the entries apart."""
        self._heads.update(c for entry in axis for c in self.classes(entry))

    def mark_varying(self, *axes: Axis) -> None:
        """Says that activations are repeated along some axes.

        What meets them there depends on the inputs even if nothing makes it.
        """
        entries = (entry for axis in axes for entry in axis)
        self._varying.update(c for entry in entries for c in self.classes(entry))

    def agree(self, first: Array, second: Array) -> None:
        """Says that entries of two arrays of one shape meet one to one."""
        for mine, other in zip(first.axes, second.axes, strict=True):
            self.unify(mine, other)

    def unify(self, first: Axis, second: Axis) -> None:
        """Says that entries of two axes of one length meet one to one."""
        if not first or first is second or self._unify_products(first, second):
            return
        for a, b in zip(first, second, strict=True):
            if a != b:
                self._meet(self.classes(a), self.classes(b))

    def _unify_products(self, first: Axis, second: Axis) -> bool:
        """Lets rows meet rows, and columns columns, of two products of several axes.

        As heads of queries times what is in them, where each head is one of keys times
        one of its queries.

        Returns:
            Whether both are such products, not of equally many axes.
        """
        short, long = sorted([first, second], key=lambda a: len(self.classes(a[0])))
        few, many = (len(self.classes(axis[0])) for axis in (short, long))
        if few < 2 or few == many:
            return False
        units = [{c for e in axis for c in self.classes(e)} for axis in (short, long)]
        number = len({self.classes(entry)[:1] for entry in short})
        if units[0] & units[1] or len(short) % number:
            return False
        rows, columns = zip(
            self.divided(short, number), self.divided(long, number), strict=True
        )
        self.unify(*rows)
        self.unify(*columns)
        return True

    def _meet(self, first: Entry, second: Entry) -> None:
        common = {*first} & {*second}
        a = [unit for unit in first if unit not in common]
        b = [unit for unit in second if unit not in common]
        if not a and not b:
            return
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self._join(self.class_of(x), self.class_of(y))
        elif not common and 1 in (len(a), len(b)) and a and b:
            one, several = (a[0], b) if len(a) == 1 else (b[0], a)
            self._divide(one, tuple(several))
        else:
            # One of them can go alone, unless all stay.
            self.fix([(*a, *b)], "meets entries that go otherwise")

    def _join(self, a: int, b: int) -> None:
        if a == b:
            return
        self._above[b] = a
        if b in self._reasons:
            self._reasons.setdefault(a, self._reasons.pop(b))
        for marked in (self._heads, self._varying):
            if b in marked:
                marked.add(a)

    def _divide(self, unit: int, parts: Entry) -> None:
        """Says that a unit goes if one of others does."""
        self._made_of[unit] = parts
        if unit in self._reasons:
            self.fix([parts], self._reasons.pop(unit))
        for marked in (self._heads, self._varying):
            if unit in marked:
                marked.update(parts)

    # ----------------------------------------------------------------------- reshaping

    def reshaped(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """The axes after a reshape."""
        found: list[Axis] = []
        old, new = list(axes), list(shape)
        while old or new:
            before: list[Axis] = []
            after: list[int] = []
            lengths = [1, 1]
            # The shortest runs of axes with the same number of entries.
            while not (before and after) or lengths[0] != lengths[1]:
                take_old = old and (not before or lengths[0] < lengths[1] or not new)
                if take_old:
                    before.append(old.pop(0))
                    lengths[0] *= len(before[-1])
                elif new:
                    after.append(new.pop(0))
                    lengths[1] *= after[-1]
                else:
                    break
            # Axes of length 1 at the end belong to no run.
            while old and len(old[0]) == 1 and not new:
                old.pop(0)
            while new and new[0] == 1 and not old:
                after.append(new.pop(0))
            found += self._split(self._joined(before), after)
        return found

    @staticmethod
    def _joined(axes: Sequence[Axis]) -> Axis:
        """One axis of several, the last fastest."""
        joined: Axis = STAYS
        for axis in axes:
            if len(joined) == 1 and not joined[0]:
                joined = axis
            elif len(axis) > 1 or axis[0]:
                joined = tuple((*a, *b) for a in joined for b in axis)
        return joined

    def _split(self, axis: Axis, shape: Sequence[int]) -> list[Axis]:
        """Several axes of one, the last fastest."""
        if not shape:
            return []
        if math.prod(shape) == shape[0]:
            return [axis, *(STAYS for _ in shape[1:])]
        if shape[0] == 1:
            return [STAYS, *self._split(axis, shape[1:])]
        rows, columns = self.divided(axis, shape[0])
        return [rows, *self._split(columns, shape[1:])]

    def divided(self, axis: Axis, number: int) -> tuple[Axis, Axis]:
        """An axis as so many rows of equally many columns."""
        width = len(axis) // number
        if number == 1 or width == 1:
            return (STAYS, axis) if number == 1 else (axis, STAYS)
        entries = [self.classes(entry) for entry in axis]
        rows = [_common(entries[i * width : (i + 1) * width]) for i in range(number)]
        columns = [_common(entries[j::width]) for j in range(width)]
        made = [{*rows[i], *columns[j]} for i in range(number) for j in range(width)]
        if all({*entry} == both for entry, both in zip(entries, made, strict=True)):
            return tuple(rows), tuple(columns)
        if all(len(entry) == 1 for entry in entries):
            outer, inner = self.axis(number), self.axis(width)
            self.unify(self._joined([outer, inner]), axis)
            return outer, inner
        reason = "is cut in another way than it was put together"
        self.fix(axis, reason)
        return self.axis(number, reason), self.axis(width, reason)


def _common(entries: Sequence[Entry]) -> Entry:
    """The units that are in all entries, in order."""
    shared = set(entries[0]).intersection(*entries[1:])
    return tuple(unit for unit in entries[0] if unit in shared)
