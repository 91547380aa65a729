"""The programs of a layer-wise pruning, with the shapes that a run calls them with.

Single operations on what they give (sums, largest values) are left out.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.layerwise import layer_error, pruned_layer
from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.layerwise.sensitivity import (
    backward,
    passes,
    projected,
    summed_squares,
)
from woodfisher_jax.layerwise.sequence import Sequence, summed_moment
from woodfisher_jax.layerwise.weights import PENALTIES, SingleWeights
from woodfisher_jax.layerwise.windows import Window
from woodfisher_jax.tracing.segments import Segment, floats, shapes_of

Shape = jax.ShapeDtypeStruct


class Call(NamedTuple):
    """A compiled function, and what it is called with.

    Attributes:
        name: What it does, where it does that first.
        function: With ``lower``, as ``jax.jit`` makes it.
        arguments: Pytrees of shapes and arrays.
        first: Static arguments before these.
        settings: Static arguments by name.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    first: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}  # noqa: RUF012 -- read only

    def key(self) -> Any:
        """The same for equal programs."""
        leaves = [(a.shape, a.dtype) for a in jax.tree.leaves(self.arguments)]
        function = getattr(self.function, "run", self.function)
        settings = tuple(sorted(self.settings.items()))
        return function, tuple(leaves), self.first, settings

    def lower(self, sharding: jax.sharding.Sharding | None) -> Any:
        """Lowers it for arrays that are placed so."""
        shapes = jax.tree.map(
            lambda a: Shape(
                a.shape,
                a.dtype,
                sharding=sharding,
                weak_type=getattr(a, "weak_type", False),
            ),
            self.arguments,
        )
        return self.function.lower(*self.first, *shapes, **self.settings)


def calls(sequence: Sequence, solver: SingleWeights) -> list[Call]:
    """Every program of a run, once.

    Args:
        sequence: That has not run; its parameters may be shapes.
        solver: Of its layers.
    """
    settings, found = sequence.settings, [*_walk(sequence), *_layers(sequence, solver)]
    if settings.scope == "global" and solver.rule is None:
        found = [*_sensitivities(sequence), *found]
    if settings.repair:
        found += _repair(sequence)
    if settings.distil:
        found += _distillation(sequence)
    once: dict[Any, Call] = {}
    for call in found:
        once.setdefault(call.key(), call)
    return list(once.values())


def _walk(sequence: Sequence) -> Iterator[Call]:
    """Forward passes between the layers, and second moments of what these take."""
    program = sequence.program
    for stage, segment in zip(sequence.stages, sequence.segments, strict=False):
        yield _forward(segment, stage[0].path if stage else "what follows")
        for product in sequence.measured(stage).values():
            (x,) = shapes_of([program.operand(product)])
            yield Call(
                f"moments of {product.path}",
                summed_moment,
                (x, x),
                (product.anywhere(),),
            )


def _forward(segment: Segment, path: str) -> Call:
    return Call(f"forward to {path}", segment.compiled, segment.shapes)


def _layers(sequence: Sequence, solver: SingleWeights) -> Iterator[Call]:
    """Weights and masks of each layer, and the error of its outputs."""
    settings = sequence.settings
    rule = solver.rule
    for product, layers in sequence.layers.items():
        for layer in layers:
            weights, moment = _sizes(layer)
            vectors = Shape(weights.shape[:2], jnp.float32)
            yield Call(
                f"weights of {product.path}",
                pruned_layer,
                (
                    weights,
                    moment,
                    moment,
                    vectors,
                    Shape(weights.shape, jnp.bool_),
                    Shape((), jnp.int32, weak_type=True),
                    Shape((), jnp.float32),
                    Shape((len(PENALTIES),), jnp.float32),
                ),
                settings={
                    "pattern": rule and (rule.kept, rule.size),
                    "rounds": settings.rounds,
                    "polish": settings.polish,
                },
            )
            error = (weights, weights, moment)
            yield Call(f"error of {product.path}", layer_error, error)


