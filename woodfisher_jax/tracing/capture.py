"""Inputs of layers, and gradients at their outputs.

The layers are those that :mod:`~woodfisher_jax.tracing.layers` finds. Activations and
gradients of dense layers and convolutions are converted to rows, so that the gradient
of a weight tensor is ``Σ_t g_t a_tᵀ`` over positions t, within each group of a grouped
layer.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from woodfisher_jax.tracing.flat import bind
from woodfisher_jax.tracing.layers import (
    Convolution,
    Product,
    feature_axes,
    view_entries,
)
from woodfisher_jax.tracing.primitives import PRODUCTS, Position, called
from woodfisher_jax.trees.paths import Params


class Capture(NamedTuple):
    """Inputs of some layers, and gradients at their outputs.

    Attributes:
        value: f(params, batch).
        activations: For each layer, the operand that is not the weight.
        gradients: For each layer, the gradient of ``value`` with respect to its output
            before a bias is added; it has the output's shape.
    """

    value: jax.Array
    activations: tuple[jax.Array, ...]
    gradients: tuple[jax.Array, ...]


def capture(
    f: Callable[[Params, Any], jax.Array],
    params: Params,
    batch: Any,
    products: Sequence[Product],
) -> Capture:
    """Inputs of layers and gradients at their outputs, in one backward pass.

    With ``y_l = W_l a_l + ε_l`` in layer l, the gradient at the output is ``∂f/∂ε_l``
    at ε = 0; one forward and one backward pass give it for all layers.

    Args:
        f: (params, batch) -> scalar.
        params: Any pytree.
        batch: A batch with the shapes that ``find_uses`` was called with.
        products: Layers that ``find_uses`` returned for the same function.

    Raises:
        ValueError: If a layer is inside a function with its own derivative rule, or
            the function or the shapes are not those of the ``find_uses`` call.
    """
    for product in products:
        if product.rule:
            raise ValueError(
                f"the layer of {product.path!r} lies in a function with a derivative "
                f"rule of its own ({product.rule}), which the gradient at its output "
                "would bypass; move the product out of that function"
            )
    closed = jax.make_jaxpr(f)(params, batch)
    arguments = jax.tree.leaves((params, batch))
    by_position = {product.position: product for product in products}

    def perturbed(noise: dict[Position, jax.Array]) -> tuple[jax.Array, dict]:
        seen: dict[Position, jax.Array] = {}
        (value,) = _evaluate(
            closed.jaxpr, closed.consts, arguments, (), by_position, noise, seen
        )
        return value, seen

    zeros = {
        position: jnp.zeros(product.output.shape, product.output.dtype)
        for position, product in by_position.items()
    }
    (value, seen), gradients = jax.value_and_grad(perturbed, has_aux=True)(zeros)
    return Capture(
        value,
        tuple(seen[product.position] for product in products),
        tuple(gradients[product.position] for product in products),
    )


def _evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    position: Position,
    products: dict[Position, Product],
    noise: dict[Position, jax.Array],
    seen: dict[Position, jax.Array],
) -> list[Any]:
    """Evaluates a jaxpr with noise added to the outputs of some equations."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for index, equation in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in equation.invars]
        here = (*position, index)
        if here in products:
            _check_there(equation, products[here])
            seen[here] = inputs[1 - products[here].side]
            outputs = [bind(equation, inputs)[0] + noise[here]]
        elif any(other[: len(here)] == here for other in products):
            inner, constants = called(equation)
            outputs = _evaluate(inner, constants, inputs, here, products, noise, seen)
        else:
            outputs = bind(equation, inputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _check_there(equation: Any, product: Product) -> None:
    shapes = tuple(tuple(atom.aval.shape) for atom in equation.invars)
    if equation.primitive.name not in PRODUCTS or shapes != product.operands:
        raise ValueError(
            f"products: the layer of {product.path!r} is not where it was found; "
            "expected the function and the shapes that find_uses was called with"
        )


# ------------------------------------------------------------------------------- rows


def input_rows(product: Product, activations: jax.Array) -> jax.Array:
    """The input vectors that a layer multiplies by its weights.

    Args:
        product: The layer.
        activations: The operand that is not the weight.

    Returns:
        a, [groups, positions, inputs of a group]; for a convolution the patches, one
        for each position, channel after channel.
    """
    if isinstance(product.geometry, Convolution):
        return _patches(product, activations)
    other = 1 - product.side
    groups, summed = product.geometry.batch[other], product.geometry.contract[other]
    rest = [i for i in range(activations.ndim) if i not in (*groups, *summed)]
    return _as_rows(activations, groups, rest, summed)


def output_rows(product: Product, outputs: jax.Array) -> jax.Array:
    """A layer's outputs, or gradients with respect to them, by position.

    Args:
        product: The layer.
        outputs: Array with the shape of its output.

    Returns:
        g, [groups, positions, outputs of a group], positions as in ``input_rows``.
    """
    features, geometry = feature_axes(product), product.geometry
    rest = [i for i in range(outputs.ndim) if i not in features]
    if isinstance(geometry, Convolution):
        return _grouped_rows(jnp.transpose(outputs, geometry.axes.out_spec), geometry)
    groups = len(geometry.batch[0])
    return _as_rows(outputs, features[:groups], rest, features[groups:])


def _as_rows(
    array: jax.Array, groups: Sequence[int], rows: Sequence[int], columns: Sequence[int]
) -> jax.Array:
    shape = array.shape
    sizes = [math.prod(shape[i] for i in axes) for axes in (groups, rows, columns)]
    return jnp.transpose(array, (*groups, *rows, *columns)).reshape(sizes)


def _patches(product: Product, images: jax.Array) -> jax.Array:
    """Patches [groups, positions, channels x taps], by slicing.

    Slicing is exact. Convolution with an identity kernel would round to TF32 on some
    GPUs, and is slow on a CPU.
    """
    settings = product.geometry
    assert isinstance(settings, Convolution)
    images = jnp.transpose(images, settings.axes.lhs_spec)
    padding = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            settings.padding, settings.input_dilation, strict=True
        )
    ]
    zero = jnp.zeros((), images.dtype)
    padded = jax.lax.pad(images, zero, [(0, 0, 0), (0, 0, 0), *padding])
    kernel = [product.operands[1][axis] for axis in settings.axes.rhs_spec[2:]]
    space = [product.output.shape[axis] for axis in settings.axes.out_spec[2:]]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        start = [i * d for i, d in zip(tap, settings.kernel_dilation, strict=True)]
        stop = [
            i + (n - 1) * stride + 1
            for i, n, stride in zip(start, space, settings.strides, strict=True)
        ]
        taps.append(
            jax.lax.slice(
                padded,
                (0, 0, *start),
                (*padded.shape[:2], *stop),
                (1, 1, *settings.strides),
            )
        )
    stacked = jnp.stack(taps, axis=2)  # [batch, channels, taps, *space]
    return _grouped_rows(stacked.reshape(len(images), -1, *space), settings)


