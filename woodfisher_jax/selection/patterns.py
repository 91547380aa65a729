"""Patterns: which weights stay or go together, and whether a network obeys one.

Patterns lie along the inputs and outputs of a weight, whatever the layout of its tensor
(:class:`~woodfisher_jax.trees.axes.WeightAxes`). Positions of a convolution's kernel
and stacked layers are kept apart.
"""

import math
import re
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.structures import KINDS, Structures
from woodfisher_jax.trees.axes import WeightAxes, given_axes
from woodfisher_jax.trees.blocks import FlatOrder, as_read, flat_order
from woodfisher_jax.trees.masks import Prunable, by_path, init_masks, left_out
from woodfisher_jax.trees.paths import Params, leaves_by_path

MOST_SUBSETS = 1000
"""Of a group of N:M, all of which are compared; 6:12 has 924."""

GroupNames = Callable[[str, tuple[int, ...]], np.ndarray]
"""(path, shape) -> the number of the group of each entry, an array of ints."""


class PatternError(ValueError):
    """A network that does not obey a pattern."""


class Pattern(NamedTuple):
    """A pattern by name, or by a function of its user.

    Attributes:
        name: As it was given, for messages.
        names: (path, shape, axes) -> what the numbers are told apart by (tensors with
            the same share groups), and the number of the group of each entry as it is
            read, [layers, outputs, inputs, positions].
        kept: N, the most weights of a group that stay; None where a group stays or
            goes as a whole.
        size: M, the weights of a group of N:M; None for other patterns.
        in_tensors: Whether no group crosses a tensor border.
        kinds: Of structures that go as a whole, with what reads and makes them; none
            for other patterns.
        structures: Those of the network, once it is known.
    """

    name: str
    names: Callable[[str, tuple[int, ...], WeightAxes], tuple[str, np.ndarray]]
    kept: int | None = None
    size: int | None = None
    in_tensors: bool = True
    kinds: tuple[str, ...] = ()
    structures: Structures | None = None

    @property
    def sparsity(self) -> float | None:
        """The one that N:M has, 1 - N/M; None where it is free."""
        if self.kept is None or self.size is None:
            return None
        return 1 - self.kept / self.size


class Groups(NamedTuple):
    """The groups of all prunable weights, numbered by their first weight.

    Attributes:
        of: The group of each weight of the flat vector, int32 [d].
        slots: The weight's place within its group, in the flat order, int32 [d].
        number: How many groups there are.
        layers: The layer that each lies in, or starts in, int32 [number].
        removals: Slots that may go together, int32 [num_choices, M - N], for N:M; None
            where a group goes as a whole.
        units: The group that tells what each structure is worth, by its unit; empty for
            other patterns.
        structures: Of a network whose structures go as a whole.
    """

    of: np.ndarray
    slots: np.ndarray
    number: int
    layers: np.ndarray
    removals: np.ndarray | None
    units: Mapping[int, int] = {}
    structures: Structures | None = None


# ------------------------------------------------------------------------ by their name


def _several(numbers: tuple[int, ...], name: str) -> Pattern:
    """N:M, N of M consecutive inputs."""
    kept, size = numbers
    if not 0 < kept < size:
        raise OptionError(
            "pattern", f"pattern={name!r}; expected N:M with 0 < N < M, such as 2:4"
        )
    if math.comb(size, kept) > MOST_SUBSETS:
        raise OptionError(
            "pattern",
            f"pattern={name!r} has {math.comb(size, kept):,} choices a group, and all "
            f"are compared; expected N:M with at most {MOST_SUBSETS:,}, such as 4:8",
        )

    def names(
        path: str, shape: tuple[int, ...], axes: WeightAxes
    ) -> tuple[str, np.ndarray]:
        _, _, inputs, _ = _told(path, axes, name)
        if inputs % size:
            raise OptionError(
                "pattern",
                f"pattern={name!r}: {path!r} of shape {shape} has {inputs} inputs, no "
                f"multiple of {size}; {left_out(path)}",
            )
        return path, _blocks(axes, size, 1)

    return Pattern(name, names, kept, size)


