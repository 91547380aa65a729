"""Entries of weights and activations that can only be taken out together.

The program of a function is walked once, and every axis of every array is a list of
entries (:mod:`woodfisher_jax.tracing.entries.units`). An equation says which entries
meet: those of a weight's inputs those of what it multiplies
(:mod:`woodfisher_jax.tracing.entries.products`), both terms of a sum one another
(:mod:`woodfisher_jax.tracing.entries.rules`).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr

from woodfisher_jax.tracing import values
from woodfisher_jax.tracing.entries import rules
from woodfisher_jax.tracing.entries.products import EntryProducts
from woodfisher_jax.tracing.entries.units import Array, Axis, Units
from woodfisher_jax.tracing.primitives import (
    CALLS,
    PRODUCTS,
    Position,
    called,
    dependent,
    scan_operands,
)
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.paths import Params, leaves_by_path


class Coupling:
    """Which entries of a function's weights go together.

    Attributes:
        units: Of all entries.
        weights: The axes of each tensor by path.
        costs: Of each product, in order.
        read: Of each tensor, the axes that products with activations are summed over.
        made: Of each tensor, the axes that such products give their outputs.
        outcomes: Of each equation that was walked, its results.
        held: Of each call that was walked, the arrays that its function holds.
        program: The function's jaxpr.
    """

    def __init__(
        self, program: ClosedJaxpr, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Walks a program.

        Args:
            program: Of a function of (params, inputs).
            shapes: Of the parameters by path, in their tree's order.
        """
        self.units = Units()
        self.program = program
        self.outcomes: dict[Position, list[Array]] = {}
        self.held: dict[Position, list[Array]] = {}
        self.weights = {
            path: self.units.array(shape).axes for path, shape in shapes.items()
        }
        self._products = EntryProducts(self.units, self.weights)
        self.costs, self.read = self._products.costs, self._products.read
        self.made = self._products.made
        jaxpr = program.jaxpr
        held = self._held_arrays(program.consts)
        given = jaxpr.invars[len(shapes) :]
        arrays = [
            *(
                Array(a, False, frozenset([p]), len(a) > 1, values.masked(v.aval))
                for (p, a), v in zip(self.weights.items(), jaxpr.invars, strict=False)
            ),
            *(
                self.units.array(v.aval.shape, True, "belongs to the inputs")
                for v in given
            ),
        ]
        self.held[()] = [array._replace(value=None) for array in held]
        read = {a for e in jaxpr.eqns for a in e.invars if isinstance(a, Var)}
        read.update(a for a in jaxpr.outvars if isinstance(a, Var))
        for variable, array in zip(jaxpr.invars, arrays, strict=True):
            # What was made of it is no equation of the program any more.
            if variable not in read:
                self.units.fix_array(array, "is read by nothing that is returned")
        for output in self._walk(jaxpr, arrays, held, (), 1):
            self.units.fix_array(output, "belongs to the outputs")
        self._keep_what_is_only_read()
        self._one_unit_each()

    def _keep_what_is_only_read(self) -> None:
        """Leaves entries whole that weights read and none makes, such as constants.

        They stand in the function's code, which would not run with fewer.
        """

        def classes(axes: Iterable[Axis]) -> set[int]:
            return {c for axis in axes for e in axis for c in self.units.classes(e)}

        read, made = set[int](), set[int]()
        for path, axes in self.weights.items():
            only_read = classes(self.read[path]) - classes(self.made[path])
            read |= only_read
            made |= classes(axes) - only_read
        self.units.fix([(c,) for c in read - made], "is made by no weight")

    def _one_unit_each(self) -> None:
        """Leaves one unit that can go to each entry of a weight.

        Heads before what is in them, else the slowest: a network whose heads become
        smaller would be another one, for their size scales the scores.
        """
        for axes in self.weights.values():
            for axis in axes:
                for entry in axis:
                    if len(entry) == 1 and len(self.units.classes(entry)) == 1:
                        continue
                    classes = self.units.classes(entry)
                    free = [c for c in classes if not self.units.reason(c)]
                    if len(free) > 1:
                        heads = [c for c in free if self.units.is_head(c)]
                        first = (heads or free)[0]
                        others = [(c,) for c in free if c != first]
                        reason = "lies within heads or groups that go as a whole"
                        self.units.fix(others, reason)

    # ------------------------------------------------------------------------ the walk

    def _walk(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[Array],
        constants: Sequence[Array],
        position: Position,
        rounds: int,
    ) -> list[Array]:
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= zip(jaxpr.invars, arguments, strict=True)

        def read(atom: Any) -> Array:
            if isinstance(atom, Literal):
                shape = getattr(atom.aval, "shape", ())
                number = self.units.array(shape, reason="is a number of the program")
                return number._replace(
                    vanishes=not np.any(atom.val), value=values.known(atom.val)
                )
            return known[atom]

        for i, equation in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in equation.invars]
            outputs = self._step(equation, inputs, (*position, i), rounds)
            if equation.primitive.name not in CALLS:
                of = frozenset().union(*(a.of for a in inputs))
                zero = rules.vanishes(equation, inputs)
                numbers = values.results(equation, inputs)
                outputs = [
                    a if a.active else a._replace(of=of, vanishes=zero, value=value)
                    for a, value in zip(outputs, numbers, strict=True)
                ]
            # Without what would keep all numbers.
            self.outcomes[*position, i] = [a._replace(value=None) for a in outputs]
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _called(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[Any],
        inputs: Sequence[Array],
        position: Position,
        rounds: int,
    ) -> list[Array]:
        held = self._held_arrays(constants)
        self.held[position] = [array._replace(value=None) for array in held]
        return self._walk(jaxpr, inputs, held, position, rounds)

    def _held_arrays(self, constants: Sequence[Any]) -> list[Array]:
        return [
            self.units.array(jax.numpy.shape(value))._replace(value=values.known(value))
            for value in constants
        ]

    def _step(
        self, equation: Any, inputs: list[Array], position: Position, rounds: int
    ) -> list[Array]:
        name = equation.primitive.name
        if name in CALLS:
            inner, constants = called(equation)
            return self._called(inner, constants, inputs, position, rounds)
        if name == "scan":
            return self._scan(equation, inputs, position, rounds)
        if name == "cond":
            return self._cond(equation, inputs, position, rounds)
        if name in PRODUCTS:
            return [self._products.followed(equation, inputs, rounds)]
        return rules.followed(self.units, equation, inputs)

    # --------------------------------------------------------------- loops and branches

    def _scan(
        self, equation: Any, inputs: list[Array], position: Position, rounds: int
    ) -> list[Array]:
        settings = equation.params
        body, length = settings["jaxpr"], settings["length"]
        consts, state, stacks = scan_operands(equation, inputs)
        for array in stacks:
            self.units.fix(array.axes[0], "counts the rounds of a loop")
        flags = _active_carry(body.jaxpr, consts, state, stacks)
        # Numbers of the first round are not those of the others.
        carry = [
            a._replace(active=flag, vanishes=False, value=None)
            for a, flag in zip(state, flags, strict=True)
        ]
        parts = [a._replace(axes=a.axes[1:], value=values.row(a)) for a in stacks]
        outputs = self._called(
            body.jaxpr,
            body.consts,
            [*consts, *carry, *parts],
            position,
            rounds * length,
        )
        after, rows = outputs[: len(carry)], outputs[len(carry) :]
        for mine, other in zip(carry, after, strict=True):
            self.units.agree(mine, other)
        counted = self.units.axis(length, "counts the rounds of a loop")
        return [
            *(
                a._replace(active=own.active)
                for a, own in zip(after, carry, strict=True)
            ),
            *(Array((counted, *a.axes), a.active) for a in rows),
        ]

    def _cond(
        self, equation: Any, inputs: list[Array], position: Position, rounds: int
    ) -> list[Array]:
        first, *rest = [
            self._called(
                branch.jaxpr, branch.consts, inputs[1:], (*position, i), rounds
            )
            for i, branch in enumerate(equation.params["branches"])
        ]
        for results in rest:
            for mine, other in zip(first, results, strict=True):
                self.units.agree(mine, other)
        if inputs[0].active:
            for array in first:
                self.units.mark_varying(*array.axes)
        active = any(array.active for array in inputs)
        return [array._replace(active=active) for array in first]


