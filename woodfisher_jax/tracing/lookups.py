"""Tables of a network that whole numbers of a batch are looked up in, as by tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.lax import GatherScatterMode

from woodfisher_jax.tracing.flat import without_calls
from woodfisher_jax.tracing.primitives import RESHAPES, SAME
from woodfisher_jax.trees.paths import Params, leaves_by_path

_AS_THEY_ARE = (*SAME, *RESHAPES, "transpose")
"""Primitives after which an array has all its numbers, unchanged."""


class Lookup(NamedTuple):
    """Numbers of a batch that say which rows of a table are taken.

    Attributes:
        leaf: Which array of the batch they are, by its path.
        rows: Of the table.
        table: Its path; "" if it is made of parameters.
    """

    leaf: str
    rows: int
    table: str


class _Numbers(NamedTuple):
    """A variable that has the numbers of an array of the batch.

    Attributes:
        leaf: The path of the array.
        form: "same"; "negative", where they are; or "shifted" by a constant.
    """

    leaf: str
    form: str = "same"


def lookups(
    f: Callable[[Params, Any], Any], params: Params, batch: Any
) -> list[Lookup]:
    """The tables of parameters that a function looks numbers of its batch up in.

    Numbers that it changes or cuts before are not followed: it may know what it does.
    Negative numbers count from the end for JAX, which adds the number of rows to them.

    Args:
        f: (params, batch) -> any pytree of arrays.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: The same.
    """
    paths, leaves = list(leaves_by_path(params)), leaves_by_path(batch)
    whole = [jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves.values()]
    if not any(whole):
        return []
    jaxpr = without_calls(f, params, batch).jaxpr
    number = len(paths)
    tables: dict[Any, str] = dict(zip(jaxpr.invars[:number], paths, strict=True))
    numbers = {
        var: _Numbers(path)
        for var, path, kept in zip(jaxpr.invars[number:], leaves, whole, strict=True)
        if kept
    }
    found = dict[Lookup, None]()
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, equation.invars
        held = [None if isinstance(v, Literal) else numbers.get(v) for v in inputs]
        if name == "gather" and inputs[0] in tables and held[1] is not None:
            rows = _rows(equation)
            if rows is not None and held[1].form == "same":
                found[Lookup(held[1].leaf, rows, tables[inputs[0]])] = None
        elif name in _AS_THEY_ARE:
            (output,) = equation.outvars
            if held[0] is not None:
                numbers[output] = held[0]
            elif not isinstance(inputs[0], Literal) and inputs[0] in tables:
                same = name in SAME
                tables[output] = tables[inputs[0]] if same else ""
        else:
            own = _wrapped(name, inputs, held)
            if own is not None:
                numbers[equation.outvars[0]] = own
    return list(found)


def _wrapped(name: str, inputs: Any, held: list[_Numbers | None]) -> _Numbers | None:
    """The numbers after a step of JAX's rule that negative ones count from the end."""
    first = held[0] if held else None
    if first is None:
        return None
    constant = len(inputs) > 1 and isinstance(inputs[1], Literal)
    if name == "lt" and constant and first.form == "same" and inputs[1].val == 0:
        return first._replace(form="negative")
    if name == "add" and constant and first.form == "same":
        return first._replace(form="shifted")
    if name == "select_n" and first.form == "negative":
        # Of the numbers as they are, those that are negative are shifted.
        leaf = first.leaf
        if held[1:] == [_Numbers(leaf), _Numbers(leaf, "shifted")]:
            return _Numbers(leaf)
    return None


def _rows(equation: Any) -> int | None:
    """How many rows the table of a gather has; None if it is not one of rows."""
    settings = equation.params
    axes = settings["dimension_numbers"].start_index_map
    # Who asks for the nearest row means what is beyond the table.
    clips = settings["mode"] == GatherScatterMode.CLIP
    if clips or len(axes) != 1 or settings["slice_sizes"][axes[0]] != 1:
        return None
    return int(equation.invars[0].aval.shape[axes[0]])