def _grouped_rows(images: jax.Array, settings: Convolution) -> jax.Array:
    """From [batch, features, *space] to [groups, positions, features of a group]."""
    parts = images.reshape(
        len(images), settings.groups, -1, math.prod(images.shape[2:])
    )
    rows = jnp.transpose(parts, (1, 0, 3, 2))
    return rows.reshape(settings.groups, -1, rows.shape[-1])


def weight_entries(product: Product, shape: tuple[int, ...]) -> np.ndarray:
    """Positions in the weight tensor of the weights from each input to each output.

    Args:
        product: The layer.
        shape: Shape of its weight tensor.

    Returns:
        Indices into the flat tensor, int [groups, outputs, inputs]; the gradient of
        these entries is ``Σ_t g_t a_tᵀ``.
    """
    entries = view_entries(shape, product.views)
    if isinstance(product.geometry, Convolution):
        groups = product.geometry.groups
        entries = np.transpose(entries, product.geometry.axes.rhs_spec)
        outputs = entries.shape[0] // groups
        return entries.reshape(groups, outputs, -1)
    shared = product.geometry.batch[product.side]
    summed = product.geometry.contract[product.side]
    own = [i for i in range(entries.ndim) if i not in (*shared, *summed)]
    sizes = [
        math.prod(entries.shape[i] for i in axes) for axes in (shared, own, summed)
    ]
    return np.transpose(entries, (*shared, *own, *summed)).reshape(sizes)
