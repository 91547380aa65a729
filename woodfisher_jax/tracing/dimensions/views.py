"""Equations that move entries: views, cuts, look-ups, and arrays put side by side."""

from collections.abc import Sequence
from typing import Any

from woodfisher_jax.tracing.dimensions.dims import Axis
from woodfisher_jax.tracing.dimensions.origins import Array, Origins, touched
from woodfisher_jax.tracing.primitives import RESHAPES, SAME

_VIEWS = (*SAME, *RESHAPES, "rev", "transpose")
_CUTS = ("slice", "dynamic_slice", "split")
# How many of the operands are arrays side by side: None for all.
_BESIDE = {"concatenate": None, "stack": None, "pad": 1, "dynamic_update_slice": 2}


class Views:
    """What becomes of the axes where entries are moved.

    Attributes:
        torn: Dimensions that are cut into parts of several lengths.
    """

    def __init__(self, origins: Origins) -> None:
        """Nothing is moved yet.

        Args:
            origins: Of the program's arrays.
        """
        self._origins = origins
        self._lengths: dict[Axis, int] = {}
        self.torn: set[int] = set()

    def moved(self, equation: Any, inputs: Sequence[Array]) -> list[Array] | None:
        """The results of an equation; None if it does not move entries alone.

        Args:
            equation: Any.
            inputs: Its operands.
        """
        name = equation.primitive.name
        if name in _VIEWS and len(equation.outvars) == len(inputs):
            views = zip(equation.invars, equation.outvars, inputs, strict=True)
            return [
                self._viewed(equation, a.aval.shape, b.aval.shape, array)
                for a, b, array in views
            ]
        if name in _CUTS:
            return self._slices(equation, inputs)
        if name == "unstack":
            return self._unstacked(equation, inputs[0])
        if name == "gather":
            return [self._gathered(equation, inputs)]
        if name == "stack":
            place = equation.params["axis"]
            return [self._beside(equation, [self._expanded(a, place) for a in inputs])]
        if name in _BESIDE:
            return [self._beside(equation, inputs)]
        return None

    def _viewed(
        self,
        equation: Any,
        old: tuple[int, ...],
        new: tuple[int, ...],
        array: Array,
    ) -> Array:
        dims = self._origins.dims
        name, settings = equation.primitive.name, equation.params
        if name == "transpose":
            order = settings["permutation"]
            return array.moved(lambda axes: tuple(axes[i] for i in order))
        if name == "broadcast_in_dim":
            places = settings["broadcast_dimensions"]
            kept = {place: i for i, place in enumerate(places) if new[place] == old[i]}
            more = [dims.axis(n) for n in new]
            return array.moved(
                lambda axes: tuple(
                    axes[kept[i]] if i in kept else axis for i, axis in enumerate(more)
                )
            )
        if settings.get("dimensions") is not None and name == "reshape":
            order = settings["dimensions"]
            array = array.moved(lambda axes: tuple(axes[i] for i in order))
        elif old == new:
            return array
        return array.moved(lambda axes: tuple(dims.reshaped(axes, new)))

    # ----------------------------------------------------------------------------- cuts

    def _slices(self, equation: Any, inputs: Sequence[Array]) -> list[Array]:
        """Parts of an array; an axis cut to one entry counts stacked layers."""
        array, old = inputs[0], tuple(equation.invars[0].aval.shape)
        settings = equation.params
        strides = settings.get("strides") or (1,) * len(old)
        starts = settings.get("start_indices") or (0,) * len(old)
        active = any(a.active for a in inputs)
        results = []
        for variable in equation.outvars:
            shape = variable.aval.shape
            single = [
                i for i, (n, m) in enumerate(zip(old, shape, strict=True)) if m == 1 < n
            ]

            def cut(
                axes: tuple[Axis, ...], shape: Sequence[int] = shape
            ) -> tuple[Axis, ...]:
                return tuple(map(self._part, axes, old, starts, shape, strides))

            result = array.stacked(single).moved(cut)
            results.append(result._replace(active=active))
        return results

    def _part(self, axis: Axis, whole: int, start: int, length: int, step: int) -> Axis:
        """A part of an axis."""
        if whole == length:
            return axis
        # An axis of equal parts, such as a fused projection's thirds, is cut: each part
        # can then be cut into heads as it is.
        if step == 1 and length > 1 and not (whole % length or start % length):
            outer, inner = self._origins.dims.reshaped(
                [axis], (whole // length, length)
            )
            self.torn.update(self._uneven(axis, length))
            for dim in inner[:1]:
                self._origins.add_meaning(dim, outer)
            return inner
        self.torn.update(axis)
        return self._origins.alias(length, axis)

    def _uneven(self, axis: Axis, length: int) -> Axis:
        """The axis, if it was cut into parts of another length before."""
        before = self._lengths.setdefault(axis, length)
        return () if before == length else axis

    def _unstacked(self, equation: Any, array: Array) -> list[Array]:
        """The entries along an axis, each an array."""
        place = equation.params["axis"]
        self.torn.update(array.axes[place])
        entry = array.stacked((place,)).without((place,))
        return [entry for _ in equation.outvars]

    def _gathered(self, equation: Any, inputs: Sequence[Array]) -> Array:
        """Entries taken along some axes; the others keep what they are."""
        settings = equation.params
        numbers, sizes = settings["dimension_numbers"], settings["slice_sizes"]
        shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        left = [i for i in range(len(shape)) if i not in gone]
        kept = {
            place: axis
            for axis, place in zip(left, numbers.offset_dims, strict=True)
            if sizes[axis] == shape[axis]
        }
        active = any(a.active for a in inputs)
        more = [self._origins.dims.axis(n) for n in out]

        def taken(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            # Entries whose places do not depend on the batch are a choice of inputs or
            # outputs; others are looked up, one at a time.
            chosen = tuple(dim for i in sorted(gone) for dim in axes[i])
            return tuple(
                axes[kept[i]]
                if i in kept
                else axis
                if active or i in numbers.offset_dims
                else self._origins.alias(out[i], chosen)
                for i, axis in enumerate(more)
            )

        result = inputs[0].stacked(sorted(gone)).moved(taken)
        return result._replace(active=active)

    # --------------------------------------------------------------------- side by side

    def _expanded(self, array: Array, place: int) -> Array:
        """The array with an axis of length 1 more."""
        more = self._origins.dims.axis(1)
        return array.moved(lambda axes: (*axes[:place], more, *axes[place:]))

    def _beside(self, equation: Any, inputs: Sequence[Array]) -> Array:
        """Arrays side by side or padded: axes of the result's length stay the same."""
        origins, shape = self._origins, equation.outvars[0].aval.shape
        arrays = inputs[: _BESIDE[equation.primitive.name]]
        active = any(a.active for a in inputs)
        longer = {
            i: tuple(
                dim
                for a in arrays
                if origins.length(a.axes[i]) != n
                for dim in a.axes[i]
            )
            for i, n in enumerate(shape)
        }
        axes = [
            origins.alias(n, longer[i]) if longer[i] else arrays[0].axes[i]
            for i, n in enumerate(shape)
        ]
        for array in arrays[1:]:
            origins.unify(axes, array.axes)
        whole = [
            array.moved(
                lambda own: tuple(
                    origins.alias(n, axis) if longer[i] else axis
                    for i, (n, axis) in enumerate(zip(shape, own, strict=True))
                )
            )
            for array in arrays
        ]
        sources = {} if active else origins.merged(whole)
        return Array(
            tuple(axes), active, sources, frozenset() if active else touched(inputs)
        )
