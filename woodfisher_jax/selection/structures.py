"""Structures: channels, neurons and heads that can be taken out of a network.

A structure is all that belongs to one channel: the filter that makes it, its bias and
what a norm has of it, and what its consumers do with it. Found in the function's own
program (:mod:`woodfisher_jax.tracing.coupling`), for any framework.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.inputs import check_net, taken_by_net
from woodfisher_jax.selection.accounts import Account, Speed, free_entries
from woodfisher_jax.tracing.axes import traced
from woodfisher_jax.tracing.coupling import Coupling, coupled
from woodfisher_jax.tracing.entries.units import Axis
from woodfisher_jax.tracing.training_mode import types_and_shapes
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.paths import Params, leaves_by_path, weight_name

KINDS = ("channels", "neurons", "heads")
"""Of structures: of convolutions, of dense layers, of attention."""

MOST_ROWS = 40
"""Rows of a printed table; the attributes have all."""


class Member(NamedTuple):
    """What a structure has of one axis of one tensor.

    Attributes:
        path: Of the tensor.
        axis: Of the tensor.
        entries: Along it, of each structure of a family [number, entries].
        role: "outputs" or "inputs" of a weight, or "both" where one axis is of both;
            "" for a bias, a norm or a statistic.
    """

    path: str
    axis: int
    entries: np.ndarray
    role: str

    def at(self, number: Any) -> tuple[Any, ...]:
        """The index of what some structures have of the tensor.

        Args:
            number: Of structures in their family, an index of its first axis.
        """
        entries = self.entries[number].reshape(-1)
        return (*(slice(None) for _ in range(self.axis)), entries)


class Family(NamedTuple):
    """Structures that are alike: the channels of one layer, the heads of another.

    Attributes:
        kind: One of :data:`KINDS`.
        members: What each structure has.
        units: The number of each structure in the program [number].
        size: Parameters that go with the first one taken out.
        macs: Multiply-accumulates of one example that go with it.
    """

    kind: str
    members: tuple[Member, ...]
    units: tuple[int, ...]
    size: int
    macs: float

    @property
    def name(self) -> str:
        """The first tensor whose outputs they are."""
        made = [m.path for m in self.members if m.role == "outputs"]
        return (made or [m.path for m in self.members])[0]

    @property
    def is_read(self) -> bool:
        """Whether a weight reads them, and not an array of the function alone."""
        return any(member.role in ("inputs", "both") for member in self.members)

    def take_out(self, masks: dict[str, np.ndarray], gone: set[int]) -> None:
        """Writes False where masks have some of the structures.

        Args:
            masks: From path to bool.
            gone: Units of structures.
        """
        some = [i for i, unit in enumerate(self.units) if unit in gone]
        for member in self.members if some else ():
            if member.path in masks:
                masks[member.path][member.at(some)] = False


class Whole(NamedTuple):
    """An axis of a weight that nothing can be taken out of.

    Attributes:
        path: Of the weight.
        axis: Of the weight.
        reason: Why, a clause whose subject is the axis.
    """

    path: str
    axis: int
    reason: str


class Structures(NamedTuple):
    """The structures of a network.

    Attributes:
        families: Structures that are alike, in the order of the tensors.
        whole: Axes of weights that stay as they are.
        size: Parameters of the network.
        macs: Multiply-accumulates of one example.
        coupling: What they were found from.
        examples: Examples of the traced inputs.
        speeds: How long products take, once they are timed
            (:func:`~woodfisher_jax.selection.latencies.timed`).
    """

    families: tuple[Family, ...]
    whole: tuple[Whole, ...]
    size: int
    macs: float
    coupling: Coupling
    examples: int
    speeds: tuple[Speed, ...] = ()

    @property
    def number(self) -> int:
        """How many structures there are."""
        return sum(len(family.units) for family in self.families)

    def of(self, kinds: Iterable[str]) -> "Structures":
        """Those of some kinds.

        Args:
            kinds: Some of "channels", "neurons" and "heads", such as ``["heads"]``.

        Raises:
            OptionError: If there is no such kind, or one string in place of a list.
        """
        if not isinstance(kinds, str):
            kinds = tuple(kinds)  # An iterator is read once.
        if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
            raise OptionError(
                "kinds",
                f"kinds={kinds!r}; expected a list of some of {', '.join(KINDS)}, such "
                "as ['heads']",
            )
        chosen = tuple(f for f in self.families if f.kind in kinds)
        return self._replace(families=chosen)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors of another network.

        Args:
            shapes: Of tensors, by path; those of no structure may have any.

        Raises:
            OptionError: With the path of the first tensor of another shape.
        """
        members = (m for family in self.families for m in family.members)
        for path in dict.fromkeys(m.path for m in members):
            found = tuple(map(len, self.coupling.weights[path]))
            if path in shapes and shapes[path] != found:
                raise OptionError(
                    "pattern",
                    f"pattern has structures of a network whose {path!r} has shape "
                    f"{found}; in params it has shape {shapes[path]}; expected those "
                    "of this network, wf.structures(net_fn, params, inputs)",
                )

    def masks(self, masks: Mapping[str, Any], gone: set[int]) -> dict[str, np.ndarray]:
        """Masks without some structures.

        Args:
            masks: From path to bool.
            gone: Units of structures.
        """
        found = {path: np.array(mask) for path, mask in masks.items()}
        for family in self.families:
            family.take_out(found, gone)
        return found

    def gone(self, masks: Mapping[str, Any], role: str = "inputs") -> set[int]:
        """Units of the structures of which masks leave nothing in some weights.

        Args:
            masks: From path to bool; of other weights everything is left.
            role: "inputs", the weights that read a structure, or "outputs", those that
                make it.
        """
        found = set()
        for family in self.families:
            own = [m for m in family.members if m.role in (role, "both")]
            if any(m.path not in masks for m in own):
                continue
            left = np.zeros(len(family.units), bool)
            for member in own:
                moved = np.moveaxis(np.asarray(masks[member.path]), member.axis, 0)
                stays = np.any(moved.reshape(len(moved), -1), axis=1)
                left |= np.any(stays[member.entries], axis=1)
            if own:
                found.update(np.array(family.units)[~left].tolist())
        return found

    def names(self, gone: set[int]) -> list[str]:
        """Of the families that some units belong to, in the order of the alphabet."""
        return sorted({f.name for f in self.families if gone.intersection(f.units)})

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Of all structures, by family."""
        return tuple(family.units for family in self.families)

    def account(
        self, gone: Iterable[int] = (), counted: Iterable[str] | None = None
    ) -> Account:
        """What the network costs without some structures.

        Args:
            gone: Units of structures.
            counted: Tensors whose parameters count; default all.
        """
        account = Account(self.coupling, self.examples, counted, self.speeds)
        for unit in gone:
            account.remove(unit)
        return account

    def __repr__(self) -> str:
        """The outcome in one line."""
        return (
            f"Structures(number={self.number}, families={len(self.families)}, "
            f"size={self.size}, macs={self.macs:.6g})"
        )

    def __str__(self) -> str:
        """A table of families, and what stays whole."""
        names = [_row_name(family) for family in self.families[:MOST_ROWS]]
        width = max(map(len, ["made by", *names]))
        lines = [
            f"{self.number:,} structures; {self.size:,} parameters, "
            f"{self.macs:,.0f} multiply-accumulates for one example",
            "",
            f"{'made by':{width}}  kind      number  one saves:",
            f"{'':{width}}                    parameters        MACs  in tensors",
        ]
        for family, name in zip(self.families, names, strict=False):
            tensors = len({m.path for m in family.members})
            lines.append(
                f"{name:{width}}  {family.kind:8}  {len(family.units):6}  "
                f"{family.size:10,}  {family.macs:10,.0f}  {tensors:10}"
            )
        if len(self.families) > MOST_ROWS:
            lines.append(f"{len(self.families) - MOST_ROWS} more: .families")
        reasons: dict[str, list[Whole]] = defaultdict(list)
        for whole in self.whole:
            reasons[whole.reason].append(whole)
        lines += ["", "left whole:"] if reasons else []
        for reason, those in reasons.items():
            first = f"{weight_name(those[0].path)}, axis {those[0].axis}"
            more = f" and {len(those) - 1} more" if those[1:] else ""
            lines.append(f"{first}{more}: {reason}")
        return "\n".join(lines)


def _row_name(family: Family) -> str:
    """The first tensor that makes the structures, and how many others do."""
    others = len({m.path for m in family.members if m.role == "outputs"}) - 1
    return weight_name(family.name) + (f" and {others} more" if others > 0 else "")


def structures(
    net_fn: Callable[[Params, Any], Any], params: Params, inputs: Any
) -> Structures:
    """Lists what can be taken out of a network, found in its own program.

    Channels go through sums, concatenations, norms, reshapes, slices, loops and calls;
    where they are summed over without a weight, enter an operation that is not
    followed, or are inputs or outputs of the function, they stay. The network is not
    executed.

    Args:
        net_fn: (params, inputs) -> outputs, in evaluation mode. Statistics of batch
            norms are best part of ``params``, such as ``{"params": ..., "batch_stats":
            ...}``, for they become smaller as well.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        inputs: The same, with a leading axis of examples.

    Returns:
        :class:`Structures`; printed it is a table.

    Example:
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]
        >>> params = {"a": jnp.ones((3, 5)), "b": jnp.ones(5), "c": jnp.ones((5, 2))}
        >>> found = wf.structures(net, params, jnp.ones((1, 3)))
        >>> found.number, found.families[0].kind, found.families[0].size
        (5, 'neurons', 6)
    """
    check_net(net_fn)
    given = [] if isinstance(inputs, Iterator) else jax.tree.leaves(inputs)
    lengths = [leaf.shape[0] for leaf in given if getattr(leaf, "shape", ())]
    if not any(lengths):
        got = f"a {type(inputs).__name__}"
        if not isinstance(inputs, Iterator):
            got = types_and_shapes(inputs)
        raise OptionError(
            "inputs",
            f"inputs={got} has no array with examples along its first axis; expected "
            "one batch, such as images [examples, height, width, channels]",
        )
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape"):
            raise OptionError(
                "params",
                f"params has a {type(leaf).__name__} at {path!r}; expected arrays "
                "alone: make it one by jnp.asarray, or let net_fn hold it",
            )
    with taken_by_net(inputs, batches=False):
        coupling = coupled(net_fn, params, inputs)
    known = traced(net_fn, params, inputs).all_axes()
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    roles = {
        path: _roles(shape, known.get(path)) or _used(coupling, path)
        for path, shape in shapes.items()
    }
    account = Account(coupling, lengths[0])
    families = tuple(
        _family(units, members, known, coupling, account)
        for units, members in _alike(coupling, roles)
    )
    size = sum(math.prod(shape) for shape in shapes.values())
    whole = tuple(_whole(coupling, roles, families))
    return Structures(families, whole, size, account.left["macs"], coupling, lengths[0])


def _roles(shape: Sequence[int], axes: WeightAxes | None) -> list[str]:
    """What each axis of a tensor is: "outputs", "inputs", "both" or neither ("").

    Nothing if that is not known of the tensor.
    """
    if axes is None or not axes.roles:
        return []
    found, part = [], 0
    for length in shape:
        letters, left = "", length
        while part < len(axes.shape) and (left > 1 or not letters):
            letters += axes.roles[part]
            left //= axes.shape[part]
            part += 1
        both = {"i", "o"} <= {*letters}
        name = "both" if both else "inputs" if "i" in letters else "outputs"
        found.append(name if {"i", "o"} & {*letters} else "")
    return found


def _used(coupling: Coupling, path: str) -> list[str]:
    """The same by what products do, for a tensor of more than one or after others."""

    def classes(axes: Iterable[Axis]) -> set[int]:
        return {c for a in axes for e in a for c in coupling.units.classes(e)}

    axes = coupling.weights[path]
    if len(axes) < 2:
        # A factor or a shift of outputs.
        return [""] * len(axes)
    read, made = classes(coupling.read[path]), classes(coupling.made[path])
    names = {
        (True, True): "both",
        (True, False): "inputs",
        (False, True): "outputs",
        (False, False): "",
    }
    return [
        names[not read.isdisjoint(own), not made.isdisjoint(own)]
        for own in (classes([axis]) for axis in axes)
    ]


def _alike(
    coupling: Coupling, roles: Mapping[str, Sequence[str]]
) -> list[tuple[tuple[int, ...], tuple[Member, ...]]]:
    """Units that can go, and their members, by family."""
    places: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(dict)
    for path, axes in coupling.weights.items():
        for i, axis in enumerate(axes):
            for entry, unit in free_entries(coupling, axis):
                places[unit].setdefault((path, i), []).append(entry)
    families: dict[tuple, list[int]] = defaultdict(list)
    for unit, own in places.items():
        families[tuple((at, len(e)) for at, e in own.items())].append(unit)
    found = []
    for signature, units in families.items():
        members = tuple(
            Member(
                path,
                axis,
                np.array([places[unit][path, axis] for unit in units]),
                roles[path][axis],
            )
            for (path, axis), _ in signature
        )
        if any(member.role for member in members):
            found.append((tuple(units), members))
    return found


def _family(
    units: tuple[int, ...],
    members: tuple[Member, ...],
    known: Mapping[str, WeightAxes],
    coupling: Coupling,
    account: Account,
) -> Family:
    costs = account.of(units[0])
    if coupling.units.is_head(units[0]):
        kind = "heads"
    else:
        own = (known.get(m.path) for m in members if m.role)
        letters = "".join(axes.roles for axes in own if axes is not None)
        kind = "channels" if "k" in letters else "neurons"
    return Family(kind, members, units, round(costs["size"]), costs["macs"])


def _whole(
    coupling: Coupling,
    roles: Mapping[str, Sequence[str]],
    families: Sequence[Family],
) -> Iterable[Whole]:
    listed = {(m.path, m.axis) for family in families for m in family.members}
    for path, axes in coupling.weights.items():
        for i, (axis, role) in enumerate(zip(axes, roles[path], strict=True)):
            if len(axis) == 1 or (path, i) in listed:
                continue
            if any(free_entries(coupling, axis)):
                if len(axes) > 1 and (coupling.read[path] or coupling.made[path]):
                    reason = (
                        "is made and read by one tensor, or stands between weights "
                        "alone"
                    )
                    yield Whole(path, i, reason)
            elif role:
                (first, *_) = coupling.units.classes(axis[0]) or (None,)
                reason = "" if first is None else coupling.units.reason(first)
                yield Whole(path, i, reason or "has entries that always stay")
