"""Numbers of what is made of weights alone, where masks have made these zero.

They say whether a weight in another form, such as ``exp(w) - 1`` or ``1 + w``, is zero
where the weight is. They are computed if they are asked for, which is rare: most forms
keep zero plainly (:func:`woodfisher_jax.tracing.entries.rules.vanishes`).
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from woodfisher_jax.tracing.entries.units import Array
from woodfisher_jax.tracing.flat import bind

STAYING = 3
"""In place of each number of a tensor of one axis, as a zero point: it has no mask."""

Value = Callable[[], Any]
"""Gives numbers, or None where they cannot be computed."""


class _Once:
    """What a function gives, computed at the first call; None if it fails."""

    def __init__(self, make: Value) -> None:
        self._make: Value | None = make
        self._made: Any = None

    def __call__(self) -> Any:
        if self._make is not None:
            # An operation may fail here, or on zeros. That is no error, for the network
            # is only listed.
            with contextlib.suppress(Exception), jax.ensure_compile_time_eval():
                self._made = self._make()
            self._make = None
        return self._made


def masked(tensor: Any) -> Value | None:
    """Numbers of a tensor of which masks leave nothing.

    Args:
        tensor: With shape and dtype.
    """
    if jnp.issubdtype(tensor.dtype, jax.dtypes.extended):
        return None
    fill = 0 if len(tensor.shape) > 1 else STAYING
    return _Once(partial(jnp.full, tensor.shape, fill, tensor.dtype))


def known(number: Any) -> Value | None:
    """Numbers that a program holds, unless they are traced as well."""
    return None if isinstance(number, jax.core.Tracer) else lambda: number


def results(equation: Any, inputs: Sequence[Array]) -> list[Value | None]:
    """Numbers of an equation's results, if they depend on weights alone.

    Args:
        equation: Any.
        inputs: Its operands.
    """
    values = [array.value for array in inputs]
    number = len(equation.outvars)
    if equation.effects or any(a.active or a.value is None for a in inputs):
        return [None] * number
    made = _Once(lambda: bind(equation, [value() for value in values if value]))
    return [partial(_part, made, i) for i in range(number)]


def row(array: Array) -> Value | None:
    """Numbers of the first row of an array, in place of each that a loop takes."""
    return None if array.value is None else partial(_part, array.value, 0)


def _part(made: Value, i: int) -> Any:
    whole = made()
    return None if whole is None else whole[i]