def _sizes(layer: Layer) -> tuple[Shape, Shape]:
    """Shapes of the weights and of the second moments of a layer."""
    groups, inputs = len(layer.groups), len(layer.columns)
    outputs = layer.size // (groups * inputs)
    return (
        Shape((groups, outputs, inputs), jnp.float32),
        Shape((groups, inputs, inputs), jnp.float32),
    )


def _sensitivities(sequence: Sequence) -> Iterator[Call]:
    """Passes forward and backward that say what each layer's outputs mean."""
    size = len(jax.tree.leaves(sequence.batches[0])[0])
    products = list(sequence.layers)
    _, program, smaller, segments = passes(sequence.program, products, size)
    by_index = {product.position[0]: product for product in smaller.values()}
    for stage, segment in zip(program.stages(smaller.values()), segments, strict=False):
        path = stage[0].path
        yield _forward(segment, path)._replace(name=f"sensitivity: forward to {path}")
    yield _forward(segments[-1], "")._replace(name="sensitivity: forward to outputs")
    key = jax.eval_shape(partial(jax.random.key, 0))
    outputs = (key, floats(shapes_of(segments[-1].inputs)))
    metric = {"metric": sequence.settings.metric}
    yield Call(
        "sensitivity: projection of outputs", projected, outputs, settings=metric
    )
    seen = set()
    for segment in segments[1:]:
        # Equal segments have equal gradients, which are not traced again.
        if segment.compiled.run in seen:
            continue
        seen.add(segment.compiled.run)
        own = [by_index[i] for i in segment.products if i in by_index]
        path = own[0].path if own else "outputs"
        arguments = (*segment.shapes, floats(segment.given))
        back = backward(program, segment, *arguments)
        yield Call(f"sensitivity: back over {path}", back, arguments)
        for product in own:
            (x,) = shapes_of([program.operand(product)])
            yield Call(
                f"sensitivity: squares of {product.path}",
                summed_squares,
                (x, product.output),
                (product.anywhere(),),
            )


def _windows(sequence: Sequence) -> Iterator[tuple[str, Window]]:
    """A window of each kind, with the first path that it fits."""
    span, seen = sequence.settings.repair_stages, set()
    for number, window in enumerate(sequence.windows()):
        kind = tuple(segment.compiled.run for segment in window.segments)
        stages = sequence.stages[number * span : (number + 1) * span]
        paths = [product.path for stage in stages for product in stage]
        if paths and kind not in seen:
            seen.add(kind)
            yield paths[0], window


def _repair(sequence: Sequence) -> Iterator[Call]:
    """Steps that move the weights of some layers together."""
    rate = Shape((), jnp.float32)
    for path, window in _windows(sequence):
        taken, given = window.segments[0].shapes[1], window.segments[-1].given
        arguments = (*window.shapes(), rate, taken, given)
        step = window.compiled("fit", *arguments)
        yield Call(f"repair from {path}", step, arguments)


def _distillation(sequence: Sequence) -> Iterator[Call]:
    """Passes forward and back through some layers at once, and from the outputs."""
    rate = Shape((), jnp.float32)
    for path, window in _windows(sequence):
        held, taken = window.shapes(), window.segments[0].shapes[1]
        forward = (held[0], held[-1], taken)
        name = f"distillation: forward from {path}"
        yield Call(name, window.compiled("forward", *forward), forward)
        back = (*held, rate, taken, floats(window.segments[-1].given))
        name = f"distillation: step from {path}"
        yield Call(name, window.compiled("step", *back), back)
    after = sequence.segments[len(sequence.stages) + 1 :]
    head, taken = sequence.head(), sequence.segments[len(sequence.stages)].given
    arguments = head.arguments([segment.shapes[0] for segment in after], taken, taken)
    name = "distillation: gradients at the outputs"
    yield Call(name, head.compiled(*arguments), arguments)
