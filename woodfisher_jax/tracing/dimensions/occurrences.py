"""A program followed to the products of its tensors with activations.

Each array of the program carries, axis by axis, the dimensions that it is made of
(:mod:`woodfisher_jax.tracing.dimensions.dims`) and the tensors that it holds
(:mod:`woodfisher_jax.tracing.dimensions.origins`). Calls, ``scan``, loops and branches
are followed; so are tensors that are scaled, normalised or combined before they are
used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

from woodfisher_jax.tracing.dimensions.origins import Array, Origins, touched
from woodfisher_jax.tracing.dimensions.products import Products
from woodfisher_jax.tracing.dimensions.views import Views
from woodfisher_jax.tracing.primitives import (
    ALONG,
    CALLS,
    PRODUCTS,
    RAGGED_PRODUCTS,
    REDUCTIONS,
    called,
    contains_product,
    opened,
    scan_operands,
)

# After these nothing is apart but what they say themselves.
_OWN_APART = (*CALLS, *PRODUCTS, *RAGGED_PRODUCTS, "cond", "scan", "while")
_MIXING = (*ALONG, "fft")


class Walk:
    """A program followed equation by equation.

    Attributes:
        origins: The tensors, and their dimensions in the program's arrays.
        views: What is moved and cut.
        products: What is multiplied.
        read: The tensors that some equation reads.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Nothing is followed yet.

        Args:
            shapes: The shape of each tensor by path.
        """
        self.origins = Origins(shapes)
        self.views = Views(self.origins)
        self.products = Products(self.origins)
        self.read: set[str] = set()

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
                return self.origins.fresh(getattr(atom.aval, "shape", ()))
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
        if name in CALLS:
            return self.follow(called(equation)[0], inputs, rounds)
        if name == "scan":
            return self._scan(equation, inputs, rounds)
        if name == "while":
            return self._while(equation, inputs)
        if name == "cond":
            return self._cond(equation, inputs, rounds)
        self.read.update(*(array.touched for array in inputs))
        if name in (*PRODUCTS, *RAGGED_PRODUCTS):
            return [self.products.multiplied(equation, inputs, rounds)]
        moved = self.views.moved(equation, inputs)
        if moved is not None:
            return moved
        if name in REDUCTIONS and len(equation.outvars) == 1:
            gone = equation.params["axes"]
            if name == "reduce_sum":
                self.products.summed(inputs[0], gone, rounds)
            return [inputs[0].without(gone)]
        return self._others(equation, inputs)

    def _others(self, equation: Any, inputs: list[Array]) -> list[Array]:
        """Elementwise primitives, and those of which nothing is known."""
        name = equation.primitive.name
        shapes = [tuple(v.aval.shape) for v in equation.outvars]
        if contains_product(equation):
            self.products.hide(inputs, f"enters {name!r}, which is not followed")
        if name == "select_n" and shapes[0]:
            # Which operand is taken may depend on the batch; what it is does not.
            taken = self.origins.joined(inputs[1:], shapes[0])
            return [taken._replace(active=taken.active or inputs[0].active)]
        lengths = [tuple(map(self.origins.length, a.axes)) for a in inputs if a.axes]
        results = []
        for shape in shapes:
            # Axes of length 1 are broadcast.
            elementwise = name not in _MIXING and all(
                len(own) == len(shape)
                and all(n in (1, m) for n, m in zip(own, shape, strict=True))
                for own in lengths
            )
            joined = elementwise and lengths
            combine = self.origins.joined if joined else self.origins.mixed
            results.append(combine(inputs, shape))
        if name == "mul" and results[0].active and results[0].axes:
            own = [
                self.origins.broadcast(a, shapes[0])
                for a in inputs
                if a.axes and not a.active
            ]
            results[0] = results[0]._replace(scaled=self.origins.merged(own))
        return results

    # --------------------------------------------------------------- loops and branches

    def _scan(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> list[Array]:
        settings = equation.params
        consts, state, stacks = scan_operands(equation, inputs)
        each = [array.stacked((0,)).without((0,)) for array in stacks]
        inner = opened(settings["jaxpr"])
        total = None if rounds is None else rounds * settings["length"]
        outputs = self._loop(inner, consts, state, each, total)
        rows = [
            a.moved(lambda axes: (self.origins.dims.axis(settings["length"]), *axes))
            for a in outputs[len(state) :]
        ]
        return outputs[: len(state)] + rows

    def _while(self, equation: Any, inputs: list[Array]) -> list[Array]:
        settings = equation.params
        skipped, consts = settings["cond_nconsts"], settings["body_nconsts"]
        own = inputs[skipped : skipped + consts]
        inner = opened(settings["body_jaxpr"])
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
            self.products.hide(
                [self.origins.fresh((), True), *(a for a in changed if a.sources)],
                "is changed in a loop that has products with activations",
            )
        outputs = self.follow(jaxpr, [*consts, *inside, *each], rounds)
        for before, after in zip(state, outputs, strict=False):
            self.origins.unify(before.axes, after.axes)
        return outputs

    def _cond(
        self, equation: Any, inputs: list[Array], rounds: int | None
    ) -> list[Array]:
        branches = [opened(branch) for branch in equation.params["branches"]]
        # One branch runs; which, is not known.
        many = rounds if len(branches) == 1 else None
        found = [self.follow(branch, inputs[1:], many) for branch in branches]
        results = []
        for options in zip(*found, strict=True):
            for other in options[1:]:
                self.origins.unify(options[0].axes, other.axes)
            active = any(a.active for a in options)
            sources = {} if active else self.origins.merged(options)
            result = Array(options[0].axes, active, sources, touched(options))
            results.append(result._replace(active=active or inputs[0].active))
        return results
