"""Which entries meet in an equation: a rule for each primitive that is no product.

The parts of a concatenation are entries of the whole, both terms of a sum are one
another's. Where an equation mixes the entries of an axis, or nothing is known of it,
they stay.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from woodfisher_jax.tracing.entries.units import STAYS, Array, Axis, Units
from woodfisher_jax.tracing.primitives import (
    ALONG,
    ELEMENTWISE,
    FIRST_ZERO,
    KEEPS_ZERO,
    PRODUCTS,
    REDUCTIONS,
)


def followed(units: Units, equation: Any, inputs: Sequence[Array]) -> list[Array]:
    """The results of an equation that is neither call, loop, branch nor product.

    Args:
        units: Of the program's entries; gets what the equation says of them.
        equation: With any other primitive.
        inputs: Its operands.
    """
    name = equation.primitive.name
    rule = _reduction if name in REDUCTIONS else _RULES.get(name)
    if rule is not None:
        found = rule(units, equation, inputs)
        return found if isinstance(found, list) else [found]
    shapes = [tuple(v.aval.shape) for v in equation.outvars]
    active = any(array.active for array in inputs)
    if name in ELEMENTWISE and len(shapes) == len(inputs) > 1:
        # One result for each operand.
        return [a._replace(active=active) for a in inputs]
    if name in ELEMENTWISE and len(shapes) == 1:
        return [_met(units, inputs, shapes[0], active)]
    if name in ALONG:
        along = equation.params[ALONG[name]]
        result = _met(units, inputs, shapes[0], active)
        units.fix(result.axes[along], f"is mixed by {name!r}")
        return [result] * len(shapes)
    if name.startswith(("reduce_window", "cumred")):
        return [_windows(units, equation, inputs, active)]
    return unknown(units, equation, inputs, f"enters {name!r}")


def vanishes(equation: Any, inputs: Sequence[Array]) -> bool:
    """Whether results are plainly zero where weights among their operands are.

    As those of ``w * scale`` or ``w - mean(w)``. Of others numbers have to tell.

    Args:
        equation: With any primitive that calls nothing.
        inputs: Its operands.
    """
    name = equation.primitive.name
    zero = [array.vanishes for array in inputs]
    if name in ("mul", *PRODUCTS):
        return any(zero)
    if name in FIRST_ZERO:
        return zero[0]
    return name in KEEPS_ZERO and all(zero)


def _met(
    units: Units, inputs: Sequence[Array], shape: tuple[int, ...], on: bool
) -> Array:
    """Arrays that meet entry by entry; axes of length 1 are repeated."""
    axes: list[Axis | None] = [None] * len(shape)
    for array in inputs:
        for i, own in enumerate(array.axes):
            if len(own) != shape[i]:
                continue
            first = axes[i]
            if first is None:
                axes[i] = own
            else:
                units.unify(first, own)
    full = [
        units.axis(n) if axis is None else axis
        for n, axis in zip(shape, axes, strict=True)
    ]
    for array in inputs:
        for i, axis in enumerate(full):
            one = not array.axes or len(array.axes[i]) != shape[i]
            if array.active and one:
                units.mark_varying(axis)
    return Array(tuple(full), on)


def unknown(
    units: Units, equation: Any, inputs: Sequence[Array], reason: str
) -> list[Array]:
    """The results of an equation that keeps nothing apart, whose operands stay.

    Args:
        units: Of the program's entries.
        equation: That mixes entries, or of which nothing is known.
        inputs: Its operands.
        reason: Why they stay.
    """
    for array in inputs:
        units.fix_array(array, reason)
    active = any(array.active for array in inputs)
    return [units.array(v.aval.shape, active, reason) for v in equation.outvars]


def _reduction(units: Units, equation: Any, inputs: Sequence[Array]) -> list[Array]:
    gone = equation.params["axes"]
    name = equation.primitive.name
    reason = f"is reduced by {name!r}, as in a norm"
    for array in inputs:
        for i in gone:
            units.fix(array.axes[i], reason)
    kept = [i for i in range(len(inputs[0].axes)) if i not in gone]
    return [
        Array(tuple(inputs[0].axes[i] for i in kept), inputs[0].active)
        for _ in equation.outvars
    ]


def _windows(
    units: Units, equation: Any, inputs: Sequence[Array], active: bool
) -> Array:
    """Pooling: an axis whose windows have one entry keeps its own."""
    shape = equation.outvars[0].aval.shape
    windows = equation.params.get("window_dimensions", (0,) * len(shape))
    reason = f"is pooled in {equation.primitive.name!r}"
    axes = []
    for i, n in enumerate(shape):
        own = inputs[0].axes[i]
        if windows[i] == 1 and len(own) == n:
            axes.append(own)
        else:
            units.fix(own, reason)
            axes.append(units.axis(n, reason))
    return Array(tuple(axes), active)


def _iota(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    del inputs
    return units.array(equation.outvars[0].aval.shape)


def _random_bits(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    keys = inputs[0]
    more = equation.outvars[0].aval.shape[len(keys.axes) :]
    return keys._replace(axes=(*keys.axes, *units.array(more).axes))


def _transpose(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    order = equation.params["permutation"]
    return inputs[0]._replace(axes=tuple(inputs[0].axes[i] for i in order))


def _reshape(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    array, order = inputs[0], equation.params.get("dimensions")
    axes = [array.axes[i] for i in order] if order else array.axes
    shape = equation.outvars[0].aval.shape
    return array._replace(axes=tuple(units.reshaped(axes, shape)))


def _squeeze(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    gone = equation.params["dimensions"]
    axes = [axis for i, axis in enumerate(inputs[0].axes) if i not in gone]
    return inputs[0]._replace(axes=tuple(axes))


def _broadcast_in_dim(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    places = equation.params["broadcast_dimensions"]
    shape = equation.outvars[0].aval.shape
    own = dict(zip(places, inputs[0].axes, strict=True))
    axes = []
    for i, n in enumerate(shape):
        kept = own.get(i)
        if kept is None or len(kept) != n:
            kept = units.axis(n)
            if inputs[0].active:
                units.mark_varying(kept)
        axes.append(kept)
    return inputs[0]._replace(axes=tuple(axes))


def _rev(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    turned = equation.params["dimensions"]
    axes = tuple(
        axis[::-1] if i in turned else axis for i, axis in enumerate(inputs[0].axes)
    )
    return inputs[0]._replace(axes=axes)


def _slice(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    settings, array = equation.params, inputs[0]
    strides = settings["strides"] or (1,) * len(array.axes)
    cut = []
    for axis, start, stop, stride in zip(
        array.axes,
        settings["start_indices"],
        settings["limit_indices"],
        strides,
        strict=True,
    ):
        cut.append(_part(units, axis, axis[start:stop:stride]))
    return array._replace(axes=tuple(cut))


def _part(units: Units, whole: Axis, part: Axis) -> Axis:
    """A part of an axis; an entry that is taken alone stays."""
    if len(part) == 1 < len(whole):
        units.fix(part, "is taken alone")
        return STAYS
    return part


def _split(units: Units, equation: Any, inputs: Sequence[Array]) -> list[Array]:
    along, array = equation.params["axis"], inputs[0]
    found, start = [], 0
    for size in equation.params["sizes"]:
        axes = list(array.axes)
        axes[along] = _part(units, axes[along], axes[along][start : start + size])
        found.append(array._replace(axes=tuple(axes)))
        start += size
    return found


def _dynamic_slice(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    """A part of the first array at places that the others say."""
    reason = "is cut at a place that is computed"
    axes = []
    for axis, size in zip(inputs[0].axes, equation.params["slice_sizes"], strict=True):
        if size != len(axis):
            units.fix(axis, reason)
        axes.append(axis if size == len(axis) else units.axis(size, reason))
    if any(a.active for a in inputs[1:]):
        # What is taken depends on the inputs, whatever the array holds.
        units.mark_varying(*axes)
    return Array(tuple(axes), any(a.active for a in inputs))


def _dynamic_update_slice(
    units: Units, equation: Any, inputs: Sequence[Array]
) -> Array:
    del equation
    whole, part = inputs[0], inputs[1]
    for mine, other in zip(whole.axes, part.axes, strict=True):
        if len(mine) == len(other):
            units.unify(mine, other)
        else:
            units.fix((*mine, *other), "is written at a place that is computed")
    return whole._replace(active=any(a.active for a in inputs))


def _concatenate(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    along = equation.params["dimension"]
    axes = list(inputs[0].axes)
    for array in inputs[1:]:
        for i, axis in enumerate(array.axes):
            if i != along:
                units.unify(axes[i], axis)
    parts = [array.axes[along] for array in inputs]
    axes[along] = tuple(entry for part in parts for entry in part)
    return Array(tuple(axes), any(array.active for array in inputs))


def _stack(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    for array in inputs[1:]:
        units.agree(inputs[0], array)
    axes = list(inputs[0].axes)
    rows = units.axis(len(inputs), "counts arrays that are stacked")
    axes.insert(equation.params["axis"], rows)
    return Array(tuple(axes), any(array.active for array in inputs))


def _unstack(units: Units, equation: Any, inputs: Sequence[Array]) -> list[Array]:
    axes = list(inputs[0].axes)
    units.fix(axes.pop(equation.params["axis"]), "is taken apart")
    return [inputs[0]._replace(axes=tuple(axes)) for _ in equation.outvars]


def _tile(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    axes = tuple(
        axis * times if len(axis) > 1 else units.axis(times)
        for axis, times in zip(inputs[0].axes, equation.params["reps"], strict=True)
    )
    return inputs[0]._replace(axes=axes)


def _pad(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    axes = []
    for axis, (low, high, inside), n in zip(
        inputs[0].axes,
        equation.params["padding_config"],
        equation.outvars[0].aval.shape,
        strict=True,
    ):
        if inside or low < 0 or high < 0:
            reason = "is cut or spread by 'pad'"
            units.fix(axis, reason)
            axes.append(units.axis(n, reason))
        else:
            new = [e for k in (low, high) for e in _free(units, k)]
            axes.append((*new[:low], *axis, *new[low:]))
    return Array(tuple(axes), any(array.active for array in inputs))


def _free(units: Units, number: int) -> Axis:
    """Entries of which any may go, also where it is a single one."""
    return units.axis(number + 1)[:number]


def _gather(units: Units, equation: Any, inputs: Sequence[Array]) -> Array:
    numbers = equation.params["dimension_numbers"]
    sizes = equation.params["slice_sizes"]
    shape = equation.outvars[0].aval.shape
    array, places = inputs
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for i, axis in enumerate(array.axes):
        if i in gone or sizes[i] != len(axis):
            units.fix(axis, "is looked up")
    units.fix_array(places, "says what is looked up")
    left = [i for i in range(len(array.axes)) if i not in gone]
    own = {
        place: array.axes[i]
        for i, place in zip(left, numbers.offset_dims, strict=True)
        if sizes[i] == len(array.axes[i])
    }
    axes = [own.get(i) or units.axis(n, "is looked up") for i, n in enumerate(shape)]
    if places.active:
        # What is looked up depends on the inputs, whatever the array holds.
        units.mark_varying(*axes)
    return Array(tuple(axes), array.active or places.active)


_Rule = Callable[[Units, Any, Sequence[Array]], Array | list[Array]]

_RULES: Mapping[str, _Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "random_bits": _random_bits,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
