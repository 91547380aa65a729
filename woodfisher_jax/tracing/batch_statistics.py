"""Signs of training mode in a program: batch statistics, and dropout of a fixed key.

The program is traced for a prime number of examples, so that an axis of examples is
known by its length, in whatever function of whatever framework. A sum over that axis
whose square root later scales single examples is a norm with statistics of the batch.
As a network may choose between these and running statistics by a value, examples are
then run, once with others and once with copies of themselves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from woodfisher_jax.tracing.axes import program_of
from woodfisher_jax.tracing.flat import (
    Held,
    Step,
    bind,
    value_of,
    walked,
    without_calls,
)
from woodfisher_jax.tracing.primitives import (
    ELEMENTWISE,
    PRODUCTS,
    inner_jaxprs,
)
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import shapes_of

_PRIMES = (211, 223, 227, 229, 233, 239, 241, 251)
"""Numbers of examples, of which one divides no other length of a program."""

_SUMS = ("reduce_sum", "psum")
"""Primitives of means; the second is what a named axis of ``vmap`` leaves."""

_ROOTS = ("pow", "rsqrt", "sqrt")
"""Primitives that make a variance a factor."""

_NOISE = "random_bits"
"""The primitive that makes random numbers."""

_COMPARISONS = ("lt", "le", "gt", "ge")
"""Primitives that make Bernoulli samples of random numbers."""

LEAST_CHANGE = 0.02
"""Of values of an example when the others change, relative to the largest; below it is
rounding of half precision.
"""

_WAYS = (
    "train=False with use_running_average=not train and deterministic=not train in "
    "Linen, model.eval() in NNX, eqx.nn.inference_mode(model) in Equinox "
    "(docs/batch_norm.md)"
)


class _Signs(NamedTuple):
    """What a program has of training mode.

    Attributes:
        drops: Whether it sets activations to zero at random.
        scaled: The equation that scales single examples by statistics of the batch, and
            the axis of examples of its output; None if there is none.
        multiplied: Whether what is scaled is in a product with weights afterwards.
        returned: Whether it is in the outputs.
        names: Of the primitives of its equations, opened.
    """

    drops: bool = False
    scaled: tuple[int, int] | None = None
    multiplied: bool = False
    returned: bool = False
    names: tuple[str, ...] = ()


_FOUND: WeakKeyDictionary[Jaxpr, _Signs] = WeakKeyDictionary()
"""By programs, as long as JAX keeps them."""


def training_mode(
    name: str,
    f: Callable[[Params, Any], Any],
    params: Params,
    examples: Any,
    *,
    outputs: bool = True,
) -> list[str]:
    """What is said of a function that applies a network in training mode.

    Nothing is said where that cannot be found out: of shapes, of a single example, or
    of a function of a fixed number of examples.

    Args:
        name: Of the caller's argument that ``f`` is.
        f: (params, batch) -> any pytree of arrays.
        params: Any pytree of arrays.
        examples: Two examples, a pytree of arrays; of fewer nothing is said.
        outputs: Whether what is normalised may be an output; of a loss it has to be in
            a product with weights afterwards, for a loss may compare examples.

    Returns:
        A sentence for each sign, with what to do.
    """
    leaves = jax.tree.leaves((params, examples))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return []
    if any(np.shape(leaf)[:1] != (2,) for leaf in jax.tree.leaves(examples)):
        return []
    try:
        return list(_said(name, f, params, examples, outputs))
    except Exception:
        # A function may take just so many examples. Errors that matter come again.
        return []


def _said(
    name: str,
    f: Callable[[Params, Any], Any],
    params: Params,
    examples: Any,
    outputs: bool,
) -> Iterator[str]:
    lengths = [n for leaf in jax.tree.leaves((params, examples)) for n in leaf.shape]
    prime = next(p for p in _PRIMES if all(n % p for n in lengths))
    many = shapes_of(examples, prime)
    key = program_of(f, params, many)
    if key not in _FOUND:
        _FOUND[key] = _looked_at(f, params, many, key, prime)
    signs = _FOUND[key]
    if signs.scaled and (signs.multiplied or (outputs and signs.returned)):
        change = _change(f, params, examples, signs)
        if change > LEAST_CHANGE:
            yield (
                f"{name} is in training mode: it normalises with the mean and variance "
                "of the batch, so that values of an example depend on the others in "
                f"the batch (they change by {change:.0%} with another example beside "
                "it); expected running statistics, as the network is evaluated: "
                f"{_WAYS}"
            )
    if signs.drops:
        yield (
            f"{name} is in training mode: it sets activations to zero at random, as "
            "dropout does, and a fixed key makes that one thinned network; expected "
            f"no dropout, as the network is evaluated: {_WAYS}"
        )


def _names(jaxpr: Jaxpr) -> set[str]:
    """The primitives of a program, and of what it calls."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        found.update(*map(_names, inner_jaxprs(equation)))
    return found


