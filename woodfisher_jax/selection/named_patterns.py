"""Patterns by their names: which weights of a tensor stay or go together.

Patterns lie along the inputs and outputs of a weight, whatever the layout of its tensor
(:class:`~woodfisher_jax.trees.axes.WeightAxes`). Positions of a convolution's kernel
and stacked layers are kept apart.
"""

import difflib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.structures import KINDS, Structures
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.blocks import as_read
from woodfisher_jax.trees.masks import left_out

MOST_SUBSETS = 1000
"""Of a group of N:M, all of which are compared; 6:12 has 924."""

GroupNames = Callable[[str, tuple[int, ...]], np.ndarray]
"""(path, shape) -> the number of the group of each entry, an array of ints."""


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
                f"pattern={name!r}: {path!r} of shape {shape} {found} in the loss; "
                "expected pattern=wf.structures(net_fn, params, inputs).of(['heads']), "
                "which leaves other tensors whole, or a prunable that matches the "
                "projections of attention alone",
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
    return Pattern(name, no_names, in_tensors=False, kinds=kinds)


def no_names(
    path: str, shape: tuple[int, ...], axes: WeightAxes
) -> tuple[str, np.ndarray]:
    """Refuses structures, which the axes of one tensor do not tell."""
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
        every = _structures((), "structures")
        return every._replace(name=repr(pattern), structures=pattern)
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
    words = [name for name in PATTERNS if name.isalpha()]
    close = difflib.get_close_matches(str(pattern).lower(), words, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError("pattern", f"pattern={pattern!r}; expected {known}{hint}")


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
