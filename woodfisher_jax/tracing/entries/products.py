"""Which entries meet in products, what these cost, and which entries are heads."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.tracing.entries.rules import unknown
from woodfisher_jax.tracing.entries.units import Array, Axis, Units
from woodfisher_jax.tracing.primitives import convolution_positions

BETWEEN = (
    "is summed between two activations, such as queries and keys, or a weight that the "
    "inputs choose"
)
"""Why what is in a head, or what an expert that is looked up reads, stays."""

NEVER_ZERO = (
    "is read through an operation that is not zero where its weight is, such as 1 + w"
)
"""Why what such a weight reads stays."""


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


class EntryProducts:
    """The products that were met on the way through a program.

    Attributes:
        costs: Of each product, in order.
        read: Of each tensor, the axes that products with activations are summed over.
        made: Of each tensor, the axes that such products give their outputs.
    """

    def __init__(self, units: Units, weights: Mapping[str, tuple[Axis, ...]]) -> None:
        """None yet.

        Args:
            units: Of the program's entries.
            weights: The axes of each tensor by path.
        """
        self._units, self._weights = units, weights
        # Axes that are heads if they are in a later product of two activations.
        self._queries: list[Axis] = []
        self.costs: list[Cost] = []
        self.read: dict[str, list[Axis]] = {path: [] for path in weights}
        self.made: dict[str, list[Axis]] = {path: [] for path in weights}

    def followed(self, equation: Any, inputs: Sequence[Array], rounds: int) -> Array:
        """The result of a product, which is noted.

        Args:
            equation: With one of the primitives
                :data:`~woodfisher_jax.tracing.primitives.PRODUCTS`.
            inputs: Its operands.
            rounds: How often it runs.
        """
        if equation.primitive.name == "dot_general":
            return self._dot(equation, inputs, rounds)
        return self._convolution(equation, inputs, rounds)

    def _dot(self, equation: Any, inputs: Sequence[Array], rounds: int) -> Array:
        summed, shared = equation.params["dimension_numbers"]
        left, right = inputs
        for mine, others in (summed, shared):
            for a, b in zip(mine, others, strict=True):
                self._units.unify(left.axes[a], right.axes[b])
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
                self._units.fix(left.axes[a], BETWEEN)
            # A constant times what depends on the inputs is none.
            self._units.mark_varying(*free[0], *free[1])
        if left.active != right.active:
            side = int(left.active)
            weight = inputs[side]
            self._multiplied(weight, summed[side], free[side])
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
            self._units.mark_heads(axis)
        here = {c for axis in free for c in self._units.classes(axis[0])}
        for queries in self._queries:
            if not here.isdisjoint(self._units.classes(queries[0])):
                self._units.mark_heads(queries)
        if any(map(self._goes, shared)):
            return
        for axis in free:
            if any(self._of_one_weight(axis, inside) for inside in summed):
                self._queries.append(axis)

    def _of_one_weight(self, first: Axis, second: Axis) -> bool:
        """Whether two axes that may go are outputs of one weight, or parts of some."""
        if not (self._goes(first) and self._goes(second)):
            return False
        one, other = (self._units.classes(axis[0]) for axis in (first, second))
        wanted = {*one, *other}
        within = (
            {*self._units.classes(entry)}
            for axes in self._weights.values()
            for axis in axes
            for entry in axis
        )
        beside = (
            {c for axis in axes for c in self._units.classes(axis[0])}
            for axes in self.made.values()
        )
        return len(wanted) > 1 and any(wanted <= own for own in chain(beside, within))

    def _goes(self, axis: Axis) -> bool:
        """Whether some entry of an axis may go by now."""
        found = (self._units.classes(entry) for entry in axis)
        return any(not self._units.reason(c) for classes in found for c in classes)

    def _multiplied(
        self, weight: Array, summed: Sequence[int], free: Sequence[Axis]
    ) -> None:
        """Notes what a weight is summed over, by number, and what it gives.

        What it reads stays where it is not zero though the weights that it is made of
        are: no mask of theirs makes it contribute nothing.
        """
        for path in weight.of:
            self.read[path] += [weight.axes[i] for i in summed]
            self.made[path] += free
        # A tensor of one axis that reads is the weight itself, not part of its form.
        formed = any(len(self._weights[path]) > 1 for path in weight.of)
        if not formed or weight.vanishes or weight.value is None:
            return
        numbers = weight.value()
        if numbers is not None:
            # Divided by their norm, weights that are all zero are no numbers.
            nonzero = np.nan_to_num(np.abs(numbers).astype(float)) != 0
            for i in summed:
                rest = tuple(j for j in range(nonzero.ndim) if j != i)
                entries = np.flatnonzero(nonzero.any(axis=rest))
                self._units.fix([weight.axes[i][k] for k in entries], NEVER_ZERO)

    def _convolution(
        self, equation: Any, inputs: Sequence[Array], rounds: int
    ) -> Array:
        settings = equation.params
        numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
        images, kernel = inputs
        if settings["batch_group_count"] != 1 or not images.active or kernel.active:
            reason = "enters a convolution that is no layer"
            return unknown(self._units, equation, inputs, reason)[0]
        shape = equation.outvars[0].aval.shape
        reason = "is mixed by a convolution"
        for i in numbers.lhs_spec[2:]:
            self._units.fix(images.axes[i], reason)
        for i in numbers.rhs_spec[2:]:
            self._units.fix(kernel.axes[i], reason)
        outputs = kernel.axes[numbers.rhs_spec[0]]
        features = images.axes[numbers.lhs_spec[1]]
        per_group = kernel.axes[numbers.rhs_spec[1]]
        self._grouped(features, per_group, outputs, groups)
        self._multiplied(kernel, [numbers.rhs_spec[1]], [outputs])
        axes = [self._units.axis(n, reason) for n in shape]
        axes[numbers.out_spec[0]] = images.axes[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = outputs
        taps = math.prod(len(kernel.axes[i]) for i in numbers.rhs_spec[2:])
        batch = images.axes[numbers.lhs_spec[0]]
        factor = rounds * convolution_positions(equation) * taps
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
            self._units.unify(features, per_group)
            return
        which, inside = self._units.divided(features, groups)
        self._units.unify(inside, per_group)
        own, filters = self._units.divided(outputs, groups)
        self._units.unify(which, own)
        if len(inside) > 1:
            self._units.fix(which, "counts the groups of a convolution")
        else:
            self._units.fix(filters, "counts the outputs of each channel")
