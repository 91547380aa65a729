"""What a network costs while structures are taken out of it, and which go first."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from woodfisher_jax.options import OptionError
from woodfisher_jax.tracing.coupling import Coupling
from woodfisher_jax.tracing.entries.units import Axis
from woodfisher_jax.trees.masks import num_kept

COSTS = {
    "size": "parameters",
    "macs": "multiply-accumulates",
    "latency": "milliseconds of products",
}
"""What a network costs."""


def free_entries(coupling: Coupling, axis: Axis) -> Iterable[tuple[int, int]]:
    """Entries that can go, each with the unit that it goes with."""
    units = coupling.units
    for number, entry in enumerate(axis):
        for unit in units.classes(entry):
            if not units.reason(unit):
                yield number, unit


Value = Callable[[tuple[int, ...]], float]
"""From lengths of axes to what something costs."""


class Speed(NamedTuple):
    """How long a product takes, by the lengths of its axes.

    Attributes:
        axes: Axes of its operands that may become shorter.
        milliseconds: From their lengths.
    """

    axes: tuple[Axis, ...]
    milliseconds: Value


class Account:
    """What a network costs while structures are taken out of it.

    Attributes:
        left: What is left, by the names of :data:`COSTS`.
    """

    def __init__(
        self,
        coupling: Coupling,
        examples: int,
        counted: Iterable[str] | None = None,
        speeds: Sequence[Speed] = (),
    ) -> None:
        """Nothing is taken out yet.

        Args:
            coupling: Of the program.
            examples: Of the traced inputs.
            counted: Tensors whose parameters count; default all.
            speeds: Of products; default none.
        """
        self._lengths: list[int] = []
        self._axes: dict[int, int] = {}
        # Of each unit, the axes that it is in and how many entries it has there.
        self._in: dict[int, Counter[int]] = defaultdict(Counter)
        # Of each axis, the terms that depend on it.
        self._terms_of: dict[int, list[int]] = defaultdict(list)
        self._terms: list[tuple[str, Value, tuple[int, ...]]] = []
        self._coupling = coupling
        for path in coupling.weights if counted is None else counted:
            self._add("size", math.prod, coupling.weights[path])
        for cost in coupling.costs:
            self._add("macs", _times(cost.factor / examples), cost.axes)
        for speed in speeds:
            self._add("latency", speed.milliseconds, speed.axes)
        self.left: dict[str, float] = dict.fromkeys(COSTS, 0.0)
        for number, (name, _, _) in enumerate(self._terms):
            self.left[name] += self._value(number)

    def _add(self, name: str, value: Value, axes: Sequence[Axis]) -> None:
        own = []
        for axis in axes:
            number = self._axes.setdefault(id(axis), len(self._lengths))
            if number == len(self._lengths):
                self._lengths.append(len(axis))
                for _, unit in free_entries(self._coupling, axis):
                    self._in[unit][number] += 1
            own.append(number)
            self._terms_of[number].append(len(self._terms))
        self._terms.append((name, value, tuple(own)))

    def _value(self, term: int) -> float:
        _, value, axes = self._terms[term]
        return value(tuple(self._lengths[axis] for axis in axes))

    def of(self, unit: int) -> dict[str, float]:
        """What would go with a unit now, by the names of :data:`COSTS`."""
        before = dict(self.left)
        self.remove(unit)
        after = dict(self.left)
        self.remove(unit, -1)
        # Without what rounding adds up to.
        self.left = before
        return {name: before[name] - after[name] for name in before}

    def remove(self, unit: int, times: int = 1) -> None:
        """Takes a unit out; with -1 puts it back."""
        terms = {t for axis in self._in[unit] for t in self._terms_of[axis]}
        before = [(t, self._value(t)) for t in terms]
        for axis, number in self._in[unit].items():
            self._lengths[axis] -= times * number
        for term, value in before:
            self.left[self._terms[term][0]] += self._value(term) - value


def _times(factor: float) -> Value:
    return lambda lengths: factor * math.prod(lengths)


Budget = Mapping[str, float]
"""What may be left of some of :data:`COSTS`."""


def cheapest(
    families: Sequence[Sequence[int]],
    losses: Mapping[int, float],
    account: Account,
    budget: Budget,
    gone: set[int],
    least: Sequence[int] | None = None,
) -> set[int]:
    """Structures to take out: those of the lowest loss for what they save, in turn.

    Where several costs are above their budgets, what is saved is the sum of savings in
    units of the budgets. What the last one saves beyond the budgets lets others stay
    after all, the dearest first.

    Args:
        families: The units of all structures, by family.
        losses: Loss increase of each unit.
        account: Of the network without ``gone``; it is changed.
        budget: What may be left.
        gone: Units that are taken out already.
        least: How many structures of each family stay at least; default 1.

    Returns:
        All units that are to go, ``gone`` among them.

    Raises:
        OptionError: If more is left without any other structure.
    """
    family = {unit: i for i, units in enumerate(families) for unit in units}
    left = Counter(i for unit, i in family.items() if unit not in gone)
    gone, stay = set(gone), least or [1] * len(families)
    taken: list[int] = []

    def price(unit: int, above: Sequence[str]) -> float:
        costs = account.of(unit)
        saved = sum(costs[name] / budget[name] for name in above)
        return losses[unit] / saved if saved > 0 else math.inf

    while above := [name for name, most in budget.items() if account.left[name] > most]:
        order = [(price(u, above), u) for u in losses if u in family and u not in gone]
        heapq.heapify(order)
        while order and all(account.left[name] > budget[name] for name in above):
            old, unit = heapq.heappop(order)
            number = family[unit]
            if left[number] <= stay[number]:
                continue
            now = price(unit, above)
            # As structures go others save less: a price only rises.
            if order and now > max(old, order[0][0]):
                heapq.heappush(order, (now, unit))
                continue
            account.remove(unit)
            left[family[unit]] -= 1
            gone.add(unit)
            taken.append(unit)
        if not order and all(account.left[name] > budget[name] for name in above):
            name = above[0]
            raise OptionError(
                "pattern",
                f"structures: {account.left[name]:,.5g} {COSTS[name]} are left with "
                "the fewest structures of each kind, expected at most "
                f"{budget[name]:,.5g}; set a lower goal, or make more tensors prunable",
            )
    for unit in reversed(taken):
        account.remove(unit, -1)
        if any(account.left[name] > most for name, most in budget.items()):
            account.remove(unit)
        else:
            gone.remove(unit)
    return gone


def lowest_of_each(
    families: Sequence[Sequence[int]],
    losses: Mapping[int, float],
    sparsity: float,
    gone: set[int],
) -> set[int]:
    """Structures to take out: the same share of each family, those of lowest loss.

    Args:
        families: The units of all structures, by family.
        losses: Loss increase of each unit.
        sparsity: Share of each family that goes; one stays at least.
        gone: Units that are taken out already.

    Returns:
        All units that are to go, ``gone`` among them.
    """
    gone = set(gone)
    for units in families:
        own = [unit for unit in units if unit in losses]
        more = len(own) - max(1, num_kept(len(own), sparsity))
        ranked = sorted(own, key=lambda unit: (unit not in gone, losses[unit]))
        gone.update(ranked[: max(0, more)])
    return gone