def _rectangles(numbers: tuple[int, ...], name: str) -> Pattern:
    """AxB, A inputs by B outputs; smaller at the end of a layer."""
    height, width = numbers
    if not (height and width):
        raise OptionError(
            "pattern", f"pattern={name!r}; expected AxB, both 1 or more, such as 4x1"
        )

    def names(
        path: str, shape: tuple[int, ...], axes: WeightAxes
    ) -> tuple[str, np.ndarray]:
        del shape
        _told(path, axes, name)
        return path, _blocks(axes, height, width)

    return Pattern(name, names)


def _filters(numbers: tuple[int, ...], name: str) -> Pattern:
    """All weights into one output."""
    del numbers

    def names(
        path: str, shape: tuple[int, ...], axes: WeightAxes
    ) -> tuple[str, np.ndarray]:
        del shape
        layers, outputs, _, _ = _told(path, axes, name)
        return path, np.arange(layers * outputs).reshape(layers, outputs, 1, 1)

    return Pattern(name, names)


def _heads(numbers: tuple[int, ...], name: str) -> Pattern:
    """What belongs to one head of attention, over the tensors of its layer."""

    def names(
        path: str, shape: tuple[int, ...], axes: WeightAxes
    ) -> tuple[str, np.ndarray]:
        layers, *_ = _told(path, axes, name)
        heads = math.prod(axes.shape[axis] for axis in axes.heads)
        if not axes.heads or numbers not in ((), (heads,)):
            found = f"has {heads} heads" if axes.heads else "has no heads"
            raise OptionError(
                "pattern",
                f"pattern={name!r}: {path!r} of shape {shape} {found} in the loss; set "
                "prunable to the projections of attention, such as 'attn', or let "
                "pattern be a function (path, shape) -> group numbers",
            )
        # Heads of stacked layers are apart: their axes count as slower ones.
        counting = [i for i, role in enumerate(axes.roles) if role == "s"]
        number = np.zeros((1,) * len(axes.shape), int)
        for axis in (*counting, *axes.heads):
            index = np.arange(axes.shape[axis])
            wide = [-1 if i == axis else 1 for i in range(len(axes.shape))]
            number = number * axes.shape[axis] + index.reshape(wide)
        assert number.size == layers * heads
        return axes.attention, as_read(axes, np.broadcast_to(number, axes.shape))

    return Pattern(name, names, in_tensors=False)


def _structures(numbers: tuple[int, ...], name: str) -> Pattern:
    """Channels, neurons and heads, as far as they can be taken out."""
    del numbers
    kinds = KINDS if name == "structures" else (name,)
    return Pattern(name, _no_names, in_tensors=False, kinds=kinds)


def _no_names(
    path: str, shape: tuple[int, ...], axes: WeightAxes
) -> tuple[str, np.ndarray]:
    raise OptionError(
        "pattern",
        f"structures of {path!r} are not known without a network; expected a function "
        "and inputs, from which wf.structures finds them",
    )


PATTERNS: dict[str, tuple[str, Callable[[tuple[int, ...], str], Pattern]]] = {
    "N:M": (r"(\d+):(\d+)", _several),
    "AxB": (r"(\d+)x(\d+)", _rectangles),
    "filters": (r"filters", _filters),
    "structures": (r"structures", _structures),
    "channels": (r"channels", _structures),
    "neurons": (r"neurons", _structures),
    "heads": (r"heads", _heads),
    "heads:H": (r"heads:(\d+)", _heads),
}
"""For each kind of pattern what its names look like, and what makes one of it."""


KNOWN = (
    f"one of {list(PATTERNS)} with numbers for the letters (such as '2:4', '4x1' or "
    "'heads:6'), a function or None"
)
"""What :func:`parse` takes."""


