"""Tables of a network that whole numbers of a batch are looked up in, as by tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.lax import GatherScatterMode

from woodfisher_jax.tracing.axes import program_of
from woodfisher_jax.tracing.flat import Held, walked
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
        form: "same"; "negative", where they are; "shifted" by a constant; or "first"
            of an index of several numbers.
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
    jaxpr = program_of(f, params, batch)
    arguments = [Held() for _ in jaxpr.invars]
    # What a function holds itself, as a Partial does, comes first.
    own = arguments[len(arguments) - len(paths) - len(leaves) :]
    tables: dict[Any, str] = dict(zip(own, paths, strict=False))
    numbers = {
        held: _Numbers(path)
        for held, path, kept in zip(own[len(paths) :], leaves, whole, strict=True)
        if kept
    }
    found = dict[Lookup, None]()
    for equation, inputs, outputs in walked(jaxpr, arguments):
        name = equation.primitive.name
        held = [None if isinstance(v, Literal) else numbers.get(v) for v in inputs]
        table = None
        if inputs and not isinstance(inputs[0], Literal):
            table = tables.get(inputs[0])
        if name == "gather" and table is not None and held[1] is not None:
            rows = _rows(equation, held[1])
            if rows is not None:
                found[Lookup(held[1].leaf, rows, table)] = None
        elif name in _AS_THEY_ARE:
            if held[0] is not None:
                numbers[outputs[0]] = held[0]
            elif table is not None:
                tables[outputs[0]] = table if name in SAME else ""
        elif held and held[0] is not None:
            changed = _changed(equation, held)
            if changed is not None:
                numbers[outputs[0]] = changed
    return list(found)


def _changed(equation: Any, held: list[_Numbers | None]) -> _Numbers | None:
    """The numbers after a step of what JAX makes of an index.

    Negative ones count from the end, and one for each axis is put beside the others.
    """
    first, inputs, name = held[0], equation.invars, equation.primitive.name
    assert first is not None
    constant = len(inputs) > 1 and isinstance(inputs[1], Literal)
    if name == "concatenate" and first.form == "same":
        last = inputs[0].aval.ndim - 1
        alone = equation.params["dimension"] == last and inputs[0].aval.shape[-1] == 1
        return first._replace(form="first") if alone else None
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


def _rows(equation: Any, index: _Numbers) -> int | None:
    """How many rows the table of a gather has; None if it is not one of rows."""
    settings = equation.params
    numbers = settings["dimension_numbers"]
    axes = numbers.start_index_map
    # Who asks for the nearest row means what is beyond the table. So does a slice at a
    # number, of which vmap makes such a gather, but nobody has asked; its axis stays.
    clips = settings["mode"] == GatherScatterMode.CLIP and numbers.collapsed_slice_dims
    known = index.form == "first" or (index.form == "same" and len(axes) == 1)
    if clips or not known or settings["slice_sizes"][axes[0]] != 1:
        return None
    return int(equation.invars[0].aval.shape[axes[0]])
