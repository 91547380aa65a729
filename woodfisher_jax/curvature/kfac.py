"""Kronecker-factored curvature: the Fisher of a layer from two small matrices.

For a layer with inputs a and gradients g at its outputs,

    F_l ≈ S ⊗ A,    A = E[Σ_t a_t a_tᵀ],    S = E[Σ_t g_t g_tᵀ] / T

over the T positions of a convolution (T = 1 in a dense layer on vectors), with weights
read as [outputs, inputs]; a bias is one more input that is always 1.

Martens & Grosse 2015 (arXiv:1503.05671), Sections 3 and 6.3; for convolutions Grosse &
Martens 2016 (arXiv:1602.01407), Theorem 1.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.equations.kronecker import Factor, Factors
from woodfisher_jax.equations.precision import matmul
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.needs import Passes
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.targets import compiled
from woodfisher_jax.tracing.capture import (
    Capture,
    capture,
    input_rows,
    output_rows,
    weight_entries,
)
from woodfisher_jax.tracing.layers import Bias, Other, Product, Use, find_uses
from woodfisher_jax.tracing.primitives import Position
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import Batch, batch_length, regroup, shapes_of


class _Layer(NamedTuple):
    """What of a layer is prunable. Hashable.

    Attributes:
        product: The layer.
        weight: Whether its weight is.
        bias: Path of its bias if that is, else "".
    """

    product: Product
    weight: bool
    bias: str


def kfac_factors(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    num_samples: int,
    batch_size: int = 1,
    microbatch_size: int = 64,
) -> Factors:
    """Kronecker factors of every layer, from its activations and output gradients.

    ``A = (1/n) Σ_i Σ_t a_it a_itᵀ`` and ``S = (1/n) Σ_i Σ_t g_it g_itᵀ / T``, with g_i
    the gradient of the loss of example i alone and n = N·m. In a grouped convolution
    each group has its own pair. What is prunable of a layer is in its factors: with a
    prunable bias, a has a last entry of 1.

    Note: as in the original, mini-batches of m > 1 are not averaged over; they make
    m times as many examples, for a mean of gradients has no Kronecker factors. Unlike
    the original, which weighs the positions of a convolution so that F_l is T times too
    large, S is a mean over positions. Weights that are pruned already are in the
    factors like all others: a principal submatrix of a Kronecker product has no
    Kronecker factors.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree; pruned weights should be zero.
        masks: From path to bool; only paths and shapes matter.
        samples: One batch, or an iterable of batches, read in order.
        num_samples: N.
        batch_size: m; default 1.
        microbatch_size: Most examples evaluated at once; it bounds memory.

    Returns:
        From the path of a layer's weight to its factors.

    Raises:
        ValueError: If a tensor is not the weight or bias of exactly one dense layer or
            convolution, if there are too few examples, or if something is not finite.
    """
    # As arrays, for numbers would be traced otherwise than within jit.
    loss_fn = jax.tree.map(jnp.asarray, as_partial(loss_fn))
    leaves = leaves_by_path(params)
    total = num_samples * batch_size
    layers: tuple[_Layer, ...] = ()
    sums: list[tuple[jax.Array, jax.Array]] = []
    for examples, real in _chunks(samples, total, microbatch_size):
        if not layers:
            one = jax.tree.map(lambda a: a[:1], examples)
            uses = find_uses(loss_fn, params, one)
            layers = _prunable_layers(uses, {p: leaves[p].shape for p in masks})
        products = tuple(layer.product for layer in layers)
        values, *operands = _captures(loss_fn, params, examples, products)
        _check_losses(np.asarray(values)[real])
        # What tells the null directions of A apart is the damping, which may be below
        # the rounding of A in float32.
        with jax.enable_x64(True):
            parts = [
                _second_moments(layer, *rows, real)
                for layer, *rows in zip(layers, *operands, strict=True)
            ]
            sums = jax.tree.map(jnp.add, sums, parts) if sums else parts
    return {
        layer.product.path: _factor(
            layer, np.asarray(inputs) / total, np.asarray(outputs) / total, uses, leaves
        )
        for layer, (inputs, outputs) in zip(layers, sums, strict=True)
    }


def passes(problem: Problem, microbatch_size: int) -> Passes:
    """What the factors take, and their inverses; compiles what forms them.

    Args:
        problem: The loss, its parameters and samples.
        microbatch_size: Most examples evaluated at once.

    Raises:
        ValueError: As :func:`kfac_factors`, for the layers.
    """
    params, masks = problem.params, problem.masks
    num_samples = problem.num_samples * problem.batch_size
    example = next(regroup(problem.samples, 1))
    loss_fn = jax.tree.map(jnp.asarray, problem.loss_fn)
    leaves = leaves_by_path(params)
    uses = find_uses(loss_fn, params, example)
    layers = _prunable_layers(uses, {p: leaves[p].shape for p in masks})
    parts = -(-num_samples // microbatch_size)
    size = -(-num_samples // parts)
    batch = shapes_of(example, size)
    products = tuple(layer.product for layer in layers)
    lowered = _captures.lower(loss_fn, params, batch, products)
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    found = compiled(lowered, problem.compute.mesh).memory_analysis()
    captured = found.temp_size_in_bytes + found.output_size_in_bytes if found else 0
    rows, matrices = [], []
    for layer in layers:
        groups, positions, columns, outputs = _sizes(layer)
        rows.append(groups * positions * (columns + outputs))
        matrices.append((groups * columns, columns))
        matrices.append((groups * outputs, outputs))
        flops += 2 * size * positions * sum(n * c for n, c in matrices[-2:])
    factors = sum(n * c for n, c in matrices)
    return Passes(
        # Rows in float64: as slices, joined, of the real examples, by group; sums, a
        # chunk's, and the new sums.
        captured + 8 * (4 * size * max(rows) + 3 * factors),
        flops * parts,
        # Damped and inverted; Cholesky, its inverse and their product of the largest.
        8 * (2 * factors + 3 * max(n * c for n, c in matrices)),
        sum(4 * n * c * c for n, c in matrices),
    )


def _sizes(layer: _Layer) -> tuple[int, int, int, int]:
    """Groups, positions, columns and outputs of a layer for one example."""
    product = layer.product
    activations = jax.ShapeDtypeStruct(
        product.operands[1 - product.side], product.output.dtype
    )
    inputs = jax.eval_shape(partial(input_rows, product), activations)
    outputs = jax.eval_shape(partial(output_rows, product), product.output)
    groups, positions, columns = inputs.shape
    columns = columns * layer.weight + bool(layer.bias)
    return groups, positions, columns, outputs.shape[-1]


def _factor(
    layer: _Layer,
    inputs: np.ndarray,
    outputs: np.ndarray,
    uses: Mapping[str, tuple[Use, ...]],
    leaves: Mapping[str, jax.Array],
) -> Factor:
    """Factors with where their columns are in the layer's tensors."""
    path = layer.product.path
    if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
        raise ValueError(
            f"the activations or gradients of the layer of {path!r} are not finite for "
            "some of the samples, though their loss is; look for a square root or a "
            "division at zero in loss_fn"
        )
    entries = weight_entries(layer.product, tuple(leaves[path].shape))
    found = {path: entries} if layer.weight else {}
    if layer.bias:
        (bias,) = uses[layer.bias]
        assert isinstance(bias, Bias)
        found[layer.bias] = bias.entries.reshape(*entries.shape[:2], 1)
    return Factor(
        inputs, outputs, found, {name: tuple(leaves[name].shape) for name in found}
    )


