"""How much a network's outputs depend on the outputs of each of its layers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.rows.projections import directions
from woodfisher_jax.tracing.capture import input_rows, output_rows
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.tracing.segments import Compiled, Program, Segment, floats, mixed

PARTS = 4
"""Of a batch, one after another: what is between all segments, and the outputs, are
held at once here, where pruning holds what is between two of them.
"""


class Sensitivity(NamedTuple):
    """Diagonals of the Kronecker factors of a layer.

    Attributes:
        inputs: E[x²], [groups, inputs].
        outputs: E[g²], [groups, outputs], with g the gradient of a random projection of
            the network's outputs.
    """

    inputs: jax.Array
    outputs: jax.Array


def sensitivities(
    program: Program,
    products: Sequence[Product],
    leaves: Mapping[str, Any],
    batches: Sequence[Any],
    metric: str,
    seed: int,
) -> dict[Product, Sensitivity]:
    """E[x²] and E[g²] of layers, by one forward and one backward pass of each batch.

    The passes go segment by segment, so that a device holds the intermediate values of
    one segment only, and what is left of a quarter of a batch between all of them.

    Args:
        program: The network.
        products: Its layers, in any order.
        leaves: From path to parameter.
        batches: Leaves of each batch, of one number of examples.
        metric: Of the outputs, as for :func:`~woodfisher_jax.rows.projections.\
directions`.
        seed: Of the random projections.
    """
    size = len(batches[0][0])
    part, program, smaller, segments = passes(program, products, size)
    parts = [
        [leaf[start : start + part] for leaf in batch]
        for batch in batches
        for start in range(0, size, part)
    ]
    by_index = {product.position[0]: product for product in smaller.values()}
    sums: dict[Product, Any] = {}
    for number, batch in enumerate(parts):
        taken, states, inputs = batch, [], []
        for segment in segments:
            states.append(taken)
            taken, given = segment.run(segment.values(leaves), taken)
            inputs.append(dict(zip(segment.inputs, given, strict=True)))
        key = jax.random.fold_in(jax.random.key(seed), number)
        # Popped, since logits of a large vocabulary are most of what a batch takes.
        slopes = projected(key, list(inputs.pop().values()), metric)
        for i in reversed(range(1, len(segments))):
            segment = segments[i]
            kinds = tuple(by_index.get(index) for index in segment.products)
            arguments = segment.values(leaves), states[i], segment.constants, slopes
            slopes, noise = backward(program, segment, *arguments)(*arguments)
            for product, slope in zip(kinds, noise, strict=True):
                if product is None:
                    continue
                x = inputs[i - 1][program.operand(product)]
                squares = summed_squares(product.anywhere(), x, slope)
                old = sums.get(product)
                sums[product] = jax.tree.map(jnp.add, old, squares) if old else squares
    found = {}
    for product, other in smaller.items():
        squares = sums[other]
        found[product] = Sensitivity(squares[0] / squares[2], squares[1] / squares[2])
    return found


def passes(
    program: Program, products: Sequence[Product], size: int
) -> tuple[int, Program, dict[Product, Product], list[Segment]]:
    """What the passes go through, for a part of a batch of ``size`` examples.

    Returns:
        Examples of a part, the program for so many, its layers by those of the whole
        program, and its segments.
    """
    # A divisor, so that each segment is compiled once.
    part = next(n for n in range(-(-size // PARTS), 0, -1) if size % n == 0)
    whole, program = program, program.of_examples(part)
    smaller = {product: whole.counterpart(product, program) for product in products}
    stages = program.stages(smaller.values())
    targets = [tuple(dict.fromkeys(map(program.operand, stage))) for stage in stages]
    ends = tuple(v for v in program.jaxpr.outvars if v in program.varies)
    return part, program, smaller, program.segments([*targets, ends])


@partial(jax.jit, static_argnames="metric")
def projected(key: jax.Array, outputs: list[jax.Array], metric: str) -> list[Any]:
    """Gradients of a random projection at the outputs of the network."""
    keys = jax.random.split(key, len(outputs))
    return [
        directions(k, z.astype(jnp.float32), metric).astype(z.dtype)
        for k, z in zip(keys, outputs, strict=True)
        if jnp.issubdtype(z.dtype, jnp.floating)
    ]


def backward(program: Program, segment: Segment, *arguments: Any) -> Compiled:
    """Gradients at what a segment takes, and at the outputs of its layers.

    Args:
        program: That has the segment.
        segment: Of which they are.
        *arguments: Of the result, or their shapes: the values of what the segment
            reads, what it takes, its constants, and gradients at what it gives.
    """

    def back(
        values: list[Any], taken: list[Any], constants: Any, slopes: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        def forward(floating: list[Any], noise: list[Any]) -> list[Any]:
            whole = mixed(taken, floating)
            given, ends = segment.pure(values, whole, constants, noise)
            return floats(given or ends)

        zeros = [
            jnp.zeros(variable.aval.shape, variable.aval.dtype)
            for index in segment.products
            for variable in program.jaxpr.eqns[index].outvars
        ]
        _, pull = jax.vjp(forward, floats(taken), zeros)
        return pull(slopes)

    return program.compiled(back, *arguments)


@partial(jax.jit, static_argnames="product")
def summed_squares(
    product: Product, inputs: jax.Array, slopes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ x², Σ g² over the positions of a batch, and their number."""
    x, g = input_rows(product, inputs), output_rows(product, slopes)
    sums = (jnp.sum(jnp.square(rows), axis=1) for rows in (x, g))
    return (*sums, jnp.float32(x.shape[1]))
