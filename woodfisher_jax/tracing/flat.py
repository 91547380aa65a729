"""A function as one flat list of equations: calls opened, stacked layers laid out."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from woodfisher_jax.tracing.convolutions import are_fast, convolve
from woodfisher_jax.tracing.primitives import (
    CALLS,
    called,
    contains_product,
    scan_operands,
)
from woodfisher_jax.trees.paths import Params


def bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation."""
    if equation.primitive.name == "conv_general_dilated" and are_fast():
        with equation.ctx.manager:
            return [convolve(*inputs, **equation.params)]
    # Older versions of JAX return functions and settings, newer ones settings only.
    bound = equation.primitive.get_bind_params(equation.params)
    functions, settings = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **settings)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


class Held:
    """What a variable of a program stands for in :func:`walked`, told by identity."""


Step = tuple[Any, list[Any], list[Any]]
"""An equation, and what its inputs and outputs stand for: literals, or one thing each.
"""


def walked(jaxpr: Jaxpr, arguments: Sequence[Any]) -> Generator[Step, None, list[Any]]:
    """The equations of a program and of what it calls, in order; nothing is bound.

    The rounds of a ``scan`` are alike for a walk: two stand for all, the second with
    what the first has carried; and a row of an array stands for the array.

    Args:
        jaxpr: The program.
        arguments: What its inputs stand for.

    Returns:
        What its outputs stand for.
    """
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else known.setdefault(atom, Held())

    for equation in jaxpr.eqns:
        inputs, name = list(map(read, equation.invars)), equation.primitive.name
        if name in CALLS:
            outputs = yield from walked(called(equation)[0], inputs)
        elif name == "scan":
            constants, carry, rows = scan_operands(equation, inputs)
            body = equation.params["jaxpr"].jaxpr
            for _ in range(2):
                outputs = yield from walked(body, [*constants, *carry, *rows])
                carry = outputs[: len(carry)]
        else:
            outputs = [Held() for _ in equation.outvars]
            yield equation, inputs, outputs
        known.update(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def flattened(
    f: Callable[[Params, Any], Any], params: Params, batch: Any
) -> Callable[[Params, Any], list[Any]]:
    """The same function without calls around its layers, and without their loops.

    A ``jit``, ``remat`` or function with a derivative rule of its own that contains a
    product is replaced by its equations; a ``scan`` over stacked weights by those of
    every round, with slices of the weights. What has no product in it stays.

    Args:
        f: (params, batch) -> any pytree of arrays.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: The same; the result is for these shapes only.

    Returns:
        (params, batch) -> the leaves of what ``f`` returns.
    """
    closed = jax.make_jaxpr(f)(params, batch)
    number = len(jax.tree.leaves(params))
    weights = [i < number for i in range(len(closed.jaxpr.invars))]

    def flat(params: Params, batch: Any) -> list[Any]:
        values = jax.tree.leaves((params, batch))
        outputs, _ = _evaluate(closed.jaxpr, closed.consts, values, weights)
        return outputs

    return flat


def without_calls(
    f: Callable[[Params, Any], Any], params: Params, batch: Any
) -> ClosedJaxpr:
    """The program of :func:`flattened`, with every other call opened as well.

    For walks that look and do not differentiate: derivative rules are gone.

    Args:
        f: As there, with all that follows.
        params: The same.
        batch: The same.
    """
    closed = jax.make_jaxpr(flattened(f, params, batch))(params, batch)
    values = jax.tree.leaves((params, batch))
    return jax.make_jaxpr(lambda *given: _opened(closed.jaxpr, closed.consts, given))(
        *values
    )


def _opened(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, values, strict=True)
    for equation in jaxpr.eqns:
        inputs = [value_of(atom, known) for atom in equation.invars]
        if equation.primitive.name in CALLS:
            outputs = _opened(*called(equation), inputs)
        else:
            outputs = bind(equation, inputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(atom, known) for atom in jaxpr.outvars]


def value_of(atom: Any, known: Mapping[Any, Any]) -> Any:
    """What a variable of a jaxpr is, or a number in it."""
    return atom.val if isinstance(atom, Literal) else known[atom]


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], weights: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Evaluates a jaxpr; ``weights`` says which values come from parameters alone."""
    known = dict(zip(jaxpr.constvars, ((c, False) for c in consts), strict=True))
    known |= zip(jaxpr.invars, zip(values, weights, strict=True), strict=True)

    def read(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        inputs = [value for value, _ in arguments]
        own = [weight for _, weight in arguments]
        name = equation.primitive.name
        if name in CALLS and contains_product(equation):
            inner, constants = called(equation)
            outputs, weight = _evaluate(inner, constants, inputs, own)
        elif name == "scan" and _stacked(equation, own) and contains_product(equation):
            outputs = _unrolled(equation, inputs, own)
            weight = [False] * len(outputs)
        else:
            outputs = bind(equation, inputs)
            weight = [bool(own) and all(own)] * len(outputs)
        known.update(
            zip(equation.outvars, zip(outputs, weight, strict=True), strict=True)
        )
    found = [read(atom) for atom in jaxpr.outvars]
    return [value for value, _ in found], [weight for _, weight in found]


def _stacked(equation: Any, weights: Sequence[bool]) -> bool:
    """Whether a scan runs over parameters."""
    return any(scan_operands(equation, weights)[2])


def _unrolled(
    equation: Any, inputs: Sequence[Any], weights: Sequence[bool]
) -> list[Any]:
    """The results of a scan, round by round."""
    settings = equation.params
    body: ClosedJaxpr = settings["jaxpr"]
    constants, carry, stacks = scan_operands(equation, inputs)
    own, changing, sliced = scan_operands(equation, weights)
    rounds = range(settings["length"])
    rows = []
    for i in reversed(rounds) if settings["reverse"] else rounds:
        parts = [jax.lax.index_in_dim(stack, i, keepdims=False) for stack in stacks]
        # What is carried comes from the batch after the first round, if not before.
        outputs, changed = _evaluate(
            body.jaxpr,
            body.consts,
            [*constants, *carry, *parts],
            [*own, *changing, *sliced],
        )
        number = len(carry)
        carry, changing = outputs[:number], changed[:number]
        rows.append(outputs[number:])
    if settings["reverse"]:
        rows.reverse()
    results = [jax.numpy.stack(column) for column in zip(*rows, strict=True)]
    return [*carry, *results]