def _looked_at(
    f: Callable[[Params, Any], Any], params: Params, many: Any, key: Jaxpr, prime: int
) -> _Signs:
    """Walks a program that is traced for a prime number of examples."""
    # Opening a large network takes seconds, so only what has signs at all is opened.
    if not _names(key) & {*_ROOTS, _NOISE}:
        return _Signs()
    number, length = len(jax.tree.leaves(params)), len(jax.tree.leaves(many))
    arguments = [Held() for _ in key.invars]
    own = arguments[len(arguments) - number - length :]
    steps, outputs = _listed(key, arguments)
    signs = _signs(steps, own, outputs, number, prime)
    if signs.scaled is None or not (signs.multiplied or signs.returned):
        return signs
    jaxpr = without_calls(f, params, many).jaxpr
    steps = [(e, list(e.invars), list(e.outvars)) for e in jaxpr.eqns]
    return _signs(steps, jaxpr.invars, jaxpr.outvars, number, prime)


def _listed(jaxpr: Jaxpr, arguments: Sequence[Any]) -> tuple[list[Step], list[Any]]:
    steps, walk = list[Step](), walked(jaxpr, arguments)
    while True:
        try:
            steps.append(next(walk))
        except StopIteration as end:
            return steps, end.value


class _Facts(NamedTuple):
    """What a variable depends on, and what it is.

    Attributes:
        weights: Whether it depends on parameters.
        batch: On examples.
        noise: On random numbers.
        bernoulli: On a comparison of random numbers with a rate.
        statistic: Whether it is a sum over examples, or made of some alone.
        spread: Whether it is made of the root of one.
        scaled: Whether it depends on examples that were scaled by one.
    """

    weights: bool = False
    batch: bool = False
    noise: bool = False
    bernoulli: bool = False
    statistic: bool = False
    spread: bool = False
    scaled: bool = False