def _active_carry(
    body: Jaxpr,
    consts: Sequence[Array],
    carry: Sequence[Array],
    stacks: Sequence[Array],
) -> list[bool]:
    """Which arrays that a scan carries depend on the inputs in some round.

    A counter that is carried beside activations does not.

    Args:
        body: Of the scan.
        consts: Its constants.
        carry: What it carries into the first round.
        stacks: What it takes a row of in each round.
    """
    flags = [array.active for array in carry]
    before, behind = ([a.active for a in arrays] for arrays in (consts, stacks))
    while True:
        found = dependent(body, [*before, *flags, *behind])[: len(flags)]
        after = list(map(operator.or_, flags, found))
        if after == flags:
            return flags
        flags = after


def coupled(f: Callable[[Params, Any], Any], params: Params, inputs: Any) -> Coupling:
    """Walks the program of a function, which is not executed.

    Args:
        f: (params, inputs) -> any pytree of arrays.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        inputs: The same.
    """
    with explained():
        program = jax.make_jaxpr(f)(params, inputs)
    # What no output depends on keeps no channel whole.
    live, _ = dce_jaxpr(program.jaxpr, True, instantiate=True)
    program = ClosedJaxpr(live, program.consts)
    shapes = {p: tuple(leaf.shape) for p, leaf in leaves_by_path(params).items()}
    return Coupling(program, shapes)
