"""A function run in segments, cut where chosen layers take their inputs.

The layers of a network are pruned one after another, each on inputs that come from
layers already pruned. Run as a whole for every layer, a network of depth L costs L
passes. Here the function's own jaxpr is cut before the layers, and what later segments
need of a batch is kept in between, so that all of them together are one pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from woodfisher_jax.tracing.flat import bind, flattened
from woodfisher_jax.tracing.layers import Product, Use, find_uses
from woodfisher_jax.trees.paths import Params, leaves_by_path

Var = Any
"""A variable of a jaxpr."""


class Read(NamedTuple):
    """A parameter, or a part of one, as a segment takes it.

    Attributes:
        path: The parameter.
        part: Starts, stops and strides of a slice; None for all of it.
    """

    path: str
    part: tuple[tuple[int, ...], ...] | None

    def of(self, leaf: Any) -> Any:
        """The value, from that of the parameter."""
        if self.part is None:
            return leaf
        return np.asarray(leaf)[tuple(map(slice, *self.part))]


Run = Callable[..., tuple[list[Any], list[Any]]]


class Compiled(NamedTuple):
    """A function of pytrees of arrays, compiled when it is called.

    Attributes:
        run: From leaves to leaves; functions with the same equations share one.
        structure: Of what is returned.
    """

    run: Any
    structure: Any

    def __call__(self, *arguments: Any) -> Any:
        """Evaluates it."""
        leaves = self.run(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(self.structure, leaves)

    def lower(self, *arguments: Any) -> Any:
        """Lowers it for shapes, as ``jax.jit`` does."""
        return self.run.lower(*jax.tree.leaves(arguments))


class Segment(NamedTuple):
    """Some equations of a function.

    Attributes:
        reads: The parameters that they use.
        takes: Variables of a batch that earlier segments have left.
        gives: Variables that later segments need.
        inputs: Of each layer that comes next, the operand that is not its weight.
        constants: Arrays that the function closes over.
        products: The equations of layers that it has, by index.
        pure: (values of reads, of takes, constants, noise=()) -> (values of gives, of
            inputs); ``noise`` has an array for each of ``products`` that is added to
            its output.
        compiled: The same, compiled; equal segments share one function.
        shapes: Of the values of ``reads``, of ``takes`` and of ``constants``.
        given: Shapes of ``gives``, or where there are none, of ``inputs``.
    """

    reads: tuple[Read, ...]
    takes: tuple[Var, ...]
    gives: tuple[Var, ...]
    inputs: tuple[Var, ...]
    constants: tuple[Any, ...]
    products: tuple[int, ...]
    pure: Run
    compiled: Compiled
    shapes: tuple[list[jax.ShapeDtypeStruct], ...]
    given: list[jax.ShapeDtypeStruct]

    def values(self, leaves: Mapping[str, Any]) -> list[jax.Array]:
        """The parameters that it uses, from all by path.

        Copies, for leaves of NumPy may be written to later.
        """
        return [jnp.array(read.of(leaves[read.path])) for read in self.reads]

    def run(
        self, values: Sequence[Any], taken: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Evaluates the segment for a batch."""
        found: tuple[list[Any], list[Any]]
        found = self.compiled(values, taken, self.constants)
        return found