# ------------------------------------------------------------------------- the layers


def _prunable_layers(
    uses: Mapping[str, tuple[Use, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[_Layer, ...]:
    """The layers that the masks' tensors belong to, in the order of the program.

    Raises:
        ValueError: If a tensor is not the weight or the bias of exactly one layer.
    """
    weights: set[Position] = set()
    biases: dict[Position, str] = {}
    for path, shape in shapes.items():
        use = _only_use(path, uses[path])
        if isinstance(use, Bias):
            biases[use.position] = path
        else:
            weights.add(use.position)
            _check_once(use, shape)
    products = {
        use.position: use
        for several in uses.values()
        for use in several
        if isinstance(use, Product)
    }
    return tuple(
        _Layer(products[position], position in weights, biases.get(position, ""))
        for position in sorted({*weights, *biases})
    )


def _only_use(path: str, uses: tuple[Use, ...]) -> Product | Bias:
    remedy = "leave it out of the masks, or choose another method"
    if not uses:
        raise ValueError(f"kfac: loss_fn does not use {path!r}; {remedy}")
    (use, *more) = uses
    if more:
        shown = ", ".join(_kind(use) for use in uses)
        raise ValueError(
            f"kfac: {path!r} is used {len(uses)} times ({shown}); expected exactly one "
            f"dense layer or convolution, or the bias of one; {remedy}"
        )
    if isinstance(use, Other):
        raise ValueError(
            f"kfac: {path!r} {use.reason}; expected the weight or the bias of a dense "
            f"layer or a convolution; {remedy}"
        )
    return use


def _kind(use: Use) -> str:
    if isinstance(use, Other):
        return use.primitive
    return "bias" if isinstance(use, Bias) else "layer"


def _check_once(product: Product, shape: tuple[int, ...]) -> None:
    used = product.operands[product.side]
    if int(np.prod(used)) != int(np.prod(shape)):
        how = "broadcast" if np.prod(used) > np.prod(shape) else "cut"
        raise ValueError(
            f"kfac: {product.path!r} of shape {shape} is {how} to {used} for its "
            "layer; expected each weight once; leave it out of the masks, or choose "
            "another method"
        )


# --------------------------------------------------------------------------- the sums


def _chunks(
    samples: Any, total: int, microbatch_size: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """The first ``total`` examples in chunks of one length, and which rows are real."""
    # Chunks of one length, so that one compilation serves all.
    size = -(-total // -(-total // microbatch_size))
    done = 0
    for batch in regroup(samples, size):
        wanted = min(batch_length(batch), total - done)
        rows = np.arange(size) % wanted
        yield (
            jax.tree.map(lambda a, rows=rows: a[rows], batch),
            np.arange(size) < wanted,
        )
        done += wanted
        if done == total:
            return
    raise ValueError(
        f"samples hold {done} examples, but num_samples times batch_size is {total}; "
        "give more examples or lower one of the two"
    )


@partial(jax.jit, static_argnames="products")
def _captures(
    loss_fn: Partial, params: Params, examples: Batch, products: tuple[Product, ...]
) -> Capture:
    """``capture`` of each example by itself."""

    def one(example: Batch) -> Capture:
        batch = jax.tree.map(lambda a: a[None], example)
        return capture(loss_fn, params, batch, products)

    return jax.vmap(one)(examples)


def _check_losses(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"loss_fn returned {values[np.argmin(np.isfinite(values))]} at one of the "
            "samples; it must be finite at the given params"
        )


@partial(jax.jit, static_argnames="layer")
def _second_moments(
    layer: _Layer, activations: jax.Array, gradients: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``Σ_i Σ_t a aᵀ`` and ``Σ_i Σ_t g gᵀ / T`` over the examples that are real."""
    product = layer.product
    inputs = jax.vmap(partial(input_rows, product))(activations.astype(jnp.float64))
    outputs = jax.vmap(partial(output_rows, product))(gradients.astype(jnp.float64))
    columns = [inputs] if layer.weight else []
    if layer.bias:
        columns.append(jnp.ones((*inputs.shape[:3], 1)))
    inputs = jnp.concatenate(columns, axis=-1)
    positions = inputs.shape[2]

    def moment(rows: jax.Array) -> jax.Array:
        rows = jnp.where(real[:, None, None, None], rows, 0.0)
        rows = jnp.moveaxis(rows, 0, 1)  # [groups, examples, positions, columns]
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        return matmul(jnp.swapaxes(rows, 1, 2), rows)

    return moment(inputs), moment(outputs) / positions
