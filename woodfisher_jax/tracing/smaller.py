"""A function's program on arrays from which entries have been taken out."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from woodfisher_jax.tracing.coupling import Coupling
from woodfisher_jax.tracing.entries.units import Array, Axis
from woodfisher_jax.tracing.flat import bind
from woodfisher_jax.tracing.primitives import (
    CALLS,
    MADE,
    PRODUCTS,
    Position,
    called,
    scan_operands,
)

Watch = Callable[[Position, Any, list[tuple[Any, Array]]], None]
"""Sees each product: its position, its equation, its operands' values and axes."""


class Smaller:
    """A program without some of its units.

    Attributes:
        coupling: Of the whole program.
        gone: The classes of units that are taken out.
    """

    def __init__(
        self, coupling: Coupling, gone: set[int], watch: Watch | None = None
    ) -> None:
        """Keeps what is given.

        Args:
            coupling: Of the whole program.
            gone: Classes of units.
            watch: Sees products; then rounds of loops run one after another, and
                all branches, so that it sees numbers.
        """
        self.coupling = coupling
        self.gone = gone
        self._watch = watch
        # By identity, with the axis, so that no other takes its place.
        self._kept: dict[int, tuple[Axis, np.ndarray]] = {}

    def kept(self, axis: Axis) -> np.ndarray:
        """Which entries of an axis are left, as indices."""
        if id(axis) not in self._kept:
            classes = self.coupling.units.classes
            stays = [not self.gone.intersection(classes(entry)) for entry in axis]
            self._kept[id(axis)] = (axis, np.flatnonzero(stays))
        return self._kept[id(axis)][1]

    def cut(self, array: Any, axes: Sequence[Axis]) -> Any:
        """An array of the whole program without what is taken out."""
        for i, axis in enumerate(axes):
            left = self.kept(axis)
            if len(left) < len(axis):
                array = array.take(left, axis=i)
        return array

    def shape(self, axes: Sequence[Axis]) -> tuple[int, ...]:
        """The shape of an array of the whole program after that."""
        return tuple(len(self.kept(axis)) for axis in axes)

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Evaluates the program.

        Args:
            leaves: Of smaller parameters and of inputs.

        Returns:
            The leaves of the function's result.
        """
        program, coupling = self.coupling.program, self.coupling
        arguments = [Array(axes) for axes in coupling.weights.values()]
        given = program.jaxpr.invars[len(arguments) :]
        whole = [Array(tuple(_all(n) for n in v.aval.shape), True) for v in given]
        return self._walk(
            program.jaxpr,
            list(zip(leaves, [*arguments, *whole], strict=True)),
            program.consts,
            (),
        )

    def _walk(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[tuple[Any, Array]],
        constants: Sequence[Any],
        position: Position,
    ) -> list[Any]:
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        held = self.coupling.held[position]
        for variable, value, array in zip(
            jaxpr.constvars, constants, held, strict=True
        ):
            known[variable] = (self.cut(value, array.axes), array)

        def read(atom: Any) -> tuple[Any, Array]:
            if isinstance(atom, Literal):
                shape = getattr(atom.aval, "shape", ())
                return atom.val, Array(tuple(_all(n) for n in shape))
            return known[atom]

        for i, equation in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in equation.invars]
            here = (*position, i)
            outcomes = self.coupling.outcomes[here]
            outputs = self._step(equation, inputs, outcomes, here)
            known.update(
                zip(equation.outvars, zip(outputs, outcomes, strict=True), strict=True)
            )
        return [read(atom)[0] for atom in jaxpr.outvars]

    def _step(
        self,
        equation: Any,
        inputs: list[tuple[Any, Array]],
        outcomes: list[Array],
        position: Position,
    ) -> list[Any]:
        name = equation.primitive.name
        values = [value for value, _ in inputs]
        if name in CALLS:
            inner, constants = called(equation)
            return self._walk(inner, inputs, constants, position)
        if name == "scan":
            return self._scan(equation, inputs, position)
        if name == "cond":
            return self._cond(equation, inputs, position)
        if name in PRODUCTS and self._watch is not None:
            self._watch(position, equation, inputs)
        shapes = [self.shape(array.axes) for array in outcomes]
        change = _CHANGES.get(name)
        if name == "slice" and self._irregular(equation, inputs[0][1]):
            found = [self._picked(equation, *inputs[0])]
        elif name in MADE:
            found = [self.cut(bind(equation, values)[0], outcomes[0].axes)]
        elif change is None:
            found = bind(equation, values)
        else:
            arrays = [array for _, array in inputs]
            settings = equation.params | change(self, equation, arrays, outcomes)
            result = equation.primitive.bind(*values, **settings)
            found = list(result) if equation.primitive.multiple_results else [result]
        for value, shape in zip(found, shapes, strict=True):
            if value.shape != shape:
                raise ValueError(
                    f"the program cannot be made smaller: {name!r} gives "
                    f"{value.shape}, expected {shape}"
                )
        return found

    def _irregular(self, equation: Any, array: Array) -> bool:
        """Whether what is left of a cut with a stride is no such cut."""
        strides = equation.params["strides"] or ()
        return any(
            stride != 1 and len(self.kept(axis)) < len(axis)
            for axis, stride in zip(array.axes, strides, strict=False)
        )

    def _picked(self, equation: Any, value: Any, array: Array) -> Any:
        """A slice, entry by entry."""
        settings = equation.params
        cuts = map(
            slice,
            settings["start_indices"],
            settings["limit_indices"],
            settings["strides"],
        )
        for i, (axis, own) in enumerate(zip(array.axes, cuts, strict=True)):
            left, chosen = self.kept(axis), np.arange(len(axis))[own]
            value = value.take(
                np.searchsorted(left, np.intersect1d(chosen, left)), axis=i
            )
        return value

    def _scan(
        self, equation: Any, inputs: list[tuple[Any, Array]], position: Position
    ) -> list[Any]:
        settings = equation.params
        body = settings["jaxpr"]
        consts, state, stacks = scan_operands(equation, inputs)
        each = [Array(array.axes[1:]) for _, array in stacks]

        def step(carry: list[Any], parts: list[Any]) -> tuple[list[Any], list[Any]]:
            own = [(x, a) for x, (_, a) in zip(carry, state, strict=True)]
            rows = list(zip(parts, each, strict=True))
            found = self._walk(
                body.jaxpr, [*consts, *own, *rows], body.consts, position
            )
            return found[: len(state)], found[len(state) :]

        watched = self._watch is not None and settings["length"] > 0
        # Not compiled, a loop gives its body numbers.
        with jax.disable_jit() if watched else contextlib.nullcontext():
            carry, rows = jax.lax.scan(
                step,
                [value for value, _ in state],
                [value for value, _ in stacks],
                length=settings["length"],
                reverse=settings["reverse"],
                unroll=settings["unroll"],
            )
        return [*carry, *rows]

    def _cond(
        self, equation: Any, inputs: list[tuple[Any, Array]], position: Position
    ) -> list[Any]:
        arrays = [array for _, array in inputs[1:]]

        def option(i: int, branch: Any) -> Callable[..., list[Any]]:
            return lambda *values: self._walk(
                branch.jaxpr,
                list(zip(values, arrays, strict=True)),
                branch.consts,
                (*position, i),
            )

        branches = equation.params["branches"]
        functions = [option(i, branch) for i, branch in enumerate(branches)]
        values = [value for value, _ in inputs]
        if self._watch is None:
            return list(jax.lax.switch(values[0], functions, *values[1:]))
        results = [function(*values[1:]) for function in functions]
        return results[int(jnp.clip(values[0], 0, len(results) - 1))]


def _all(length: int) -> Axis:
    """An axis of which nothing is taken out."""
    return ((),) * length


# Of each primitive whose settings have lengths in them, those of the smaller program.
_Change = Callable[[Smaller, Any, list[Array], list[Array]], dict[str, Any]]


def _shaped(name: str) -> _Change:
    return lambda small, _, inputs, outcomes: {name: small.shape(outcomes[0].axes)}


def _sliced(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    del outcomes
    settings = equation.params

    def places(name: str) -> tuple[int, ...]:
        return tuple(
            int(np.searchsorted(small.kept(axis), number))
            for axis, number in zip(inputs[0].axes, settings[name], strict=True)
        )

    return {name: places(name) for name in ("start_indices", "limit_indices")}


def _divided(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    del inputs
    along = equation.params["axis"]
    return {"sizes": tuple(len(small.kept(a.axes[along])) for a in outcomes)}


def _padded(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    config = []
    for own, axis, (low, high, inside) in zip(
        inputs[0].axes,
        outcomes[0].axes,
        equation.params["padding_config"],
        strict=True,
    ):
        left = small.kept(axis)
        if len(left) < len(axis):
            low = int(np.searchsorted(left, low))
            high = len(left) - low - len(small.kept(own))
        config.append((low, high, inside))
    return {"padding_config": tuple(config)}


def _looked_up(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    del outcomes
    sizes = tuple(
        len(small.kept(axis)) if size == len(axis) else size
        for axis, size in zip(
            inputs[0].axes, equation.params["slice_sizes"], strict=True
        )
    )
    return {"slice_sizes": sizes}


def _tiled(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    reps = zip(inputs[0].axes, outcomes[0].axes, equation.params["reps"], strict=True)
    return {"reps": tuple(n if len(a) > 1 else len(small.kept(b)) for a, b, n in reps)}


def _grouped(
    small: Smaller, equation: Any, inputs: list[Array], outcomes: list[Array]
) -> dict[str, Any]:
    del outcomes
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["feature_group_count"]
    features = inputs[0].axes[numbers.lhs_spec[1]]
    # Only groups of one channel can go as a whole.
    single = groups == len(features)
    return {"feature_group_count": len(small.kept(features)) if single else groups}


_CHANGES: Mapping[str, _Change] = {
    "broadcast_in_dim": _shaped("shape"),
    "conv_general_dilated": _grouped,
    "dynamic_slice": _looked_up,
    "gather": _looked_up,
    "pad": _padded,
    "reshape": _shaped("new_sizes"),
    "slice": _sliced,
    "split": _divided,
    "tile": _tiled,
}
