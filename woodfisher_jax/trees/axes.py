"""What the axes of a weight tensor are: outputs, inputs, positions, stacked layers."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from woodfisher_jax.options import OptionError
from woodfisher_jax.trees.paths import Params, leaves_by_path, weight_name

ROLES = "soik"
"""Roles by letter, in the order in which the entries of a tensor are read: stacked
layers (or experts), outputs, inputs, and positions of a convolution's kernel."""


class WeightAxes(NamedTuple):
    """The role of each axis of a weight tensor.

    Attributes:
        shape: The tensor's shape, where an axis that has several roles is cut into one
            axis for each.
        roles: A letter of :data:`ROLES` for each entry of ``shape``; "" where they are
            not known: then the tensor is read as it lies, as one layer.
        heads: The axes of ``shape`` that count attention heads.
        attention: What tensors of one attention layer share; "" without heads.
        doubt: Why a pattern cannot rely on the roles, a clause whose subject is the
            tensor; "" where it can.
        multiplied: Whether it is certain that a layer multiplies the tensor.

    Example:
        >>> axes = wf.WeightAxes((3, 3, 16, 32), "kkio")
        >>> axes.order, axes.sizes
        ((3, 2, 0, 1), (1, 32, 16, 9))
    """

    shape: tuple[int, ...]
    roles: str = ""
    heads: tuple[int, ...] = ()
    attention: str = ""
    doubt: str = ""
    multiplied: bool = True

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of ``shape`` in the order in which they are read, slowest first.

        A chunk of consecutive entries then holds the weights of a few outputs, whose
        gradients are correlated, whatever the layout of the tensor.
        """
        if not self.roles:
            return tuple(range(len(self.shape)))
        return tuple(
            sorted(range(len(self.shape)), key=lambda i: ROLES.index(self.roles[i]))
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Layers, outputs, inputs and positions; without roles all are outputs."""
        if not self.roles:
            return 1, math.prod(self.shape), 1, 1
        layers, outputs, inputs, positions = (
            math.prod(n for n, r in zip(self.shape, self.roles, strict=True) if r == r_)
            for r_ in ROLES
        )
        return layers, outputs, inputs, positions


Axes = Mapping[str, WeightAxes]
"""From the path of a tensor to its axes."""


def conventional(path: str, shape: tuple[int, ...]) -> WeightAxes:
    """The axes by Flax's convention: (..., inputs, outputs) of a ``kernel``.

    What a loss does with a tensor says more; see
    :func:`woodfisher_jax.tracing.axes.find_axes`.

    Args:
        path: The tensor's path.
        shape: Its shape.

    Returns:
        Roles for a kernel of two or four dimensions, which is a dense layer or a
        convolution; else in doubt.

    Example:
        >>> wf.axes.conventional("conv/kernel", (3, 3, 16, 32)).roles
        'kkio'
    """
    unknown = "has axes that cannot be told by its name and shape"
    # NNX states end in "kernel/value".
    if path.removesuffix("/value").split("/")[-1] != "kernel" or len(shape) < 2:
        return WeightAxes(shape, doubt=unknown)
    roles = "k" * (len(shape) - 2) + "io"
    return WeightAxes(shape, roles, doubt="" if len(shape) in (2, 4) else unknown)


def given_axes(
    axes: Mapping[str, str | WeightAxes], params: Params
) -> dict[str, WeightAxes]:
    """The axes that a user writes as one letter each.

    Args:
        axes: From a regular expression, searched in the path, to letters of
            :data:`ROLES`, such as ``{"conv": "oikk"}``; or from a path to axes. Axes
            of other tensors do not count, if each of these has its own.
        params: Any pytree of arrays.

    Returns:
        From the path of each tensor that an expression matches; of several, the last.

    Raises:
        OptionError: If an expression matches no tensor, a path none while some tensor
            has no axes, or letters do not fit.

    Example:
        >>> params = {"dense": jnp.ones((3, 2))}
        >>> wf.axes.given_axes({"den": "oi"}, params)["dense"].sizes
        (1, 3, 2, 1)
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(params).items()}
    found: dict[str, WeightAxes] = {}
    others = []
    for name, letters in axes.items():
        exact = isinstance(letters, WeightAxes)
        paths = [
            path
            for path in shapes
            if (
                weight_name(path) == weight_name(name)
                if exact
                else re.search(name, path)
            )
        ]
        if not paths and not exact:
            raise _unknown(name, shapes)
        if not paths:
            others.append(name)
        for path in paths:
            found[path] = (
                letters
                if isinstance(letters, WeightAxes)
                else _lettered(path, letters, shapes[path])
            )
            if math.prod(found[path].shape) != math.prod(shapes[path]):
                raise OptionError(
                    "axes",
                    f"axes[{path!r}] are of shape {found[path].shape}; expected "
                    f"{shapes[path]}, or its axes cut into parts",
                )
    without = [path for path in shapes if path not in found]
    if others and without:
        # One of them may be meant.
        raise _unknown(others[0], shapes, f", and has nothing of {without[0]!r}")
    return found


def _unknown(
    name: str, shapes: Mapping[str, tuple[int, ...]], more: str = ""
) -> OptionError:
    return OptionError(
        "axes",
        f"axes names {name!r}, which is none of the tensors{more}; expected some of "
        f"{list(shapes)}",
    )


def _lettered(path: str, letters: str, shape: tuple[int, ...]) -> WeightAxes:
    fits = isinstance(letters, str) and len(letters) == len(shape)
    if not fits or set(letters) - set(ROLES):
        raise OptionError(
            "axes",
            f"axes={letters!r} for {path!r} of shape {shape}; expected one letter for "
            "each axis: o outputs, i inputs, k positions of a convolution, s stacked "
            "layers",
        )
    return WeightAxes(shape, letters)
