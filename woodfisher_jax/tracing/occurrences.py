"""Products of a program's tensors with activations, and what each axis is in them.

Each array of the program carries, axis by axis, the dimensions that it is made of
(:mod:`woodfisher_jax.tracing.dims`). Where a tensor is multiplied with activations, the
axes that are summed over are its inputs, those that are left are outputs, those that
both sides share are stacked layers. Calls, ``scan``, loops and branches are followed;
so are tensors that are scaled, normalised or combined before they are used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from woodfisher_jax.tracing.dims import Axis, Dims
from woodfisher_jax.tracing.layers import (
    CALLS,
    REDUCTIONS,
    called,
    contains_product,
    scan_lengths,
)


class Occurrence(NamedTuple):
    """A tensor times activations: a dense layer, a convolution, a lookup's decoder.

    Attributes:
        path: Of the tensor.
        roles: From each of its dimensions that the product names to a letter of
            :data:`~woodfisher_jax.trees.axes.ROLES`.
        macs: Multiply-accumulates on the traced batch; None where the number of rounds
            of a loop is not known.
        factor: Whether the tensor is a scale of inputs or outputs of another one.
    """

    path: str
    roles: dict[int, str]
    macs: int | None
    factor: bool = False


class Hidden(NamedTuple):
    """A tensor that enters a product which cannot be followed.

    Attributes:
        path: Of the tensor.
        reason: A clause whose subject is the tensor.
    """

    path: str
    reason: str


class _Source(NamedTuple):
    """A tensor that an array holds the numbers of.

    Attributes:
        axes: Of the array, in dimensions of the tensor; other dimensions where an axis
            is not the tensor's.
        stacked: Dimensions of which the array holds one entry, each in its turn.
        mixed: Whether the array holds sums of the tensor's entries in several orders.
    """

    axes: tuple[Axis, ...]
    stacked: frozenset[int] = frozenset()
    mixed: bool = False


class Array(NamedTuple):
    """What is known of an array of the program.

    Attributes:
        axes: Its dimensions, axis by axis.
        active: Whether it depends on the batch.
        sources: The tensors whose entries it holds, moved, scaled or combined.
        touched: All tensors that it depends on, if it does not depend on the batch.
        scaled: If it is activations times tensors entry by entry, these.
        apart: The dimensions that the products of two activations which it comes from,
            without a weight between, keep apart.
    """

    axes: tuple[Axis, ...]
    active: bool = False
    sources: Mapping[str, _Source] = {}
    touched: frozenset[str] = frozenset()
    scaled: Mapping[str, _Source] = {}
    apart: frozenset[int] = frozenset()


# After these nothing is apart but what they say themselves.
_OWN_APART = (
    *CALLS,
    "cond",
    "conv_general_dilated",
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "scan",
    "while",
)
_MIXING = ("cumsum", "cumprod", "cummax", "cummin", "sort", "fft", "cumlogsumexp")


class Walk:
    """A program followed equation by equation.

    Attributes:
        dims: Of all arrays.
        shapes: The shape of each tensor by path.
        raw: The axes of each tensor, in dimensions of its own.
        uses: Products of tensors with activations, and tensors in products that cannot
            be followed, in order.
        read: The tensors that some equation reads.
        chains: What a product of two activations keeps apart, and what the one before
            it did: heads, among others, are in both.
        torn: Dimensions that are cut into parts of several lengths.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Nothing is followed yet.

        Args:
            shapes: The shape of each tensor by path.
        """
        self.dims = Dims()
        self.shapes = dict(shapes)
        self.raw = {
            path: tuple(self.dims.axis(n) for n in shape)
            for path, shape in shapes.items()
        }
        self.uses: list[Occurrence | Hidden] = []
        self.read: set[str] = set()
        self.chains: list[tuple[frozenset[int], frozenset[int]]] = []
        self.torn: set[int] = set()
        # Of an axis that is part of a longer one, or has others as its parts: the
        # dimensions whose role is its own.
        self._stands_for: dict[int, Axis] = {}
        self._lengths: dict[Axis, int] = {}

    def tensors(self) -> list[Array]:
        """The tensors as arrays of the program, in order."""
        return [
            Array(axes, False, {path: _Source(axes)}, frozenset([path]))
            for path, axes in self.raw.items()
        ]

    def own_leaves(self, path: str) -> list[tuple[int, tuple[int, ...]]]:
        """The leaves of a tensor's axes, each with all that it is part of."""

        def below(dim: int, above: Axis) -> list[tuple[int, Axis]]:
            parts, chain = self.dims.parts(dim), (dim, *above)
            if not parts:
                return [(dim, chain)]
            return [found for part in parts for found in below(part, chain)]

        return [
            found for axis in self.raw[path] for dim in axis for found in below(dim, ())
        ]

    def fresh(self, shape: Sequence[int], active: bool = False) -> Array:
        """An array whose dimensions are no other's."""
        return Array(tuple(self.dims.axis(n) for n in shape), active)

    def follow(
        self, jaxpr: Jaxpr, arguments: Sequence[Array], rounds: int | None
    ) -> list[Array]:
        """Follows arrays through the equations of a jaxpr.

        Args:
            jaxpr: The program.
            arguments: Its inputs.
            rounds: How often the program runs; None if that is not known.

        Returns:
            Its outputs.
        """
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Array:
            if isinstance(atom, Literal) or atom not in known:
                return self.fresh(getattr(atom.aval, "shape", ()))
            return known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            outputs = self._step(equation, inputs, rounds)
            if equation.primitive.name not in _OWN_APART:
                apart = frozenset().union(*(a.apart for a in inputs))
                outputs = [a._replace(apart=apart) for a in outputs]
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> list[Array]:
        name = equation.primitive.name
        shapes = [tuple(v.aval.shape) for v in equation.outvars]
        if name in CALLS:
            return self.follow(called(equation)[0], inputs, rounds)
        if name == "scan":
            return self._scan(equation, inputs, rounds)
        if name == "while":
            return self._while(equation, inputs)
        if name == "cond":
            return self._cond(equation, inputs, rounds)
        self.read.update(*(array.touched for array in inputs))
        if name == "dot_general":
            return [self._dot(equation, inputs, rounds)]
        if name in ("ragged_dot", "ragged_dot_general"):
            return [self._ragged(equation, inputs, rounds)]
        if name == "conv_general_dilated":
            return [self._convolution(equation, inputs, rounds)]
        if name in _VIEWS and len(shapes) == len(inputs):
            views = zip(equation.invars, equation.outvars, inputs, strict=True)
            return [
                self._viewed(equation, a.aval.shape, b.aval.shape, array)
                for a, b, array in views
            ]
        if name in ("slice", "dynamic_slice", "split"):
            return self._slices(equation, inputs, shapes)
        if name == "unstack":
            return self._unstacked(equation, inputs[0])
        if name == "stack":
            place = equation.params["axis"]
            one = [self._expanded(array, place) for array in inputs]
            return [self._partly("concatenate", one, shapes[0])]
        if name == "gather":
            return [self._gathered(equation, inputs)]
        if name in REDUCTIONS and len(shapes) == 1:
            gone = equation.params["axes"]
            if name == "reduce_sum":
                self._summed(inputs[0], gone, rounds)
            return [_moved(inputs[0], lambda axes: _without(axes, gone))]
        if name in ("concatenate", "pad", "dynamic_update_slice"):
            return [self._partly(name, inputs, shapes[0])]
        return self._others(equation, inputs, shapes)

    def _others(
        self, equation: Any, inputs: list[Array], shapes: list[tuple[int, ...]]
    ) -> list[Array]:
        """Elementwise primitives, and those of which nothing is known."""
        name = equation.primitive.name
        if contains_product(equation):
            self._hide(inputs, f"enters {name!r}, which is not followed")
        if name == "select_n" and shapes[0]:
            # Which operand is taken may depend on the batch; what it is does not.
            taken = self._joined(inputs[1:], shapes[0])
            return [taken._replace(active=taken.active or inputs[0].active)]
        lengths = [tuple(map(self._length, a.axes)) for a in inputs if a.axes]
        results = []
        for shape in shapes:
            # Axes of length 1 are broadcast.
            elementwise = name not in _MIXING and all(
                len(own) == len(shape)
                and all(n in (1, m) for n, m in zip(own, shape, strict=True))
                for own in lengths
            )
            combine = self._joined if elementwise and lengths else self._mixed
            results.append(combine(inputs, shape))
        if name == "mul" and results[0].active and results[0].axes:
            own = [
                self._broadcast(a, shapes[0]) for a in inputs if a.axes and not a.active
            ]
            results[0] = results[0]._replace(scaled=self._merged(own))
        return results

    def _summed(self, array: Array, gone: Sequence[int], rounds: int | None) -> None:
        """Notes products by hand, as in ``sum(x * w, -1)``, which tell no roles.

        The mean of a loss leaves no axis; what it scales before need be no layer.
        """
        if len(gone) == len(array.axes):
            return
        macs = _times(math.prod(map(self._length, array.axes)), rounds)
        for path, source in array.scaled.items():
            places = self._places(path, source)
            if any(places[i] and self._length(array.axes[i]) > 1 for i in gone):
                self.uses.append(Occurrence(path, {}, macs))

    def _joined(self, inputs: list[Array], shape: tuple[int, ...]) -> Array:
        """The result of an elementwise primitive: its operands' axes are the same."""
        own = [self._broadcast(a, shape) for a in inputs if a.axes]
        first, *rest = own
        for other in rest:
            for a, b in zip(first.axes, other.axes, strict=True):
                self.dims.unify(a, b)
        active = any(a.active for a in inputs)
        return Array(
            # Activations keep the dimensions of the layer that gave them.
            next((a.axes for a in own if a.active), first.axes),
            active,
            # An activation plus or times a tensor is no view of the tensor.
            self._merged(own) if not active or not rest else {},
            frozenset() if active else _touched(inputs),
        )

    def _broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        more = {
            i: self.dims.axis(n)
            for i, (axis, n) in enumerate(zip(array.axes, shape, strict=True))
            if self._length(axis) != n
        }
        if not more:
            return array
        return _moved(
            array, lambda axes: tuple(more.get(i, axis) for i, axis in enumerate(axes))
        )

    def _merged(self, arrays: list[Array]) -> dict[str, _Source]:
        """The sources of all; of two of one tensor that which has more of its axes."""
        found: dict[str, _Source] = {}
        for array in arrays:
            for path, source in array.sources.items():
                mine = self._places(path, source)
                other = self._places(path, found[path]) if path in found else []
                if path not in found or sum(map(len, mine)) > sum(map(len, other)):
                    found[path] = source
                elif sum(map(len, mine)) == sum(map(len, other)) and mine != other:
                    found[path] = found[path]._replace(mixed=True)
        return found

    def _places(self, path: str, source: _Source) -> list[set[int]]:
        """The tensor's own dimensions in each axis."""
        own = self._dims_of(path)
        return [
            {d for leaf in self._leaves(axis) for d in self._all_meant(leaf)} & own
            for axis in source.axes
        ]

    def _dims_of(self, path: str) -> set[int]:
        return {dim for _, chain in self.own_leaves(path) for dim in chain}

    def _leaves(self, axis: Axis) -> list[int]:
        return [leaf for dim in axis for leaf in self.dims.leaves(dim)]

    def _mixed(self, inputs: list[Array], shape: Sequence[int]) -> Array:
        """An array of which no axis is known."""
        active = any(a.active for a in inputs)
        result = self.fresh(shape, active)
        return result._replace(touched=frozenset() if active else _touched(inputs))

    def _hide(self, inputs: Sequence[Array], reason: str) -> None:
        if any(a.active for a in inputs):
            for path in sorted(_touched(inputs)):
                self.uses.append(Hidden(path, reason))

    # --------------------------------------------------------------------------- loops

    def _scan(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> list[Array]:
        settings = equation.params
        consts, carry = scan_lengths(equation)
        each = [
            _moved(_stacked(array, (0,)), lambda axes: axes[1:])
            for array in inputs[consts + carry :]
        ]
        inner = _open(settings["jaxpr"])
        total = None if rounds is None else rounds * settings["length"]
        state = inputs[consts : consts + carry]
        outputs = self._loop(inner, inputs[:consts], state, each, total)
        stacks = [
            _moved(a, lambda axes: (self.dims.axis(settings["length"]), *axes))
            for a in outputs[carry:]
        ]
        return outputs[:carry] + stacks

    def _while(self, equation: Any, inputs: list[Array]) -> list[Array]:
        settings = equation.params
        skipped, consts = settings["cond_nconsts"], settings["body_nconsts"]
        own = inputs[skipped : skipped + consts]
        inner = _open(settings["body_jaxpr"])
        return self._loop(inner, own, inputs[skipped + consts :], [], None)

    def _loop(
        self,
        jaxpr: Jaxpr,
        consts: list[Array],
        state: list[Array],
        each: list[Array],
        rounds: int | None,
    ) -> list[Array]:
        """The outputs of a loop's body, whose state is the same in every round."""
        passed = [
            variable is jaxpr.invars[len(consts) + i]
            for i, variable in enumerate(jaxpr.outvars[: len(state)])
        ]
        # Nothing is known of a state that changes but its axes; if the batch has any
        # part in the loop, it is taken to depend on it.
        active = any(a.active for a in (*consts, *state, *each))
        inside = [
            array
            if same
            else array._replace(
                active=active,
                sources={},
                touched=frozenset() if active else array.touched,
            )
            for array, same in zip(state, passed, strict=True)
        ]
        changed = [a for a, same in zip(state, passed, strict=True) if not same]
        if active and any(map(contains_product, jaxpr.eqns)):
            self._hide(
                [self.fresh((), True), *(a for a in changed if a.sources)],
                "is changed in a loop that has products with activations",
            )
        outputs = self.follow(jaxpr, [*consts, *inside, *each], rounds)
        for before, after in zip(state, outputs, strict=False):
            for a, b in zip(before.axes, after.axes, strict=True):
                self.dims.unify(a, b)
        return outputs

    def _cond(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> list[Array]:
        branches = [_open(branch) for branch in equation.params["branches"]]
        # One branch runs; which, is not known.
        many = rounds if len(branches) == 1 else None
        found = [self.follow(branch, inputs[1:], many) for branch in branches]
        results = []
        for options in zip(*found, strict=True):
            for other in options[1:]:
                for a, b in zip(options[0].axes, other.axes, strict=True):
                    self.dims.unify(a, b)
            active = any(a.active for a in options)
            sources = {} if active else self._merged(list(options))
            result = Array(options[0].axes, active, sources, _touched(options))
            results.append(result._replace(active=active or inputs[0].active))
        return results

    # --------------------------------------------------------------------------- views

    def _viewed(
        self,
        equation: Any,
        old: tuple[int, ...],
        new: tuple[int, ...],
        array: Array,
    ) -> Array:
        name, settings = equation.primitive.name, equation.params
        if name == "transpose":
            order = settings["permutation"]
            return _moved(array, lambda axes: tuple(axes[i] for i in order))
        if name == "broadcast_in_dim":
            places = settings["broadcast_dimensions"]
            kept = {place: i for i, place in enumerate(places) if new[place] == old[i]}
            more = [self.dims.axis(n) for n in new]
            return _moved(
                array,
                lambda axes: tuple(
                    axes[kept[i]] if i in kept else axis for i, axis in enumerate(more)
                ),
            )
        if settings.get("dimensions") is not None and name == "reshape":
            order = settings["dimensions"]
            array = _moved(array, lambda axes: tuple(axes[i] for i in order))
        elif old == new:
            return array
        return _moved(array, lambda axes: tuple(self.dims.reshaped(axes, new)))

    def _slices(
        self, equation: Any, inputs: list[Array], shapes: list[tuple[int, ...]]
    ) -> list[Array]:
        """Parts of an array; an axis cut to one entry counts stacked layers."""
        array, old = inputs[0], tuple(equation.invars[0].aval.shape)
        settings = equation.params
        strides = settings.get("strides") or (1,) * len(old)
        starts = settings.get("start_indices") or (0,) * len(old)
        active = any(a.active for a in inputs)

        def part(axis: Axis, whole: int, start: int, length: int, stride: int) -> Axis:
            if whole == length:
                return axis
            # An axis of equal parts, such as a fused projection's thirds, is cut: each
            # part can then be cut into heads as it is.
            if stride == 1 and length > 1 and not (whole % length or start % length):
                outer, inner = self.dims.reshaped([axis], (whole // length, length))
                self.torn.update(self._uneven(axis, length))
                for dim in inner[:1]:
                    self._stands_for[dim] = (*self._stands_for.get(dim, ()), *outer)
                return inner
            self.torn.update(axis)
            return self._alias(length, axis)

        results = []
        for shape in shapes:
            single = [
                i for i, (n, m) in enumerate(zip(old, shape, strict=True)) if m == 1 < n
            ]

            def cut(
                axes: tuple[Axis, ...], shape: Sequence[int] = shape
            ) -> tuple[Axis, ...]:
                return tuple(map(part, axes, old, starts, shape, strides))

            result = _moved(_stacked(array, single), cut)
            results.append(result._replace(active=active))
        return results

    def _unstacked(self, equation: Any, array: Array) -> list[Array]:
        """The entries along an axis, each an array."""
        place = equation.params["axis"]
        self.torn.update(array.axes[place])
        entry = _moved(_stacked(array, (place,)), lambda axes: _without(axes, [place]))
        return [entry for _ in equation.outvars]

    def _expanded(self, array: Array, place: int) -> Array:
        """The array with an axis of length 1 more."""
        more = self.dims.axis(1)
        return _moved(array, lambda axes: (*axes[:place], more, *axes[place:]))

    def _uneven(self, axis: Axis, length: int) -> Axis:
        """The axis, if it was cut into parts of another length before."""
        before = self._lengths.setdefault(axis, length)
        return () if before == length else axis

    def _alias(self, length: int, dims: Axis) -> Axis:
        """An axis of which other dimensions are part, or which is part of them."""
        axis = self.dims.axis(length)
        self._stands_for[axis[0]] = dims
        return axis

    def _gathered(self, equation: Any, inputs: list[Array]) -> Array:
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
        more = [self.dims.axis(n) for n in out]

        def taken(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            # Entries whose places do not depend on the batch are a choice of inputs or
            # outputs; others are looked up, one at a time.
            chosen = tuple(dim for i in sorted(gone) for dim in axes[i])
            return tuple(
                axes[kept[i]]
                if i in kept
                else axis
                if active or i in numbers.offset_dims
                else self._alias(out[i], chosen)
                for i, axis in enumerate(more)
            )

        result = _moved(_stacked(inputs[0], sorted(gone)), taken)
        return result._replace(active=active)

    def _partly(self, name: str, inputs: list[Array], shape: tuple[int, ...]) -> Array:
        """Arrays side by side or padded: axes of the result's length stay the same."""
        numbers = {"pad": 1, "dynamic_update_slice": 2}
        arrays = inputs[: numbers.get(name)]
        active = any(a.active for a in inputs)
        longer = {
            i: tuple(
                dim for a in arrays if self._length(a.axes[i]) != n for dim in a.axes[i]
            )
            for i, n in enumerate(shape)
        }
        axes = [
            self._alias(n, longer[i]) if longer[i] else arrays[0].axes[i]
            for i, n in enumerate(shape)
        ]
        for array in arrays[1:]:
            for mine, other in zip(axes, array.axes, strict=True):
                self.dims.unify(mine, other)
        whole = [
            _moved(
                array,
                lambda own: tuple(
                    self._alias(n, axis) if longer[i] else axis
                    for i, (n, axis) in enumerate(zip(shape, own, strict=True))
                ),
            )
            for array in arrays
        ]
        sources = {} if active else self._merged(whole)
        touched = frozenset() if active else _touched(inputs)
        return Array(tuple(axes), active, sources, touched)

    def _length(self, axis: Axis) -> int:
        return math.prod(self.dims.sizes[dim] for dim in axis)

    # ------------------------------------------------------------------------ products

    def _dot(self, equation: Any, inputs: list[Array], rounds: int | None) -> Array:
        summed, shared = equation.params["dimension_numbers"]
        left, right = inputs
        for mine, others in (summed, shared):
            for a, b in zip(mine, others, strict=True):
                self.dims.unify(left.axes[a], right.axes[b])
        sizes = [equation.invars[0].aval.shape[axis] for axis in summed[0]]
        macs = math.prod((*equation.outvars[0].aval.shape, *sizes))
        letters = [
            [
                "i" if i in summed[side] else "s" if i in shared[side] else "o"
                for i in range(len(array.axes))
            ]
            for side, array in enumerate(inputs)
        ]
        self._record(equation, inputs, letters, _times(macs, rounds))
        free = [[i for i, letter in enumerate(own) if letter == "o"] for own in letters]
        axes = (
            *(left.axes[i] for i in shared[0]),
            *(left.axes[i] for i in free[0]),
            *(right.axes[i] for i in free[1]),
        )
        result = Array(axes, left.active or right.active)
        if left.active and right.active and summed[0]:
            apart = frozenset(dim for i in shared[0] for dim in left.axes[i])
            self.chains += [(apart, array.apart) for array in inputs]
            result = result._replace(apart=apart)
        if result.active:
            return result
        sources = {}
        for side, array in enumerate(inputs):
            for path, source in array.sources.items():
                own = [
                    *(source.axes[i] for i in shared[side]),
                    *(
                        source.axes[i]
                        if s == side
                        else self.dims.axis(self._length(a.axes[i]))
                        for s, a in enumerate(inputs)
                        for i in free[s]
                    ),
                ]
                sources[path] = source._replace(axes=tuple(own))
        return result._replace(sources=sources, touched=_touched(inputs))

    def _ragged(self, equation: Any, inputs: list[Array], rounds: int | None) -> Array:
        """Rows of activations, each times the matrix of its own group."""
        out = equation.outvars[0].aval.shape
        numbers = equation.params.get("ragged_dot_dimension_numbers")
        result = self._mixed(inputs, out)
        if numbers is None or len(numbers.rhs_group_dimensions) != 1:
            self._hide(inputs, f"enters {equation.primitive.name!r} in another form")
            return result
        summed, shared = numbers.dot_dimension_numbers
        stacked = {*numbers.rhs_group_dimensions, *shared[1]}
        letters = [
            "i" if i in summed[1] else "s" if i in stacked else "o"
            for i in range(len(inputs[1].axes))
        ]
        sizes = [equation.invars[0].aval.shape[axis] for axis in summed[0]]
        macs = _times(math.prod((*out, *sizes)), rounds)
        self._record(equation, inputs[:2], [[], letters], macs)
        return result

    def _convolution(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> Array:
        settings = equation.params
        numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
        images, kernel = inputs
        out = equation.outvars[0].aval.shape
        result = self._mixed(inputs, out)
        if settings["batch_group_count"] != 1:
            self._hide(inputs, "enters a convolution with groups of examples")
            return result
        output, channels, *_ = numbers.rhs_spec
        letters = ["k"] * len(kernel.axes)
        letters[output], letters[channels] = "o", "i"
        axes = list(result.axes)
        axes[numbers.out_spec[0]] = images.axes[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = kernel.axes[output]
        if groups == 1:
            self.dims.unify(images.axes[numbers.lhs_spec[1]], kernel.axes[channels])
        macs = _convolution_macs(equation)
        stacked = self._layers_of(kernel, output, groups)
        self._record(equation, inputs, [[], letters], _times(macs, rounds), stacked)
        return result._replace(axes=tuple(axes))

    def _layers_of(self, kernel: Array, output: int, groups: int) -> set[int]:
        """Dimensions of the outputs that count convolutions side by side.

        ``vmap`` makes one convolution with groups of many, and puts the axis of the
        layers before their outputs. In a convolution that has groups of its own they
        are no axis of the kernel.
        """
        found: set[int] = set()
        for source in kernel.sources.values():
            number, dims = 1, list(source.axes[output])
            layers: list[int] = []
            while len(dims) > 1 and number < groups:
                layers.append(dims.pop(0))
                number *= self.dims.sizes[layers[-1]]
            if number > 1 and groups % number == 0:
                found.update(layers)
        return found

    def _record(
        self,
        equation: Any,
        inputs: Sequence[Array],
        letters: Sequence[Sequence[str]],
        macs: int | None,
        stacked: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> None:
        """Notes the product of each tensor with activations.

        Args:
            equation: For messages.
            inputs: The operands.
            letters: The role of each axis of each; none for an operand that is no
                weight.
            macs: Multiply-accumulates.
            stacked: Dimensions that count layers, whatever their axis.
        """
        if not any(a.active for a in inputs):
            return
        name = equation.primitive.name
        for array, own in zip(inputs, letters, strict=True):
            for path, source in array.sources.items():
                if not own:
                    if not array.active:
                        self.uses.append(Hidden(path, f"is the image of a {name!r}"))
                    continue
                if source.mixed:
                    self.uses.append(Occurrence(path, {}, macs))
                    continue
                roles: dict[int, str] = {}
                for axis, letter in zip(source.axes, own, strict=True):
                    for dim in axis:
                        role = "s" if dim in stacked else letter
                        for other in self._all_meant(dim):
                            # Both input and output: a position, as of a kernel.
                            if roles.setdefault(other, role) != role:
                                roles[other] = (
                                    "s" if "s" in (role, roles[other]) else "k"
                                )
                roles = dict.fromkeys(source.stacked, "s") | roles
                # What is looked up and then multiplied is a weight if it has both
                # inputs and outputs: experts, not embeddings.
                mine = {roles[d] for d in self._dims_of(path) & roles.keys()}
                if not array.active or {"i", "o"} <= mine:
                    factor = self._is_factor(path, source, own, roles)
                    factor = factor and not array.active
                    self.uses.append(Occurrence(path, roles, macs, factor))
            if not array.active and not array.sources:
                self._hide([self.fresh((), True), array], f"is changed before {name!r}")

    def _is_factor(
        self, path: str, source: _Source, letters: Sequence[str], roles: dict[int, str]
    ) -> bool:
        """Whether the tensor scales inputs or outputs of another one, which is known.

        It is repeated along an axis that is none of its own.
        """
        repeated = any(
            letter in "io" and not place and self._length(axis) > 1
            for place, axis, letter in zip(
                self._places(path, source), source.axes, letters, strict=True
            )
        )
        return repeated and all(
            self.dims.sizes[leaf] == 1 or any(d in roles for d in above)
            for leaf, above in self.own_leaves(path)
        )

    def _all_meant(self, dim: int) -> list[int]:
        """A dimension and those whose role is its own."""
        others = self._stands_for.get(dim, ())
        return [dim, *(d for other in others for d in self._all_meant(other))]


_VIEWS = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
)


def _moved(array: Array, axes: Callable[[tuple[Axis, ...]], tuple[Axis, ...]]) -> Array:
    """The array with its axes, and those of its tensors, changed alike."""

    def changed(sources: Mapping[str, _Source]) -> dict[str, _Source]:
        return {
            path: source._replace(axes=axes(source.axes))
            for path, source in sources.items()
        }

    return array._replace(
        axes=axes(array.axes),
        sources=changed(array.sources),
        scaled=changed(array.scaled),
    )


def _stacked(array: Array, axes: Sequence[int]) -> Array:
    """The array of which the program holds one entry of some axes at a time."""
    sources = {
        path: source._replace(
            stacked=source.stacked.union(*(source.axes[i] for i in axes))
        )
        for path, source in array.sources.items()
    }
    return array._replace(sources=sources)


def _without(axes: tuple[Axis, ...], gone: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def _touched(arrays: Sequence[Array]) -> frozenset[str]:
    return frozenset().union(*(a.touched for a in arrays))


def _convolution_macs(equation: Any) -> int:
    """``outputs · inputs of each output``, on the traced batch.

    In a transposed convolution, whose dilated input is mostly zeros, each weight is
    used once for every input position.
    """
    settings = equation.params
    numbers = settings["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars)
    output = equation.outvars[0].aval.shape
    positions = [
        output[after] if dilation == 1 else left[before]
        for after, before, dilation in zip(
            numbers.out_spec[2:],
            numbers.lhs_spec[2:],
            settings["lhs_dilation"],
            strict=True,
        )
    ]
    return math.prod((left[numbers.lhs_spec[0]], *positions, *right))


def _times(macs: int, rounds: int | None) -> int | None:
    return None if rounds is None else macs * rounds


def _open(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