def _signs(
    steps: Sequence[Step],
    arguments: Sequence[Any],
    outputs: Sequence[Any],
    number: int,
    prime: int,
) -> _Signs:
    """What there is of training mode in some equations.

    Args:
        steps: The equations, in order.
        arguments: Parameters and then arrays of the batch.
        outputs: Of the function.
        number: Of parameters.
        prime: Of examples.
    """
    known: dict[Any, _Facts] = {
        argument: _Facts(weights=i < number, batch=i >= number)
        for i, argument in enumerate(arguments)
    }
    nothing, places = _Facts(), list[tuple[int, int]]()
    drops = multiplied = False

    def held(atom: Any) -> _Facts:
        return nothing if isinstance(atom, Literal) else known.get(atom, nothing)

    for index, (equation, given, made) in enumerate(steps):
        name, inputs = equation.primitive.name, list(map(held, given))
        found = _Facts(*map(any, zip(*inputs, strict=True))) if inputs else nothing
        apart = _axes(equation.outvars[0], prime) if equation.outvars else []
        if name == _NOISE:
            found = found._replace(noise=True)
        if name in _COMPARISONS and found.noise:
            found = found._replace(bernoulli=True)
        if name == "select_n":
            drops = drops or _drops(*inputs)
        if name == "mul":
            drops = drops or _multiplies(*inputs) or _multiplies(*inputs[::-1])
        if name in _SUMS and found.batch and not apart:
            found = found._replace(statistic=bool(_axes(equation.invars[0], prime)))
        if apart:
            found = found._replace(statistic=False)
        if name in _ROOTS and found.statistic:
            found = found._replace(spread=True)
        if name in ELEMENTWISE and found.spread and apart:
            scaled = any(
                own.batch and not own.spread and _axes(atom, prime)
                for own, atom in zip(inputs, equation.invars, strict=True)
            )
            found = found._replace(scaled=found.scaled or scaled)
        if found.scaled:
            # Of examples that follow one another, one axis of just so many.
            shape = equation.outvars[0].aval.shape
            if len(apart) == 1 and shape[apart[0]] == prime:
                places.append((index, apart[0]))
        if name in PRODUCTS:
            multiplied = multiplied or any(
                one.scaled and other.weights and not other.batch
                for one, other in (inputs, inputs[::-1])
            )
        known.update(dict.fromkeys(made, found))
    returned = any(held(atom).scaled for atom in outputs)
    names = tuple(equation.primitive.name for equation, *_ in steps)
    return _Signs(drops, next(iter(places), None), multiplied, returned, names)


def _axes(atom: Any, prime: int) -> list[int]:
    """Axes of an array that are of examples, alone or with others."""
    shape = getattr(atom.aval, "shape", ())
    return [i for i, n in enumerate(shape) if n and n % prime == 0]


def _drops(chooses: _Facts, *cases: _Facts) -> bool:
    """Whether random numbers choose between an activation and a constant."""
    constant = any(not (own.weights or own.batch or own.noise) for own in cases)
    activation = any(own.weights and own.batch for own in cases)
    return chooses.noise and not chooses.batch and constant and activation


def _multiplies(sample: _Facts, other: _Facts) -> bool:
    """Whether an activation is multiplied by Bernoulli samples, some of them zero."""
    alone = sample.bernoulli and not (sample.weights or sample.batch)
    return alone and other.weights and other.batch


def _change(
    f: Callable[[Params, Any], Any], params: Params, examples: Any, signs: _Signs
) -> float:
    """How far values of an example change if the other is replaced by a copy of it."""
    assert signs.scaled is not None
    index, axis = signs.scaled
    closed = without_calls(f, params, shapes_of(examples, 2))
    names = tuple(equation.primitive.name for equation in closed.jaxpr.eqns)
    if names != signs.names:
        return 0.0
    variable = closed.jaxpr.eqns[index].outvars[0]
    part = closed.jaxpr.replace(eqns=closed.jaxpr.eqns[: index + 1])

    @jax.jit
    def values(params: Params, batch: Any) -> jax.Array:
        known = dict(zip(part.constvars, closed.consts, strict=True))
        known |= zip(part.invars, jax.tree.leaves((params, batch)), strict=True)
        for equation in part.eqns:
            inputs = [value_of(atom, known) for atom in equation.invars]
            known.update(zip(equation.outvars, bind(equation, inputs), strict=True))
        return jax.lax.index_in_dim(known[variable], 0, axis)

    copies = jax.tree.map(lambda a: np.asarray(a)[[0, 0]], examples)
    one, other = (
        np.asarray(values(params, batch), np.float32) for batch in (examples, copies)
    )
    largest = max(float(np.max(np.abs(own), initial=0)) for own in (one, other))
    change = float(np.max(np.abs(one - other), initial=0))
    return change / largest if largest and math.isfinite(largest) else 0.0
