"""The loss of a classifier, cross entropy, and functions of a frozen network."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.tracing import macs
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees.axes import Axes

Variables = dict[str, Any]
"""Flax collections: ``params`` and, for models that keep them, ``batch_stats``."""


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross entropy of each example, in nats.

    ``-(1 - s) log p_y - s mean_k log p_k``

    Args:
        logits: [..., classes].
        labels: Integers [...].
        label_smoothing: s in [0, 1), spread over all classes; default 0.

    Returns:
        Array [...].
    """
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)
    spread = jnp.mean(log_probabilities, axis=-1)
    return -(1.0 - label_smoothing) * picked[..., 0] - label_smoothing * spread


def variables_of(params: Any, batch_stats: Any) -> Variables:
    """Joins the collections a Linen module is applied with."""
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}


def predict(
    model: nn.Module, variables: Variables, images: jax.Array | np.ndarray
) -> jax.Array:
    """Logits of a batch of images, on running statistics."""
    logits = model.apply(variables, images)
    assert isinstance(logits, jax.Array)
    return logits


@functools.lru_cache(maxsize=16)
def _frozen(
    measure: Callable[..., jax.Array], model: nn.Module, *settings: float
) -> Callable[[Any, Any, dict[str, Any]], jax.Array]:
    # Cached, since jit recognises a function it has compiled by its identity.
    def measured(batch_stats: Any, params: Any, batch: dict[str, Any]) -> jax.Array:
        logits = predict(model, variables_of(params, batch_stats), batch["image"])
        return measure(logits, batch["label"], *settings)

    return measured


def _mean_loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    return jnp.mean(cross_entropy(logits, labels, smoothing))


def _share_of_errors(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) != labels)


def frozen_loss(
    model: nn.Module, batch_stats: Any, label_smoothing: float = 0.0
) -> Partial:
    """The loss that curvature is taken of: mean cross entropy on running statistics.

    Args:
        model: A Linen classifier.
        batch_stats: Its running statistics; new values do not compile again.
        label_smoothing: Share of the target that is spread over all classes, [0, 1).

    Returns:
        (params, batch) -> scalar, with batch = {"image": ..., "label": ...}.
    """
    return Partial(_frozen(_mean_loss, model, label_smoothing), batch_stats)


@functools.lru_cache(maxsize=16)
def _linearized(model: nn.Module, smoothing: float) -> Callable[..., jax.Array]:
    def measured(
        batch_stats: Any, params: Any, direction: Any, batch: dict[str, Any]
    ) -> jax.Array:
        def outputs(params: Any) -> jax.Array:
            return predict(model, variables_of(params, batch_stats), batch["image"])

        logits, change = jax.jvp(outputs, (params,), (direction,))
        return _mean_loss(logits + change, batch["label"], smoothing)

    return measured


def linearized_loss(
    model: nn.Module, batch_stats: Any, params: Any, label_smoothing: float = 0.0
) -> Partial:
    """The loss after a step as the derivative of the logits predicts it.

    ``L(z(w) + ∂z/∂w δ)``: the network is taken as linear, the loss as it is. Where a
    network fits its data, the softmax is saturated, and a quadratic model of the loss
    itself predicts next to no increase.

    Args:
        model: A Linen classifier.
        batch_stats: Its running statistics; new values do not compile again.
        params: w, before the step.
        label_smoothing: As for :func:`frozen_loss`; default 0.

    Returns:
        (δ, batch) -> scalar, in nats an example.
    """
    return Partial(_linearized(model, label_smoothing), batch_stats, params)


def frozen_errors(model: nn.Module, batch_stats: Any) -> Partial:
    """The share of examples with a wrong prediction; as :func:`frozen_loss`."""
    return Partial(_frozen(_share_of_errors, model), batch_stats)


@functools.lru_cache(maxsize=8)
def _outputs(model: nn.Module) -> Callable[[Any, Any, Any], jax.Array]:
    @jax.jit
    def outputs(batch_stats: Any, params: Any, images: jax.Array) -> jax.Array:
        return predict(model, variables_of(params, batch_stats), images)

    return outputs


def frozen_outputs(model: nn.Module, batch_stats: Any) -> Partial:
    """Logits on running statistics, (params, images) -> logits.

    Args:
        model: A Linen classifier.
        batch_stats: Its running statistics; new values do not compile again.
    """
    return Partial(_outputs(model), batch_stats)


def macs_per_weight(
    model: nn.Module, variables: Variables, image_shape: tuple[int, ...]
) -> dict[str, float]:
    """Multiply-accumulates that one weight of each tensor costs for one image.

    Args:
        model: A Linen module.
        variables: Its variables, or their shapes.
        image_shape: [h, w, c].

    Returns:
        From path to a number; tensors that no layer multiplies are not there.

    Raises:
        ValueError: If the layers of the model cannot be counted.
    """
    network, image = _network(model, variables, image_shape)
    return macs.macs_per_weight(network, variables["params"], image)


def axes_of(
    model: nn.Module, variables: Variables, image_shape: tuple[int, ...]
) -> Axes:
    """What the axes of the model's weights are; arguments as :func:`macs_per_weight`.

    Returns:
        From path to axes, of the weights of dense layers and convolutions.
    """
    network, image = _network(model, variables, image_shape)
    return find_axes(network, variables["params"], image)


def structures_of(
    model: nn.Module, variables: Variables, image_shape: tuple[int, ...]
) -> Structures:
    """What can be taken out of the model; arguments as :func:`macs_per_weight`."""
    network, image = _network(model, variables, image_shape)
    return structures(network, variables["params"], image)


def _network(
    model: nn.Module, variables: Variables, image_shape: tuple[int, ...]
) -> tuple[Callable[[Any, jax.Array], jax.Array], jax.ShapeDtypeStruct]:
    """(params, images) -> logits, and one image to trace it with."""
    # Of any value: shapes alone cannot be closed over.
    stats = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype), variables.get("batch_stats", {})
    )
    return (
        lambda params, images: predict(model, variables_of(params, stats), images),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )
