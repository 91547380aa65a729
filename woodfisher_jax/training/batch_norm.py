"""Batch-norm statistics estimated again from given images."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.training.objective import variables_of


@functools.partial(jax.jit, static_argnames="model")
def _statistics(
    model: nn.Module, params: Any, batch_stats: Any, images: jax.Array
) -> Any:
    """Statistics of one batch alone, and the old ones where a layer updates none.

    A layer's new running statistic is ``a · old + (1 - a) · batch``: its slope in the
    old one is a, whatever kind of layer it is, and where the old one is zero the rest
    follows.
    """

    def updated(stats: Any) -> Any:
        _, new = model.apply(
            variables_of(params, stats), images, train=True, mutable=["batch_stats"]
        )
        return new["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    ones = jax.tree.map(jnp.ones_like, batch_stats)
    part, slope = jax.jvp(updated, (zeros,), (ones,))
    return jax.tree.map(
        lambda old, p, a: jnp.where(a == 1, old, p / jnp.where(a == 1, 1, 1 - a)),
        batch_stats,
        part,
        slope,
    )


def reestimate(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    batches: Iterable[dict[str, np.ndarray]],
) -> Any:
    """Running statistics of a network as it is now, in place of what training left.

    The mean over batches of their statistics, each weighted with its number of images:
    what PyTorch's ``momentum=None`` gives after one pass. The old values play no role.

    Note: the original goes through the whole training set with its running average,
    which starts from the old statistics and forgets all but some ten batches.

    Args:
        model: A Linen module with a collection ``batch_stats``.
        params: Its parameters.
        batch_stats: Its running statistics; an empty dict comes back as it is.
        batches: Batches with an ``image``.

    Returns:
        New running statistics.

    Raises:
        ValueError: If there is no batch.
    """
    if not batch_stats:
        return batch_stats
    mean, seen = batch_stats, 0
    for batch in batches:
        count = len(batch["image"])
        seen += count
        found = _statistics(model, params, batch_stats, batch["image"])
        mean = jax.tree.map(lambda m, f, w=count / seen: m + w * (f - m), mean, found)
    if not seen:
        raise ValueError("batches is empty; expected at least one batch of images")
    return mean
