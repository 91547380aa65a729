"""Structures that layer-wise pruning takes from the layers that read them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.options import (
    OptionError,
    Range,
    checked,
    fields_of,
    meant,
    plain,
)
from woodfisher_jax.selection.accounts import COSTS, Budget, cheapest
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.selection.structures import Family, Member, Structures
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.trees.masks import num_kept
from woodfisher_jax.trees.paths import Params, leaves_by_path

SHARE = Range(above=0, most=1)
"""Of a cost of the network, to be left."""


class Reader(NamedTuple):
    """A layer that alone reads the structures of some families.

    Attributes:
        path: Of the layer's weights.
        families: Whose structures they are; several where arrays are concatenated.
        labels: The number of the structure that each weight reads, of the tensor's
            shape, family after family; higher numbers for each entry of what else it
            reads.
    """

    path: str
    families: tuple[Family, ...]
    labels: np.ndarray

    @property
    def units(self) -> tuple[int, ...]:
        """Of all structures, in the order of their numbers."""
        return tuple(unit for family in self.families for unit in family.units)

    def parts(self, layer: Layer) -> Iterator[tuple[Family, np.ndarray]]:
        """Each family, and a layer's inputs of each structure [structures, inputs]."""
        labels = self._by_input(layer)
        order = np.argsort(labels, kind="stable")
        start = 0
        for family in self.families:
            number = len(family.units)
            own = (start <= labels[order]) & (labels[order] < start + number)
            yield family, order[own].reshape(number, -1)
            start += number

    def there(self, mask: np.ndarray, layer: Layer) -> np.ndarray:
        """Which inputs the layer still reads, bool [inputs].

        Raises:
            OptionError: If it reads a structure in part.
        """
        (labels,) = self.labels.reshape(-1)[layer.entries()]
        (left,) = mask.reshape(-1)[layer.entries()]
        # Not what makes a structure that is gone: no weight of that output is left.
        made = left.any(axis=1)
        labels, left = labels[made].reshape(-1), left[made].reshape(-1)
        number = np.bincount(labels, left, minlength=int(self.labels.max()) + 1)
        if ((number > 0) & (number < np.bincount(labels, minlength=len(number)))).any():
            raise OptionError(
                "masks",
                f"masks of {self.path!r} have single weights pruned; expected none, or "
                "all that read a structure: take structures out first, and prune what "
                "is left then",
            )
        return (number > 0)[self._by_input(layer)]

    def _by_input(self, layer: Layer) -> np.ndarray:
        """The numbers of what a layer's inputs are of, [inputs]."""
        return self.labels.reshape(-1)[layer.entries()[0, 0]]


def asked_for(given: Structures, rule: Pattern, params: Params) -> Structures:
    """The structures of the kinds that a pattern names.

    Args:
        given: Structures of a network.
        rule: With kinds.
        params: Of the network that is pruned.

    Raises:
        OptionError: If there are none, or they are those of another network.
    """
    leaves = leaves_by_path(params)
    paths = {member.path for family in given.families for member in family.members}
    if not paths <= leaves.keys():
        raise OptionError(
            "pattern",
            f"pattern has structures of {sorted(paths - leaves.keys())[0]!r}, which is "
            "not in params; expected wf.structures(net_fn, params, inputs) of this "
            "network",
        )
    given.check_fits({path: leaf.shape for path, leaf in leaves.items()})
    found = given.of(rule.kinds)
    if rule.structures is not None and not given.families:
        raise OptionError(
            "pattern",
            "pattern is a Structures without any; expected some of those that "
            "wf.structures(net_fn, params, inputs) finds",
        )
    if not found.families:
        there = ", ".join(dict.fromkeys(family.kind for family in given.families))
        ways = f"a kind that there is: {there}" if there else "single weights or N:M"
        raise OptionError(
            "pattern",
            f"pattern={rule.name!r}: there are no {' or '.join(rule.kinds)}; expected "
            f"{ways}; print(wf.structures(net_fn, params, inputs)) says what was found "
            "and what stays whole",
        )
    return found


def ungrouped(
    layers: Mapping[Product, Sequence[Layer]],
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that are one layer each, all of whose outputs read alike.

    Others are grouped convolutions and stacked layers.
    """
    parts: dict[str, list[Layer]] = defaultdict(list)
    for product, some in layers.items():
        parts[product.path] += some
    return {
        path: own[0].shape
        for path, own in parts.items()
        if len(own) == 1 and len(own[0].groups) == 1
    }


def readers(
    found: Structures, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Reader]:
    """The layers that alone read families of structures, by the path of their weights.

    Structures that several layers read stay: what one of them can do without, another
    may need.

    Args:
        found: Structures of the network.
        shapes: Of the tensors that may be pruned, :func:`ungrouped`.

    Raises:
        OptionError: If there is none.
    """
    read: dict[str, list[tuple[Family, Member]]] = {}
    for family in found.families:
        own = [member for member in family.members if member.role == "inputs"]
        if len(own) == 1 and own[0].path in shapes:
            read.setdefault(own[0].path, []).append((family, own[0]))
    chosen = {path: _reader(path, own, shapes[path]) for path, own in read.items()}
    if not chosen:
        raise OptionError(
            "pattern",
            "structures: no prunable layer reads some that no other layer reads, "
            "grouped convolutions and stacked layers aside; "
            "wf.structures(net_fn, params, inputs) lists what there is, and "
            "wf.prune_outputs with pattern='structures' also prunes what several "
            "layers read",
        )
    return chosen


def _reader(
    path: str, read: Sequence[tuple[Family, Member]], shape: tuple[int, ...]
) -> Reader:
    """A layer and the families of structures along the axis of the first."""
    axis = read[0][1].axis
    alike = [(family, member) for family, member in read if member.axis == axis]
    along = np.full(shape[axis], -1)
    start = 0
    for _, member in alike:
        number, size = member.entries.shape
        along[member.entries.reshape(-1)] = np.repeat(start + np.arange(number), size)
        start += number
    others = np.flatnonzero(along < 0)
    along[others] = start + np.arange(len(others))
    wide = [-1 if i == axis else 1 for i in range(len(shape))]
    labels = np.broadcast_to(along.reshape(wide), shape)
    return Reader(path, tuple(family for family, _ in alike), labels)


def checked_goal(
    sparsity: float | None, shares: Mapping[str, float | None]
) -> tuple[float | None, dict[str, float]]:
    """A sparsity, or shares of costs, as numbers in their range.

    Args:
        sparsity: The share of each family that goes, if it is given.
        shares: Of each cost of the network what may be left, if it is given.

    Returns:
        The sparsity, and the shares that are given.

    Raises:
        OptionError: If there are both or neither, or one is out of range.
    """
    sparsity = checked(fields_of(Goal)["sparsity"], sparsity)
    given = {name: plain(share) for name, share in shares.items() if share is not None}
    if (sparsity is None) == (not given):
        stated = ", ".join(f"{name}={share}" for name, share in given.items())
        stated = stated or f"none of {', '.join(shares)}"
        raise OptionError(
            "sparsity",
            f"sparsity={sparsity} with {stated}; expected "
            "either the share of each layer's structures that go, such as 0.5, or what "
            "may be left of the network, such as macs=0.5",
        )
    for name, share in given.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not SHARE.holds(share):
            raise OptionError(
                name,
                f"{name}={share!r}; expected the share of the {COSTS[name]} to be "
                f"left, above 0 and at most 1, such as 0.5{meant(share, SHARE)}",
            )
    return sparsity, given


def goal_of(
    found: Structures,
    sparsity: float | None,
    given: Mapping[str, float],
    whole: Sequence[str] = (),
) -> tuple[float, Budget]:
    """The share of each family that goes, and what may be left in all.

    Args:
        found: Structures that may go.
        sparsity: That share, if it is given.
        given: Else of costs of the network what may be left.
        whole: Families of the pattern that stay, since not one layer alone reads them.

    Raises:
        OptionError: If structures cannot meet a share.
    """
    if sparsity is not None:
        return sparsity, {}
    total = found.account().left
    budget = {name: share * total[name] for name, share in given.items()}
    left = found.account(_first(found, _counts(found, 1.0))).left
    for name, most in budget.items():
        if left[name] > most:
            raise OptionError(
                name,
                f"{name}={given[name]}; with one structure of each layer "
                f"{left[name] / total[name]:.3f} of the {COSTS[name]} are left, "
                "expected a larger share, or more that may go: "
                f"{_taken_by_prune(whole)}a pattern of more kinds, such as "
                "'structures', or more tensors in prunable",
            )
    return _within(found, budget)[0], budget


def _taken_by_prune(whole: Sequence[str]) -> str:
    if not whole:
        return ""
    more = f" and {len(whole) - 3} more" if whole[3:] else ""
    return (
        f"those made by {[*whole[:3]]}{more}, which wf.prune(..., "
        "pattern='structures') takes out, for not one layer alone reads them; "
    )


def counts_of(
    found: Structures,
    level: float,
    budget: Budget,
    losses: Mapping[int, float] | None = None,
    spread: float = 0.0,
) -> list[int]:
    """How many structures of each family go.

    Args:
        found: Structures that may go.
        level: Share of each family.
        budget: What may be left; empty for the same share of each.
        losses: Loss increase of each unit; those go that are cheapest for what they
            save. Default none: the same share of each family.
        spread: How far the share of a family may be from ``level``, before it is
            rounded to whole structures.
    """
    counts = _within(found, budget)[1] if budget else _counts(found, level)
    if losses is None:
        return counts
    least = [
        min(n, math.floor(len(f.units) * max(level - spread, 0.0) + 5e-7))
        for f, n in zip(found.families, counts, strict=True)
    ]
    most = _counts(found, min(level + spread, 1.0))
    start = _first(found, least, losses)
    if not budget:
        account = found.account(_first(found, counts, losses))
        budget = {"size": account.left["size"]}
    stay = [len(f.units) - n for f, n in zip(found.families, most, strict=True)]
    gone = cheapest(found.units, losses, found.account(start), budget, start, stay)
    return [sum(unit in gone for unit in family.units) for family in found.families]


def _counts(found: Structures, level: float) -> list[int]:
    return [
        len(f.units) - max(1, num_kept(len(f.units), level)) for f in found.families
    ]


def _first(
    found: Structures, counts: list[int], losses: Mapping[int, float] | None = None
) -> set[int]:
    """So many units of each family, those of lowest loss."""
    known = losses or {}
    return {
        unit
        for family, count in zip(found.families, counts, strict=True)
        for unit in sorted(family.units, key=lambda u: known.get(u, 0.0))[:count]
    }


def _within(found: Structures, budget: Budget) -> tuple[float, list[int]]:
    """The share of each family that goes, and how many structures, within a budget.

    One structure after another goes, from the family of which the smallest share is
    gone with it, so that shares are rounded down. If the last one saves more than it
    has to, others stay after all, those of the largest shares first, as long as the
    budget is kept and no family is behind by more than that structure.

    Args:
        found: Structures that may go; all but one of each family are enough.
        budget: What may be left.
    """
    sizes = [len(family.units) for family in found.families]
    order = sorted(
        ((n + 1) / size, number, n)
        for number, size in enumerate(sizes)
        for n in range(size - 1)
    )
    account, counts, level = found.account(), [0] * len(sizes), 0.0

    def move(number: int, n: int, times: int) -> None:
        account.remove(found.families[number].units[n], times)
        counts[number] += times

    def kept() -> bool:
        return all(account.left[name] <= most for name, most in budget.items())

    last = -1
    while not kept():
        last += 1
        level, number, n = order[last]
        move(number, n, 1)
    if last < 0:
        return level, counts
    least = level - 1 / sizes[order[last][1]]
    for share, number, n in reversed(order[:last]):
        if share <= least:
            break
        move(number, n, -1)
        if not kept():
            move(number, n, 1)
    return level, counts
