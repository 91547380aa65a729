"""What a network costs while structures are taken out of it, and which go first."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from woodfisher_jax.options import OptionError
from woodfisher_jax.tracing.coupling import Coupling
from woodfisher_jax.tracing.entries import Axis
from woodfisher_jax.trees.masks import num_kept

COSTS = {"size": "parameters", "macs": "multiply-accumulates"}
"""What a network costs."""


def free_entries(coupling: Coupling, axis: Axis) -> Iterable[tuple[int, int]]:
    """Entries that can go, each with the unit that it goes with."""
    units = coupling.units
    for number, entry in enumerate(axis):
        for unit in units.classes(entry):
            if not units.reason(unit):
                yield number, unit


class Account:
    """What a network costs while structures are taken out of it.

    Attributes:
        size: Parameters that are left.
        macs: Multiply-accumulates of one example that are left.
    """

    def __init__(
        self,
        coupling: Coupling,
        examples: int,
        counted: Iterable[str] | None = None,
    ) -> None:
        """Nothing is taken out yet.

        Args:
            coupling: Of the program.
            examples: Of the traced inputs.
            counted: Tensors whose parameters count; default all.
        """
        self._left: list[int] = []
        self._axes: dict[int, int] = {}
        # Of each unit, the axes that it is in and how many entries it has there.
        self._in: dict[int, Counter[int]] = defaultdict(Counter)
        # Of each axis, the terms that it is a factor of.
        self._terms_of: dict[int, list[int]] = defaultdict(list)
        self._terms: list[tuple[float, tuple[int, ...], bool]] = []
        self._coupling = coupling
        paths = coupling.weights if counted is None else counted
        for path in paths:
            self._add(1, coupling.weights[path], False)
        for cost in coupling.costs:
            self._add(cost.factor / examples, cost.axes, True)
        self.size = sum(self._value(i) for i, t in enumerate(self._terms) if not t[2])
        self.macs = sum(self._value(i) for i, t in enumerate(self._terms) if t[2])

    @property
    def left(self) -> dict[str, float]:
        """What is left, by the names of :data:`COSTS`."""
        return {"size": self.size, "macs": self.macs}

    def _add(self, factor: float, axes: Sequence[Axis], macs: bool) -> None:
        own = []
        for axis in axes:
            number = self._axes.setdefault(id(axis), len(self._left))
            if number == len(self._left):
                self._left.append(len(axis))
                for _, unit in free_entries(self._coupling, axis):
                    self._in[unit][number] += 1
            own.append(number)
            self._terms_of[number].append(len(self._terms))
        self._terms.append((factor, tuple(own), macs))

    def _value(self, term: int) -> float:
        factor, axes, _ = self._terms[term]
        return factor * math.prod(self._left[axis] for axis in axes)

    def of(self, unit: int) -> dict[str, float]:
        """What would go with a unit now, by the names of :data:`COSTS`."""
        before = self.left
        self.remove(unit)
        after = self.left
        self.remove(unit, -1)
        # Without what rounding adds up to.
        self.size, self.macs = before["size"], before["macs"]
        return {name: before[name] - after[name] for name in before}

    def remove(self, unit: int, times: int = 1) -> None:
        """Takes a unit out; with -1 puts it back."""
        terms = {t for axis in self._in[unit] for t in self._terms_of[axis]}
        before = [(t, self._value(t)) for t in terms]
        for axis, number in self._in[unit].items():
            self._left[axis] -= times * number
        for term, value in before:
            change = self._value(term) - value
            if self._terms[term][2]:
                self.macs += change
            else:
                self.size += change


Budget = Mapping[str, float]
"""What may be left: "size" (parameters), "macs" (of one example), or both."""


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
    units of the budgets.

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
        if not order and all(account.left[name] > budget[name] for name in above):
            name = above[0]
            raise OptionError(
                "pattern",
                f"structures: {account.left[name]:,.0f} {COSTS[name]} are left with "
                "the fewest structures of each kind, expected at most "
                f"{budget[name]:,.0f}; set a lower goal, or make more tensors prunable",
            )
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
