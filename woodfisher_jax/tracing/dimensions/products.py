"""Products of tensors with activations, and what each axis of a tensor is in them.

The axes that are summed over are the tensor's inputs, those that are left are outputs,
those that both sides share are stacked layers.
"""

import math
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from woodfisher_jax.tracing.dimensions.origins import Array, Origins, Source, touched
from woodfisher_jax.tracing.primitives import convolution_positions


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


class Products:
    """The products that were met on the way through a program.

    Attributes:
        uses: Products of tensors with activations, and tensors in products that cannot
            be followed, in order.
        chains: What a product of two activations keeps apart, and what the one before
            it did: heads, among others, are in both.
    """

    def __init__(self, origins: Origins) -> None:
        """None yet.

        Args:
            origins: Of the program's arrays.
        """
        self._origins = origins
        self.uses: list[Occurrence | Hidden] = []
        self.chains: list[tuple[frozenset[int], frozenset[int]]] = []

    def multiplied(
        self, equation: Any, inputs: Sequence[Array], rounds: int | None
    ) -> Array:
        """The result of a product, which is noted.

        Args:
            equation: With one of the primitives
                :data:`~woodfisher_jax.tracing.primitives.PRODUCTS` or
                :data:`~woodfisher_jax.tracing.primitives.RAGGED_PRODUCTS`.
            inputs: Its operands.
            rounds: How often it runs; None if that is not known.
        """
        name = equation.primitive.name
        if name == "dot_general":
            return self._dot(equation, inputs, rounds)
        if name == "conv_general_dilated":
            return self._convolution(equation, inputs, rounds)
        return self._ragged(equation, inputs, rounds)

    def summed(self, array: Array, gone: Sequence[int], rounds: int | None) -> None:
        """Notes products by hand, as in ``sum(x * w, -1)``, which tell no roles.

        The mean of a loss leaves no axis; what it scales before need be no layer.

        Args:
            array: That is summed.
            gone: Over these axes.
            rounds: How often; None if that is not known.
        """
        if len(gone) == len(array.axes):
            return
        length = self._origins.length
        macs = _times(math.prod(map(length, array.axes)), rounds)
        for path, source in array.scaled.items():
            places = self._origins.places(path, source)
            if any(places[i] and length(array.axes[i]) > 1 for i in gone):
                self.uses.append(Occurrence(path, {}, macs))

    def hide(self, inputs: Sequence[Array], reason: str) -> None:
        """Notes tensors that are used together with activations, if there are any.

        Args:
            inputs: Arrays that meet.
            reason: A clause whose subject is a tensor.
        """
        if any(a.active for a in inputs):
            self.uses += [Hidden(path, reason) for path in sorted(touched(inputs))]

    # --------------------------------------------------------------------- dense layers

    def _dot(self, equation: Any, inputs: Sequence[Array], rounds: int | None) -> Array:
        summed, shared = equation.params["dimension_numbers"]
        left, right = inputs
        for mine, others in (summed, shared):
            self._origins.unify(
                [left.axes[i] for i in mine], [right.axes[i] for i in others]
            )
        letters = [
            [
                "i" if i in summed[side] else "s" if i in shared[side] else "o"
                for i in range(len(array.axes))
            ]
            for side, array in enumerate(inputs)
        ]
        self._record(equation, inputs, letters, _dot_macs(equation, summed[0], rounds))
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
        sources = self._dot_sources(inputs, shared, free)
        return result._replace(sources=sources, touched=touched(inputs))

    def _dot_sources(
        self,
        inputs: Sequence[Array],
        shared: Sequence[Sequence[int]],
        free: Sequence[Sequence[int]],
    ) -> dict[str, Source]:
        """The tensors in a product of tensors; the other operand's axes are not theirs.

        Args:
            inputs: Left and right.
            shared: The axes of each that both share.
            free: The axes of each that the other has not.
        """
        sources = {}
        for side, array in enumerate(inputs):
            for path, source in array.sources.items():
                own = [
                    *(source.axes[i] for i in shared[side]),
                    *(
                        source.axes[i]
                        if s == side
                        else self._origins.dims.axis(self._origins.length(a.axes[i]))
                        for s, a in enumerate(inputs)
                        for i in free[s]
                    ),
                ]
                sources[path] = source._replace(axes=tuple(own))
        return sources

    def _ragged(
        self, equation: Any, inputs: Sequence[Array], rounds: int | None
    ) -> Array:
        """Rows of activations, each times the matrix of its own group."""
        numbers = equation.params.get("ragged_dot_dimension_numbers")
        result = self._origins.mixed(inputs, equation.outvars[0].aval.shape)
        if numbers is None or len(numbers.rhs_group_dimensions) != 1:
            self.hide(inputs, f"enters {equation.primitive.name!r} in another form")
            return result
        summed, shared = numbers.dot_dimension_numbers
        stacked = {*numbers.rhs_group_dimensions, *shared[1]}
        letters = [
            "i" if i in summed[1] else "s" if i in stacked else "o"
            for i in range(len(inputs[1].axes))
        ]
        macs = _dot_macs(equation, summed[0], rounds)
        self._record(equation, inputs[:2], [[], letters], macs)
        return result

    # --------------------------------------------------------------------- convolutions

    def _convolution(
        self, equation: Any, inputs: Sequence[Array], rounds: int | None
    ) -> Array:
        settings = equation.params
        numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
        images, kernel = inputs
        result = self._origins.mixed(inputs, equation.outvars[0].aval.shape)
        if settings["batch_group_count"] != 1:
            self.hide(inputs, "enters a convolution with groups of examples")
            return result
        output, channels, *_ = numbers.rhs_spec
        letters = ["k"] * len(kernel.axes)
        letters[output], letters[channels] = "o", "i"
        axes = list(result.axes)
        axes[numbers.out_spec[0]] = images.axes[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = kernel.axes[output]
        if groups == 1:
            self._origins.dims.unify(
                images.axes[numbers.lhs_spec[1]], kernel.axes[channels]
            )
        shapes = [variable.aval.shape for variable in equation.invars]
        examples = shapes[0][numbers.lhs_spec[0]]
        macs = examples * convolution_positions(equation) * math.prod(shapes[1])
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
                number *= self._origins.dims.sizes[layers[-1]]
            if number > 1 and groups % number == 0:
                found.update(layers)
        return found

    # ------------------------------------------------------------------- what is noted

    def _record(
        self,
        equation: Any,
        inputs: Sequence[Array],
        letters: Sequence[Sequence[str]],
        macs: int | None,
        stacked: Set[int] = frozenset(),
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
                roles = self._roles(source, own, stacked)
                # What is looked up and then multiplied is a weight if it has both
                # inputs and outputs: experts, not embeddings.
                mine = {roles[d] for d in self._origins.dims_of(path) & roles.keys()}
                if not array.active or {"i", "o"} <= mine:
                    factor = self._is_factor(path, source, own, roles)
                    factor = factor and not array.active
                    self.uses.append(Occurrence(path, roles, macs, factor))
            if not array.active and not array.sources:
                on = self._origins.fresh((), True)
                self.hide([on, array], f"is changed before {name!r}")

    def _roles(
        self, source: Source, letters: Sequence[str], stacked: Set[int]
    ) -> dict[int, str]:
        """The role of each dimension of a tensor that is multiplied.

        Args:
            source: The tensor in the operand.
            letters: The role of each axis of the operand.
            stacked: Dimensions that count layers, whatever their axis.
        """
        roles: dict[int, str] = {}
        for axis, letter in zip(source.axes, letters, strict=True):
            for dim in axis:
                role = "s" if dim in stacked else letter
                for other in self._origins.meant(dim):
                    # Both input and output: a position, as of a kernel.
                    if roles.setdefault(other, role) != role:
                        roles[other] = "s" if "s" in (role, roles[other]) else "k"
        return dict.fromkeys(source.stacked, "s") | roles

    def _is_factor(
        self, path: str, source: Source, letters: Sequence[str], roles: dict[int, str]
    ) -> bool:
        """Whether the tensor scales inputs or outputs of another one, which is known.

        It is repeated along an axis that is none of its own.
        """
        origins = self._origins
        repeated = any(
            letter in "io" and not place and origins.length(axis) > 1
            for place, axis, letter in zip(
                origins.places(path, source), source.axes, letters, strict=True
            )
        )
        return repeated and all(
            origins.dims.sizes[leaf] == 1 or any(d in roles for d in above)
            for leaf, above in origins.own_leaves(path)
        )


def _dot_macs(equation: Any, summed: Sequence[int], rounds: int | None) -> int | None:
    """Multiply-accumulates: entries of the output times what is summed over."""
    sizes = [equation.invars[0].aval.shape[axis] for axis in summed]
    return _times(math.prod((*equation.outvars[0].aval.shape, *sizes)), rounds)


def _times(macs: int, rounds: int | None) -> int | None:
    return None if rounds is None else macs * rounds