class Program:
    """The equations of a function, and what of them comes from a batch.

    Args:
        f: (params, batch) -> any pytree of arrays.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: The same; the program is for these shapes only.
    """

    def __init__(
        self, f: Callable[[Params, Any], Any], params: Params, batch: Any
    ) -> None:
        self._given = f, params, batch
        flat = flattened(f, params, batch)
        closed = jax.make_jaxpr(flat)(params, batch)
        self.uses: dict[str, tuple[Use, ...]] = find_uses(flat, params, batch)
        self._products = {
            use.position[0]
            for uses in self.uses.values()
            for use in uses
            if isinstance(use, Product)
        }
        self.jaxpr, self._consts = closed.jaxpr, closed.consts
        self._paths = dict(zip(self.jaxpr.invars, leaves_by_path(params), strict=False))
        self.batch = self.jaxpr.invars[len(self._paths) :]
        self._made_by = {
            var: i
            for i, equation in enumerate(self.jaxpr.eqns)
            for var in equation.outvars
        }
        self._parts = self._slices()
        # Variables that come from the batch.
        self.varies = set(self.batch)
        for equation in self.jaxpr.eqns:
            if any(var in self.varies for var in _variables(equation.invars)):
                self.varies.update(equation.outvars)
        # Compiled functions by their equations.
        self.functions: dict[str, Callable[..., Any]] = {}

    def _slices(self) -> dict[Var, Read]:
        """Variables that are a parameter, or a slice of one that is cut out once."""
        found = {var: Read(path, None) for var, path in self._paths.items()}
        for equation in self.jaxpr.eqns:
            name, settings = equation.primitive.name, equation.params
            if name == "slice" and equation.invars[0] in self._paths:
                starts, stops = settings["start_indices"], settings["limit_indices"]
                strides = settings["strides"] or (1,) * len(starts)
                part = (tuple(starts), tuple(stops), tuple(strides))
                path = self._paths[equation.invars[0]]
                found[equation.outvars[0]] = Read(path, part)
        return found

    def of_examples(self, number: int) -> "Program":
        """The same function for a batch of so many examples."""
        f, params, batch = self._given
        smaller = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((number, *a.shape[1:]), a.dtype), batch
        )
        return Program(f, params, smaller)

    def counterpart(self, product: Product, other: "Program") -> Product:
        """The layer that is this one in another program of the same function."""
        number = self.uses[product.path].index(product)
        found = other.uses[product.path][number]
        assert isinstance(found, Product)
        return found

    def operand(self, product: Product) -> Var:
        """The input of a layer."""
        return self.equation(product).invars[1 - product.side]

    def equation(self, product: Product) -> Any:
        """The equation of a layer."""
        (index,) = product.position
        return self.jaxpr.eqns[index]

    def stages(self, products: Iterable[Product]) -> list[list[Product]]:
        """Layers in program order, together where none needs another's output."""
        found: list[list[Product]] = []
        after: set[Var] = set()
        by_index = {product.position[0]: product for product in products}
        for index, equation in enumerate(self.jaxpr.eqns):
            product = by_index.get(index)
            if product is not None:
                if not found or self.operand(product) in after:
                    found.append([])
                    after = set()
                found[-1].append(product)
                after.update(equation.outvars)
            elif any(var in after for var in _variables(equation.invars)):
                after.update(equation.outvars)
        return found

    def segments(self, targets: Sequence[Sequence[Var]]) -> list[Segment]:
        """Cuts the program.

        Args:
            targets: Variables that each segment gives as its ``inputs``; it has the
                equations that they need and no earlier segment has.

        Returns:
            As many segments; the first one takes the leaves of the batch.
        """
        done, parts = set(self.batch), []
        for wanted in targets:
            own = self._needed(wanted, done)
            parts.append(own)
            done.update(var for i in own for var in self.jaxpr.eqns[i].outvars)
        made, uses = set(self.batch), [self._used(p) for p in parts]
        segments, takes = [], tuple(self.batch)
        for number, (own, wanted) in enumerate(zip(parts, targets, strict=True)):
            made.update(var for i in own for var in self.jaxpr.eqns[i].outvars)
            later = set().union(
                *uses[number + 1 :],
                *([v for v in t if v in self.varies] for t in targets[number + 1 :]),
            )
            gives = tuple(sorted((later & made), key=lambda v: self._order(v)))
            segments.append(self._segment(own, takes, gives, tuple(wanted)))
            takes = gives
        return segments

    def _order(self, var: Var) -> tuple[int, int]:
        index = self._made_by.get(var, -1)
        places = self.jaxpr.eqns[index].outvars if index >= 0 else self.batch
        return index, list(places).index(var)

    def _needed(self, wanted: Iterable[Var], done: set[Var]) -> list[int]:
        """Equations on the batch that some variables need, in order."""
        found: set[int] = set()
        todo = [var for var in wanted if var in self.varies and var not in done]
        while todo:
            index = self._made_by[todo.pop()]
            if index not in found:
                found.add(index)
                todo += [
                    var
                    for var in _variables(self.jaxpr.eqns[index].invars)
                    if var in self.varies and var not in done
                ]
        return sorted(found)

    def _used(self, indices: Iterable[int]) -> set[Var]:
        return {
            var
            for i in indices
            for var in _variables(self.jaxpr.eqns[i].invars)
            if var in self.varies
        }

    def _fixed(self, indices: Iterable[int], wanted: Iterable[Var]) -> list[int]:
        """Equations on parameters and constants alone that these equations need."""
        found: set[int] = set()
        todo = [v for i in indices for v in _variables(self.jaxpr.eqns[i].invars)]
        todo += list(wanted)
        while todo:
            var = todo.pop()
            index = self._made_by.get(var)
            fixed = var not in self.varies and var not in self._parts
            if fixed and index is not None and index not in found:
                found.add(index)
                todo += _variables(self.jaxpr.eqns[index].invars)
        return sorted(found)

    def _segment(
        self,
        own: list[int],
        takes: tuple[Var, ...],
        gives: tuple[Var, ...],
        wanted: tuple[Var, ...],
    ) -> Segment:
        indices = sorted({*own, *self._fixed(own, wanted)})
        equations = [self.jaxpr.eqns[i] for i in indices]
        inside = {var for equation in equations for var in equation.outvars}
        free = {
            var: None
            for equation in equations
            for var in _variables(equation.invars)
            if var not in inside
        }
        free |= {var: None for var in wanted if var not in inside}
        reads = {var: self._parts[var] for var in free if var in self._parts}
        products = tuple(i for i in own if i in self._products)
        constants = dict(zip(self.jaxpr.constvars, self._consts, strict=True))
        constants = {var: constants[var] for var in free if var in constants}

        def pure(
            values: Sequence[Any],
            taken: Sequence[Any],
            fixed: Sequence[Any],
            noise: Sequence[Any] = (),
        ) -> tuple[list[Any], list[Any]]:
            added = dict(zip(products, noise, strict=bool(noise)))
            known = dict(zip(takes, taken, strict=True))
            known |= zip(reads, values, strict=True)
            known |= zip(constants, fixed, strict=True)
            for index, equation in zip(indices, equations, strict=True):
                inputs = [
                    atom.val if isinstance(atom, Literal) else known[atom]
                    for atom in equation.invars
                ]
                outputs = bind(equation, inputs)
                if index in added:
                    outputs = [outputs[0] + added[index]]
                known.update(zip(equation.outvars, outputs, strict=True))
            return [known[v] for v in gives], [known[v] for v in wanted]

        shapes = tuple(map(shapes_of, (reads, takes, constants)))
        return Segment(
            tuple(reads.values()),
            takes,
            gives,
            wanted,
            tuple(constants.values()),
            products,
            pure,
            self.compiled(pure, *shapes),
            shapes,
            shapes_of(gives or wanted),
        )

    def compiled(self, f: Callable[..., Any], *arguments: Any) -> Compiled:
        """A compiled function; one for all that have the same equations.

        Args:
            f: Of pytrees of arrays.
            *arguments: The same, or their shapes.
        """
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
        structure = jax.tree.structure(shapes)
        # Variables are printed by their order, numbers by their value.
        key = f"{closed.jaxpr} {_constants(closed)}"
        if key not in self.functions:
            # The first jaxpr is kept with its arrays, so that their identities last.
            self.functions[key] = jax.jit(jaxpr_as_fun(closed))
        return Compiled(self.functions[key], structure)


def shapes_of(variables: Iterable[Var]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of variables."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def floats(arrays: Sequence[Any]) -> list[Any]:
    """Those that are floating-point numbers."""
    return [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]


def mixed(arrays: Sequence[Any], floating: Sequence[Any]) -> list[Any]:
    """The arrays with other floating-point ones."""
    parts = iter(floating)
    return [next(parts) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _constants(closed: ClosedJaxpr) -> list[int]:
    """Identities of the arrays inside a jaxpr, which are not printed."""
    found = [id(const) for const in closed.consts]
    for equation in closed.jaxpr.eqns:
        for field in equation.params.values():
            for entry in field if isinstance(field, (tuple, list)) else [field]:
                if isinstance(entry, ClosedJaxpr):
                    found += _constants(entry)
    return found
