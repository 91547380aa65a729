"""Entries of weights and activations that can only be taken out together.

The program of a function is walked once, and every axis of every array is a list of
entries (:mod:`woodfisher_jax.tracing.entries`). An equation says which entries meet:
those of a weight's inputs those of what it multiplies, both terms of a sum one another,
the parts of a concatenation those of the whole. Where an equation mixes the entries of
an axis, or nothing is known of it, they stay.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from woodfisher_jax.tracing.entries import STAYS, Axis, Units
from woodfisher_jax.tracing.layers import (
    CALLS,
    REDUCTIONS,
    called,
    dependent,
    scan_lengths,
)
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.paths import Params, leaves_by_path

Place = tuple[int, ...]
"""An equation: one index for each level of nested calls."""


class Array(NamedTuple):
    """What is known of an array.

    Attributes:
        axes: Its entries, axis by axis.
        active: Whether it depends on the inputs.
        of: If not, the tensors that it is computed from.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    of: frozenset[str] = frozenset()


class Cost(NamedTuple):
    """What one product takes.

    Attributes:
        axes: Those whose lengths are factors of its multiply-accumulates.
        factor: All other factors, over the traced inputs.
        equation: The product.
        operands: The axes of its operands.
        rounds: How often it is taken.
    """

    axes: tuple[Axis, ...]
    factor: int
    equation: Any
    operands: tuple[tuple[Axis, ...], ...]
    rounds: int


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt
ceil clamp clz complex conj convert_element_type copy copy_p cos cosh custom_lin_add
device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt imag
integer_pow is_finite lax_convert le le_to lgamma log log1p logistic lt lt_to max
mesh_cast min mul mulhi name ne neg nextafter not optimization_barrier or
population_count pow pvary real reduce_precision rem reshard round rsqrt select_n
sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Primitives whose operands meet entry by entry."""

_ALONG = {
    "cumlogsumexp": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumsum": "axis",
    "sort": "dimension",
}
"""Primitives that mix the entries of one axis, and what names it."""

MADE = ("iota", "random_bits")
"""Primitives that give numbers by their place: made whole, then cut."""


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
        self.outcomes: dict[Place, list[Array]] = {}
        self.held: dict[Place, list[Array]] = {}
        self.costs: list[Cost] = []
        # Axes that are heads if they are in a later product of two activations.
        self._queries: list[Axis] = []
        self.read: dict[str, list[Axis]] = {path: [] for path in shapes}
        self.made: dict[str, list[Axis]] = {path: [] for path in shapes}
        self.weights = {path: self._new(shape).axes for path, shape in shapes.items()}
        jaxpr = program.jaxpr
        held = [self._new(v.aval.shape) for v in jaxpr.constvars]
        given = jaxpr.invars[len(shapes) :]
        arrays = [
            *(Array(a, of=frozenset([path])) for path, a in self.weights.items()),
            *(self._new(v.aval.shape, True, "belongs to the inputs") for v in given),
        ]
        self.held[()] = held
        for output in self._walk(jaxpr, arrays, held, (), 1):
            self._fix(output, "belongs to the outputs")
        self._one_unit_each()

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

    def _new(
        self, shape: Sequence[int], active: bool = False, reason: str = ""
    ) -> Array:
        return Array(tuple(self.units.axis(n, reason) for n in shape), active)

    def _fix(self, array: Array, reason: str) -> None:
        for axis in array.axes:
            self.units.fix(axis, reason)

    def _walk(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[Array],
        constants: Sequence[Array],
        place: Place,
        rounds: int,
    ) -> list[Array]:
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= zip(jaxpr.invars, arguments, strict=True)

        def read(atom: Any) -> Array:
            if isinstance(atom, Literal):
                shape = getattr(atom.aval, "shape", ())
                return self._new(shape, reason="is a number of the program")
            return known[atom]

        for i, equation in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in equation.invars]
            outputs = self._step(equation, inputs, (*place, i), rounds)
            if equation.primitive.name not in CALLS:
                of = frozenset().union(*(a.of for a in inputs))
                outputs = [a if a.active else a._replace(of=of) for a in outputs]
            self.outcomes[*place, i] = outputs
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _called(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[Any],
        inputs: Sequence[Array],
        place: Place,
        rounds: int,
    ) -> list[Array]:
        held = [self._new(jax.numpy.shape(value)) for value in constants]
        self.held[place] = held
        return self._walk(jaxpr, inputs, held, place, rounds)

    def _step(
        self, equation: Any, inputs: list[Array], place: Place, rounds: int
    ) -> list[Array]:
        name = equation.primitive.name
        if name in CALLS:
            inner, values = called(equation)
            return self._called(inner, values, inputs, place, rounds)
        follow = getattr(self, f"_{name}", None)
        if name in REDUCTIONS:
            follow = self._reduction
        if follow is not None:
            found = follow(equation, inputs, place, rounds)
            return found if isinstance(found, list) else [found]
        shapes = [tuple(v.aval.shape) for v in equation.outvars]
        active = any(array.active for array in inputs)
        if name in ELEMENTWISE and len(shapes) == len(inputs) > 1:
            # One result for each operand.
            return [a._replace(active=active) for a in inputs]
        if name in ELEMENTWISE and len(shapes) == 1:
            return [self._met(inputs, shapes[0], active)]
        if name in _ALONG:
            along = equation.params[_ALONG[name]]
            result = self._met(inputs, shapes[0], active)
            self.units.fix(result.axes[along], f"is mixed by {name!r}")
            return [result] * len(shapes)
        if name.startswith(("reduce_window", "cumred")):
            return [self._windows(equation, inputs, active)]
        return self._unknown(equation, inputs, f"enters {name!r}")

    def _unknown(self, equation: Any, inputs: list[Array], reason: str) -> list[Array]:
        for array in inputs:
            self._fix(array, reason)
        active = any(array.active for array in inputs)
        return [self._new(v.aval.shape, active, reason) for v in equation.outvars]

    def _met(self, inputs: Sequence[Array], shape: tuple[int, ...], on: bool) -> Array:
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
                    self.units.unify(first, own)
        full = [
            self.units.axis(n) if axis is None else axis
            for n, axis in zip(shape, axes, strict=True)
        ]
        for array in inputs:
            for i, axis in enumerate(full):
                one = not array.axes or len(array.axes[i]) != shape[i]
                if array.active and one:
                    self.units.mark_varying(axis)
        return Array(tuple(full), on)

    # ----------------------------------------------------------------- other equations

    def _reduction(self, equation: Any, inputs: list[Array], *_: Any) -> list[Array]:
        gone = equation.params["axes"]
        name = equation.primitive.name
        reason = f"is reduced by {name!r}, as in a norm"
        for array in inputs:
            for i in gone:
                self.units.fix(array.axes[i], reason)
        kept = [i for i in range(len(inputs[0].axes)) if i not in gone]
        return [
            Array(tuple(inputs[0].axes[i] for i in kept), inputs[0].active)
            for _ in equation.outvars
        ]

    def _windows(self, equation: Any, inputs: list[Array], active: bool) -> Array:
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
                self.units.fix(own, reason)
                axes.append(self.units.axis(n, reason))
        return Array(tuple(axes), active)

    def _iota(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        del inputs
        return self._new(equation.outvars[0].aval.shape)

    def _random_bits(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        keys = inputs[0]
        more = equation.outvars[0].aval.shape[len(keys.axes) :]
        return keys._replace(axes=(*keys.axes, *self._new(more).axes))

    def _scan(
        self, equation: Any, inputs: list[Array], place: Place, rounds: int
    ) -> list[Array]:
        settings = equation.params
        first, second = scan_lengths(equation)
        body, length = settings["jaxpr"], settings["length"]
        stacks = inputs[first + second :]
        for array in stacks:
            self.units.fix(array.axes[0], "counts the rounds of a loop")
        # A counter that is carried beside activations is none.
        flags = [array.active for array in inputs]
        while True:
            after = dependent(body.jaxpr, flags)[:second]
            before = flags[first : first + second]
            if not any(new and not old for new, old in zip(after, before, strict=True)):
                break
            flags[first : first + second] = map(operator.or_, before, after)
        carry = [
            a._replace(active=flag)
            for a, flag in zip(inputs[first:][:second], flags[first:], strict=False)
        ]
        parts = [a._replace(axes=a.axes[1:]) for a in stacks]
        outputs = self._called(
            body.jaxpr,
            body.consts,
            [*inputs[:first], *carry, *parts],
            place,
            rounds * length,
        )
        self._agree(carry, outputs[:second])
        rows = self.units.axis(length, "counts the rounds of a loop")
        return [
            *(
                a._replace(active=own.active)
                for a, own in zip(outputs[:second], carry, strict=True)
            ),
            *(Array((rows, *a.axes), a.active) for a in outputs[second:]),
        ]

    def _cond(
        self, equation: Any, inputs: list[Array], place: Place, rounds: int
    ) -> list[Array]:
        found = []
        for i, branch in enumerate(equation.params["branches"]):
            found.append(
                self._called(
                    branch.jaxpr, branch.consts, inputs[1:], (*place, i), rounds
                )
            )
        for other in found[1:]:
            self._agree(found[0], other)
        if inputs[0].active:
            for array in found[0]:
                for axis in array.axes:
                    self.units.mark_varying(axis)
        active = any(array.active for array in inputs)
        return [array._replace(active=active) for array in found[0]]

    def _agree(self, first: Sequence[Array], second: Sequence[Array]) -> None:
        for a, b in zip(first, second, strict=True):
            for mine, other in zip(a.axes, b.axes, strict=True):
                self.units.unify(mine, other)

    # -------------------------------------------------------------- views and movements

    def _transpose(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        order = equation.params["permutation"]
        return inputs[0]._replace(axes=tuple(inputs[0].axes[i] for i in order))

    def _reshape(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        array, order = inputs[0], equation.params.get("dimensions")
        axes = [array.axes[i] for i in order] if order else array.axes
        shape = equation.outvars[0].aval.shape
        return array._replace(axes=tuple(self.units.reshaped(axes, shape)))

    def _squeeze(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        gone = equation.params["dimensions"]
        axes = [axis for i, axis in enumerate(inputs[0].axes) if i not in gone]
        return inputs[0]._replace(axes=tuple(axes))

    def _expand_dims(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        return self._reshape(equation, inputs)

    def _broadcast_in_dim(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        places = equation.params["broadcast_dimensions"]
        shape = equation.outvars[0].aval.shape
        own = dict(zip(places, inputs[0].axes, strict=True))
        axes = []
        for i, n in enumerate(shape):
            kept = own.get(i)
            if kept is None or len(kept) != n:
                kept = self.units.axis(n)
                if inputs[0].active:
                    self.units.mark_varying(kept)
            axes.append(kept)
        return inputs[0]._replace(axes=tuple(axes))

    def _rev(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        turned = equation.params["dimensions"]
        axes = tuple(
            axis[::-1] if i in turned else axis for i, axis in enumerate(inputs[0].axes)
        )
        return inputs[0]._replace(axes=axes)

    def _slice(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
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
            cut.append(self._part(axis, axis[start:stop:stride]))
        return array._replace(axes=tuple(cut))

    def _part(self, whole: Axis, part: Axis) -> Axis:
        """A part of an axis; an entry that is taken alone stays."""
        if len(part) == 1 < len(whole):
            self.units.fix(part, "is taken alone")
            return STAYS
        return part

    def _split(self, equation: Any, inputs: list[Array], *_: Any) -> list[Array]:
        along, array = equation.params["axis"], inputs[0]
        found, start = [], 0
        for size in equation.params["sizes"]:
            axes = list(array.axes)
            axes[along] = self._part(axes[along], axes[along][start : start + size])
            found.append(array._replace(axes=tuple(axes)))
            start += size
        return found

    def _dynamic_slice(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        sizes = equation.params["slice_sizes"]
        return self._taken(inputs, sizes, "is cut at a place that is computed")

    def _taken(self, inputs: list[Array], sizes: Sequence[int], reason: str) -> Array:
        """A part of the first array at places that the others say."""
        axes = []
        for axis, size in zip(inputs[0].axes, sizes, strict=True):
            if size != len(axis):
                self.units.fix(axis, reason)
            axes.append(axis if size == len(axis) else self.units.axis(size, reason))
        if any(a.active for a in inputs[1:]):
            # What is taken depends on the inputs, whatever the array holds.
            for axis in axes:
                self.units.mark_varying(axis)
        return Array(tuple(axes), any(a.active for a in inputs))

    def _dynamic_update_slice(
        self, equation: Any, inputs: list[Array], *_: Any
    ) -> Array:
        del equation
        whole, part = inputs[0], inputs[1]
        for mine, other in zip(whole.axes, part.axes, strict=True):
            if len(mine) == len(other):
                self.units.unify(mine, other)
            else:
                self.units.fix(
                    (*mine, *other), "is written at a place that is computed"
                )
        return whole._replace(active=any(a.active for a in inputs))

    def _concatenate(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        along = equation.params["dimension"]
        axes = list(inputs[0].axes)
        for array in inputs[1:]:
            for i, axis in enumerate(array.axes):
                if i != along:
                    self.units.unify(axes[i], axis)
        parts = [array.axes[along] for array in inputs]
        axes[along] = tuple(entry for part in parts for entry in part)
        return Array(tuple(axes), any(array.active for array in inputs))

    def _stack(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        for array in inputs[1:]:
            self._agree(inputs[:1], [array])
        axes = list(inputs[0].axes)
        rows = self.units.axis(len(inputs), "counts arrays that are stacked")
        axes.insert(equation.params["axis"], rows)
        return Array(tuple(axes), any(array.active for array in inputs))

    def _unstack(self, equation: Any, inputs: list[Array], *_: Any) -> list[Array]:
        axes = list(inputs[0].axes)
        self.units.fix(axes.pop(equation.params["axis"]), "is taken apart")
        return [inputs[0]._replace(axes=tuple(axes)) for _ in equation.outvars]

    def _tile(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        axes = tuple(
            axis * times if len(axis) > 1 else self.units.axis(times)
            for axis, times in zip(inputs[0].axes, equation.params["reps"], strict=True)
        )
        return inputs[0]._replace(axes=axes)

    def _pad(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        axes = []
        for axis, (low, high, inside), n in zip(
            inputs[0].axes,
            equation.params["padding_config"],
            equation.outvars[0].aval.shape,
            strict=True,
        ):
            if inside or low < 0 or high < 0:
                reason = "is cut or spread by 'pad'"
                self.units.fix(axis, reason)
                axes.append(self.units.axis(n, reason))
            else:
                new = [e for k in (low, high) for e in self._free(k)]
                axes.append((*new[:low], *axis, *new[low:]))
        return Array(tuple(axes), any(array.active for array in inputs))

    def _free(self, number: int) -> Axis:
        """Entries of which any may go, also where it is a single one."""
        return self.units.axis(number + 1)[:number]

    def _gather(self, equation: Any, inputs: list[Array], *_: Any) -> Array:
        numbers = equation.params["dimension_numbers"]
        sizes = equation.params["slice_sizes"]
        shape = equation.outvars[0].aval.shape
        array, places = inputs
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        for i, axis in enumerate(array.axes):
            if i in gone or sizes[i] != len(axis):
                self.units.fix(axis, "is looked up")
        self._fix(places, "says what is looked up")
        left = [i for i in range(len(array.axes)) if i not in gone]
        own = {
            place: array.axes[i]
            for i, place in zip(left, numbers.offset_dims, strict=True)
            if sizes[i] == len(array.axes[i])
        }
        axes = [
            own.get(i) or self.units.axis(n, "is looked up")
            for i, n in enumerate(shape)
        ]
        if places.active:
            # What is looked up depends on the inputs, whatever the array holds.
            for axis in axes:
                self.units.mark_varying(axis)
        return Array(tuple(axes), array.active or places.active)

    # ------------------------------------------------------------------------ products

    def _dot_general(
        self, equation: Any, inputs: list[Array], place: Place, rounds: int
    ) -> Array:
        summed, shared = equation.params["dimension_numbers"]
        left, right = inputs
        for mine, others in (summed, shared):
            for a, b in zip(mine, others, strict=True):
                self.units.unify(left.axes[a], right.axes[b])
        free = [
            [a for i, a in enumerate(array.axes) if i not in {*s, *b}]
            for array, s, b in zip(inputs, summed, shared, strict=True)
        ]
        if left.active and right.active:
            self._mark_heads(
                [left.axes[a] for a in summed[0]],
                [left.axes[a] for a in shared[0]],
                [*free[0], *free[1]],
            )
            for a in summed[0]:
                # Such as what is in a head, whose size scales the scores.
                self.units.fix(left.axes[a], "is summed between two activations")
            for axis in (*free[0], *free[1]):
                # A constant times what depends on the inputs is none.
                self.units.mark_varying(axis)
        if left.active != right.active:
            side = int(left.active)
            weight = inputs[side]
            self._multiplied(weight, [weight.axes[i] for i in summed[side]], free[side])
        axes = (*(left.axes[a] for a in shared[0]), *free[0], *free[1])
        active = left.active or right.active
        if active:
            every = (*axes, *(left.axes[a] for a in summed[0]))
            operands = (left.axes, right.axes)
            self.costs.append(Cost(every, rounds, equation, operands, rounds))
        return Array(axes, active)

    def _mark_heads(
        self, summed: Sequence[Axis], shared: Sequence[Axis], free: Sequence[Axis]
    ) -> None:
        """Says which axes of a product of two activations are heads.

        Those that both have; or, where all queries meet one head of keys, those that
        queries have beside what is summed, of one projection, once the scores meet
        values: a weight that is made of activations has outputs beside its inputs too.
        """
        for axis in shared:
            self.units.mark_heads(axis)
        here = {c for axis in free for c in self.units.classes(axis[0])}
        for queries in self._queries:
            if not here.isdisjoint(self.units.classes(queries[0])):
                self.units.mark_heads(queries)
        if any(map(self._goes, shared)):
            return
        for axis in free:
            if any(self._of_one_axis(axis, inside) for inside in summed):
                self._queries.append(axis)

    def _of_one_axis(self, first: Axis, second: Axis) -> bool:
        """Whether two axes that may go are parts of one axis of a weight."""
        if not (self._goes(first) and self._goes(second)):
            return False
        one, other = (self.units.classes(axis[0]) for axis in (first, second))
        wanted = {*one, *other}
        return len(wanted) > 1 and any(
            wanted <= {*self.units.classes(entry)}
            for axes in self.weights.values()
            for axis in axes
            for entry in axis
        )

    def _goes(self, axis: Axis) -> bool:
        """Whether some entry of an axis may go by now."""
        found = (self.units.classes(entry) for entry in axis)
        return any(not self.units.reason(c) for classes in found for c in classes)

    def _multiplied(
        self, weight: Array, summed: Sequence[Axis], free: Sequence[Axis]
    ) -> None:
        for path in weight.of:
            self.read[path] += summed
            self.made[path] += free

    def _conv_general_dilated(
        self, equation: Any, inputs: list[Array], place: Place, rounds: int
    ) -> Array:
        settings = equation.params
        numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
        images, kernel = inputs
        if settings["batch_group_count"] != 1 or not images.active or kernel.active:
            reason = "enters a convolution that is no layer"
            return self._unknown(equation, inputs, reason)[0]
        shape = equation.outvars[0].aval.shape
        reason = "is mixed by a convolution"
        for i in numbers.lhs_spec[2:]:
            self.units.fix(images.axes[i], reason)
        for i in numbers.rhs_spec[2:]:
            self.units.fix(kernel.axes[i], reason)
        outputs = kernel.axes[numbers.rhs_spec[0]]
        features = images.axes[numbers.lhs_spec[1]]
        per_group = kernel.axes[numbers.rhs_spec[1]]
        self._grouped(features, per_group, outputs, groups)
        self._multiplied(kernel, [per_group], [outputs])
        axes = [self.units.axis(n, reason) for n in shape]
        axes[numbers.out_spec[0]] = images.axes[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = outputs
        positions = math.prod(
            # Each weight of a transposed convolution is used once a position of its
            # input.
            shape[after] if dilation == 1 else len(images.axes[before])
            for after, before, dilation in zip(
                numbers.out_spec[2:],
                numbers.lhs_spec[2:],
                settings["lhs_dilation"],
                strict=True,
            )
        )
        taps = math.prod(len(kernel.axes[i]) for i in numbers.rhs_spec[2:])
        batch = images.axes[numbers.lhs_spec[0]]
        factor = rounds * positions * taps
        operands = (images.axes, kernel.axes)
        cost = Cost((batch, outputs, per_group), factor, equation, operands, rounds)
        self.costs.append(cost)
        return Array(tuple(axes), True)

    def _grouped(
        self, features: Axis, per_group: Axis, outputs: Axis, groups: int
    ) -> None:
        """A convolution's channels, in groups of which each has its own kernel.

        Where a group has several channels its number stays and all groups lose alike,
        so that a function whose number of groups is fixed still runs.
        """
        if groups == 1:
            self.units.unify(features, per_group)
            return
        which, inside = self.units.divided(features, groups)
        self.units.unify(inside, per_group)
        own, filters = self.units.divided(outputs, groups)
        self.units.unify(which, own)
        if len(inside) > 1:
            self.units.fix(which, "counts the groups of a convolution")
        else:
            self.units.fix(filters, "counts the outputs of each channel")


def coupled(f: Callable[[Params, Any], Any], params: Params, inputs: Any) -> Coupling:
    """Walks the program of a function; nothing is executed.

    Args:
        f: (params, inputs) -> any pytree of arrays.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        inputs: The same.
    """
    with explained():
        program = jax.make_jaxpr(f)(params, inputs)
    shapes = {p: tuple(leaf.shape) for p, leaf in leaves_by_path(params).items()}
    return Coupling(program, shapes)
