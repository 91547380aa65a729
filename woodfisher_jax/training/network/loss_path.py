"""Loss on the way from the weights before a pruning step to those after it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.samples import batch_length, regroup

Loss = Callable[[Any, Any], jax.Array]
"""(params, batch) -> scalar, the mean over the batch."""


class LossPath(NamedTuple):
    """Loss at w + t δ, with δ from the old weights to the new ones.

    Attributes:
        fractions: t, from 0 to 1.
        train: Loss on the given training examples.
        test: Loss on the test split, or empty.
        quadratic: ``L(0) + t² δᵀFδ / 2``, the model without a slope that OBS prunes by.
        with_slope: ``L(0) + t ḡᵀδ + t² δᵀFδ / 2``.
    """

    fractions: list[float]
    train: list[float]
    test: list[float]
    quadratic: list[float]
    with_slope: list[float]


@jax.jit
def _loss(loss_fn: Loss, params: Any, batch: Any) -> jax.Array:
    return loss_fn(params, batch)


def mean_loss(
    loss_fn: Loss, params: Any, samples: Any, chunk_size: int = 1000
) -> float:
    """Mean loss over any number of examples, some at a time.

    Args:
        loss_fn: A ``jax.tree_util.Partial`` of (params, batch), the mean loss.
        params: The parameters.
        samples: One batch, or batches that can be gone through again; see
            :mod:`woodfisher_jax.trees.samples`.
        chunk_size: Most examples at once; default 1000.
    """
    total, length = 0.0, 0
    for chunk in regroup(samples, chunk_size):
        count = batch_length(chunk)
        total += count * float(_loss(loss_fn, params, chunk))
        length += count
    return total / length


@functools.partial(jax.jit, static_argnames="group")
def _slopes(
    loss_fn: Loss, params: Any, direction: Any, batch: Any, group: int
) -> jax.Array:
    """gₙᵀδ of each gradient, by one forward derivative; gₙ is a mean over a group."""
    groups = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), batch)

    def losses(params: Any) -> jax.Array:
        return jax.vmap(lambda examples: loss_fn(params, examples))(groups)

    return jax.jvp(losses, (params,), (direction,))[1]


def quadratic_model(
    loss_fn: Loss,
    params: Any,
    direction: Any,
    samples: Any,
    *,
    batch_size: int = 1,
    chunk_size: int = 1000,
) -> tuple[float, float]:
    """Slope and curvature of the loss in a direction, by the empirical Fisher.

    ``ḡᵀδ`` and ``δᵀFδ = (1/N) Σ (gₙᵀδ)²``; no gradient is formed.

    Args:
        loss_fn: As for :func:`mean_loss`.
        params: w.
        direction: δ, like params.
        samples: As for :func:`mean_loss`.
        batch_size: m, examples each gₙ is the mean over; examples left over are not
            counted. Default 1.
        chunk_size: Most examples at once; default 1000.

    Returns:
        The slope and the curvature.

    Raises:
        ValueError: If there are fewer examples than ``batch_size``.
    """
    parts = []
    for chunk in regroup(samples, max(1, chunk_size // batch_size) * batch_size):
        length = batch_length(chunk) // batch_size * batch_size
        if length:
            whole = jax.tree.map(lambda a, n=length: a[:n], chunk)
            found = _slopes(loss_fn, params, direction, whole, batch_size)
            parts.append(np.asarray(found, np.float64))
    if not parts:
        raise ValueError(
            f"samples hold fewer examples than batch_size={batch_size}; give more"
        )
    slopes = np.concatenate(parts)
    return float(slopes.mean()), float((slopes**2).mean())


def follow(
    loss_fn: Loss,
    before: Any,
    after: Any,
    samples: Any,
    *,
    num_steps: int,
    batch_size: int = 1,
    chunk_size: int = 1000,
    test_loss: Callable[[Any], float] | None = None,
) -> LossPath:
    """Measures the loss on the way and what the quadratic model says of it.

    Args:
        loss_fn: As for :func:`mean_loss`.
        before: Weights before the pruning step.
        after: Weights after it.
        samples: Training examples, as for :func:`mean_loss`.
        num_steps: Parts that the way is cut into.
        batch_size: m of the model's Fisher.
        chunk_size: Most examples at once; default 1000.
        test_loss: Loss on other data of params; default not measured.
    """
    direction = jax.tree.map(jnp.subtract, after, before)
    fractions = [step / num_steps for step in range(num_steps + 1)]
    train, test = [], []
    for t in fractions:
        params = jax.tree.map(lambda w, d, t=t: w + t * d, before, direction)
        train.append(mean_loss(loss_fn, params, samples, chunk_size))
        if test_loss is not None:
            test.append(test_loss(params))
    slope, curvature = quadratic_model(
        loss_fn,
        before,
        direction,
        samples,
        batch_size=batch_size,
        chunk_size=chunk_size,
    )
    return LossPath(
        fractions,
        train,
        test,
        [train[0] + 0.5 * t * t * curvature for t in fractions],
        [train[0] + t * slope + 0.5 * t * t * curvature for t in fractions],
    )
