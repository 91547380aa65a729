"""The groups that a pattern makes of a network's weights, and whether it obeys one."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import jax
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.named_patterns import (
    GroupNames,
    Pattern,
    no_names,
    parse,
)
from woodfisher_jax.selection.structures import Member, Structures
from woodfisher_jax.trees.axes import WeightAxes, given_axes
from woodfisher_jax.trees.blocks import FlatOrder, as_read, flat_order
from woodfisher_jax.trees.masks import by_path
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.prunable import Prunable, init_masks


class PatternError(ValueError):
    """A network that does not obey a pattern."""


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


def groups_of(pattern: Pattern, order: FlatOrder) -> Groups:
    """The groups of a pattern over all prunable tensors.

    Args:
        pattern: From :func:`~woodfisher_jax.selection.named_patterns.parse`.
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
    again. Only a structure that no prunable weight reads is worth what makes it, and so
    is one whose readers are of larger structures as well: dimensions of values, which
    lie across all heads. One whose makers are, too, stays.
    """
    if pattern.structures is None:
        no_names(order.paths[0], order.shapes[0], order.axes[0])
    assert pattern.structures is not None
    found = pattern.structures.of(pattern.kinds)
    shapes = dict(zip(order.paths, order.shapes, strict=True))
    found.check_fits(shapes)
    names = {path: np.full(shape, -1) for path, shape in shapes.items()}
    units: dict[int, int] = {}
    for family in sorted(found.families, key=lambda family: -family.size):
        own = [m for m in family.members if m.path in names]
        readers = [m for m in own if m.role == "inputs"]
        makers = [m for m in own if m.role in ("outputs", "both")]
        free = (some for some in (readers, makers) if some and _are_free(names, some))
        for member in next(free, []):
            for i, unit in enumerate(family.units):
                names[member.path][member.at(i)] = units.setdefault(unit, len(units))
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
    number = np.full(len(units), -1)
    number[flat[~alone]] = groups.of[~alone]
    assert np.all(number >= 0), "a structure without a weight of its own"
    owners = {unit: int(number[i]) for unit, i in units.items()}
    return groups._replace(units=owners, structures=found)


def _are_free(names: Mapping[str, np.ndarray], members: Sequence[Member]) -> bool:
    """Whether no weight of a family has the name of another structure yet."""
    taken = (names[m.path][m.at(slice(None))] for m in members)
    return all(np.all(some < 0) for some in taken)


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
        pattern: As for :func:`~woodfisher_jax.selection.named_patterns.parse`.
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