def parse(
    pattern: "str | GroupNames | Structures | Pattern | None", known: str = KNOWN
) -> Pattern | None:
    """A pattern by its name, or of a function.

    Args:
        pattern: "2:4" (any N:M: of M consecutive inputs N stay), "4x1" (any AxB: A
            inputs by B outputs go together), "filters" (all weights into one output),
            "heads" (attention heads; "heads:6" says how many there are), "structures"
            (all that :func:`woodfisher_jax.structures` finds; "channels" or "neurons"
            of them), or what that found; a function
            (path, shape) ->
            the number of each entry's group, an array that broadcasts to the shape,
            where the same number in several tensors is one group; or None.
        known: What the caller takes, for the message; default all of this.

    Returns:
        The pattern; None for None, single weights.

    Raises:
        ValueError: If the name is that of no pattern.
    """
    if pattern is None or isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, Structures):
        return _structures((), "structures")._replace(structures=pattern)
    if callable(pattern):
        return Pattern(
            getattr(pattern, "__name__", "a function"),
            lambda path, shape, axes: (
                "",
                as_read(axes, _checked_names(pattern(path, shape), path, shape)),
            ),
            in_tensors=False,
        )
    for form, make in PATTERNS.values():
        found = re.fullmatch(form, str(pattern))
        if found:
            return make(tuple(int(number) for number in found.groups()), str(pattern))
    raise OptionError(
        "pattern",
        f"pattern={pattern!r}; expected {known}",
    )


def _checked_names(names: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
    names = np.asarray(names)
    try:
        fits = np.broadcast_shapes(names.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits or not np.issubdtype(names.dtype, np.integer):
        raise ValueError(
            f"pattern gives {path!r} group numbers of shape {names.shape} and dtype "
            f"{names.dtype}; expected integers that broadcast to {shape}"
        )
    return np.broadcast_to(names, shape)


def _told(path: str, axes: WeightAxes, name: str) -> tuple[int, int, int, int]:
    """Layers, outputs, inputs and positions of a tensor, where they are certain."""
    if axes.doubt or not axes.roles:
        reason = axes.doubt if len(axes.shape) > 1 else ""
        letters = "soikkk"[len(axes.shape) < 5 :][: len(axes.shape)]
        raise OptionError(
            "pattern",
            f"pattern={name!r}: {path!r} of shape {axes.shape} "
            f"{reason or 'has no inputs and outputs'}; {left_out(path)}, or give what "
            f"tells its axes: loss_fn and samples, or axes={{{path!r}: {letters!r}}} "
            "(o outputs, i inputs, k positions, s stacked layers)",
        )
    return axes.sizes


def _blocks(axes: WeightAxes, height: int, width: int) -> np.ndarray:
    """Numbers of blocks of so many inputs by outputs.

    Layers and positions are kept apart: [layers, outputs, inputs, positions].
    """
    layers, outputs, inputs, positions = axes.sizes
    rows, columns = -(-inputs // height), -(-outputs // width)
    layer = np.arange(layers)[:, None, None, None]
    output = np.arange(outputs)[:, None, None] // width
    block = np.arange(inputs)[:, None] // height
    position = np.arange(positions)
    return ((layer * positions + position) * rows + block) * columns + output


def check_goal(
    pattern: Pattern,
    sparsity: float | None,
    scope: str,
    flops_target: float | None,
    flops_power: float,
) -> None:
    """Raises if a pattern does not go with a goal.

    Raises:
        OptionError: Naming what contradicts it.
    """
    name = pattern.name
    if pattern.kinds:
        if flops_power:
            raise OptionError(
                "pattern",
                f"pattern={name!r} with flops_power={flops_power}; expected "
                "flops_target, with which structures compete by what they cost",
            )
        return
    if flops_target is not None:
        raise OptionError(
            "pattern",
            f"pattern={name!r} with flops_target={flops_target}; expected a sparsity, "
            "with flops_power if costs are to count",
        )
    if scope != "global" and not pattern.in_tensors:
        raise OptionError(
            "pattern",
            f"pattern={name!r} with scope={scope!r}; expected scope='global', for its "
            "groups cross tensors",
        )
    own = pattern.sparsity
    if own is None:
        return
    if sparsity is not None and sparsity > own + 1e-6:
        raise OptionError(
            "pattern",
            f"sparsity={sparsity} with pattern={name!r}, which has {own:.6g}; expected "
            "that, or less for a step on the way",
        )
    if flops_power:
        raise OptionError(
            "pattern",
            f"pattern={name!r} with flops_power={flops_power}; expected 0, for it has "
            "the same sparsity in all tensors",
        )


# ------------------------------------------------------------------------ their groups


def groups_of(pattern: Pattern, order: FlatOrder) -> Groups:
    """The groups of a pattern over all prunable tensors.

    Args:
        pattern: From :func:`parse`.
        order: The flat order of the tensors.

    Raises:
        ValueError: If the pattern does not fit a tensor; with its path.
    """
    if pattern.kinds:
        return _structured(pattern, order)
    keys: dict[str, int] = {}
    parts, owners = [], []
    for path, shape, axes in zip(order.paths, order.shapes, order.axes, strict=True):
        key, names = pattern.names(path, shape, axes)
        if names.ndim > 1:
            names = np.broadcast_to(names, axes.sizes).reshape(-1)
        parts.append(names.astype(np.int64))
        owners.append(np.full(len(names), keys.setdefault(key, len(keys))))
    names, owner = np.concatenate(parts), np.concatenate(owners)
    if len(keys) > 1:
        # Names of tensors with different keys are apart; those of a key are dense.
        sizes = np.zeros(len(keys), np.int64)
        np.maximum.at(sizes, owner, names + 1)
        names = names + (np.cumsum(sizes) - sizes)[owner]
    return _numbered(names, order)._replace(removals=_removals(pattern))


def _numbered(names: np.ndarray, order: FlatOrder) -> Groups:
    """Groups of the flat vector by the names of its weights, ints [d]."""
    _, first, of = np.unique(names, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    of = place[of.reshape(-1)]
    by_group = np.argsort(of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of))[:-1]])
    slots = np.empty(order.size, np.int32)
    slots[by_group] = np.arange(order.size) - starts[of[by_group]]
    layers = np.searchsorted(order.layers, np.sort(first), side="right") - 1
    of = of.astype(np.int32)
    return Groups(of, slots, len(first), layers.astype(np.int32), None)


def _structured(pattern: Pattern, order: FlatOrder) -> Groups:
    """Groups that tell what structures are worth: the weights that read them.

    What makes a structure does nothing without them, so it goes too and is not counted
    again. Only a structure that no prunable weight reads is worth what makes it.
    """
    if pattern.structures is None:
        _no_names(order.paths[0], order.shapes[0], order.axes[0])
    assert pattern.structures is not None
    found = pattern.structures.of(pattern.kinds)
    names = {path: np.full(shape, -1) for path, shape in _shapes(order).items()}
    units: dict[int, int] = {}
    for family in found.families:
        own = [m for m in family.members if m.path in names]
        mine = [m for m in own if m.role == "inputs"] or [m for m in own if m.role]
        for i, unit in enumerate(family.units if mine else ()):
            for member in mine:
                at: list[Any] = [slice(None)] * names[member.path].ndim
                at[member.axis] = member.entries[i]
                names[member.path][tuple(at)] = len(units)
            units[unit] = len(units)
    flat = np.concatenate(
        [as_read(a, names[p]) for p, a in zip(order.paths, order.axes, strict=True)]
    )
    if not units:
        raise OptionError(
            "pattern",
            f"pattern={pattern.name!r}: the network has none in its prunable tensors; "
            "wf.structures(net_fn, params, inputs) lists what there is",
        )
    alone = flat < 0
    groups = _numbered(np.where(alone, len(units) + np.arange(order.size), flat), order)
    number = np.empty(len(units), int)
    number[flat[~alone]] = groups.of[~alone]
    owners = {unit: int(number[i]) for unit, i in units.items()}
    return groups._replace(units=owners, structures=found)


def _shapes(order: FlatOrder) -> dict[str, tuple[int, ...]]:
    return dict(zip(order.paths, order.shapes, strict=True))


def _removals(pattern: Pattern) -> np.ndarray | None:
    if pattern.kept is None or pattern.size is None:
        return None
    gone = pattern.size - pattern.kept
    return np.array(list(combinations(range(pattern.size), gone)), np.int32)


def check(
    tensors: Params | Mapping[str, jax.Array],
    pattern: str | GroupNames,
    prunable: Prunable = None,
    axes: Mapping[str, str | WeightAxes] | None = None,
) -> int:
    """Raises unless every group of a network obeys the pattern.

    Of N:M, at most N weights of a group are not zero; of other patterns all of them or
    none.

    Args:
        tensors: Masks, or any pytree of weights, in which zeros count as pruned.
        pattern: As for :func:`parse`.
        prunable: Which of the tensors, as for :func:`woodfisher_jax.prune`; default all
            masks, or arrays of two or more dimensions.
        axes: What the axes of the tensors are, as for :func:`woodfisher_jax.prune`;
            with masks those of other weights do not count. Default what Flax's
            convention says of kernels.

    Returns:
        The number of groups.

    Raises:
        PatternError: If one does not, with the first of them and how many there are.
        ValueError: If the pattern does not fit a tensor.
    """
    rule = parse(pattern)
    if rule is None:
        raise ValueError("pattern=None; expected a pattern to check, such as '2:4'")
    leaves = leaves_by_path(tensors)
    kinds = {getattr(leaf, "dtype", type(leaf)) for leaf in leaves.values()}
    are_masks = prunable is None and kinds <= {np.dtype(bool), bool}
    leaves = by_path(tensors) if are_masks else leaves
    if not leaves:
        raise ValueError("tensors hold no arrays; expected masks, or weights")
    known = None if axes is None else given_axes(axes, leaves)
    chosen = leaves if are_masks else init_masks(tensors, prunable, known)
    order = flat_order(chosen, known)
    groups = groups_of(rule, order)
    kept = np.concatenate(
        [
            as_read(own, np.asarray(leaves[path]) != 0)
            for path, own in zip(order.paths, order.axes, strict=True)
        ]
    )
    number = np.bincount(groups.of, kept, groups.number)
    size = np.bincount(groups.of, minlength=groups.number)
    most = size if rule.kept is None else rule.kept
    broken = (number > most) | ((rule.kept is None) & (number > 0) & (number < size))
    if not broken.any():
        return groups.number
    worst = int(np.argmax(broken))
    path, position = _position(order, int(np.argmax(groups.of == worst)))
    expected = (
        "all of them or none"
        if rule.kept is None
        else f"at most {rule.kept} that are not zero"
    )
    raise PatternError(
        f"pattern {rule.name!r} is broken by {int(broken.sum()):,} of "
        f"{groups.number:,} groups; the first, from {path!r} {position} on, has "
        f"{int(number[worst])} nonzero of {size[worst]} weights, expected {expected}"
    )


def _position(order: FlatOrder, entry: int) -> tuple[str, tuple[int, ...]]:
    """The tensor of an entry of the flat vector, and where it is there."""
    tensor = int(np.searchsorted(order.offsets, entry, side="right")) - 1
    axes = order.axes[tensor]
    place = np.unravel_index(
        entry - order.offsets[tensor], [axes.shape[axis] for axis in axes.order]
    )
    cut = [place[axes.order.index(axis)] for axis in range(len(axes.shape))]
    flat = np.ravel_multi_index(cut, axes.shape)
    position = np.unravel_index(flat, order.shapes[tensor])
    return order.paths[tensor], tuple(int(i) for i in position)
