"""Top-1, top-5 and loss of a classifier over the test split."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from woodfisher_jax.data import DataSet
from woodfisher_jax.data.batches import test_batches
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.training import distributed
from woodfisher_jax.training.network.objective import (
    cross_entropy,
    predict,
    variables_of,
)


def evaluate(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    dataset: DataSet,
    *,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Evaluates a classifier on the test split, with its running statistics.

    Args:
        model: A Linen classifier.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        dataset: Its test split is used.
        batch_size: Examples a step, at most those that there are; it does not change
            the result. Over devices it is rounded up to a multiple of their number.
        mesh: The devices to spread the examples over, which all have the parameters;
            default one.

    Returns:
        ``top1`` and ``top5`` in percent, ``loss`` in nats an example.
    """
    variables = variables_of(params, batch_stats)
    devices = num_devices(mesh)
    size = even_size(batch_size, dataset, devices)
    sums: list[dict[str, jax.Array]] = []
    for batch in test_batches(dataset, size, distributed.shard()):
        sums.append(batch_sums(model, variables, distributed.spread(batch, mesh)))
        # The next batch is read meanwhile, but no more than one ahead.
        jax.block_until_ready(sums[-2:-1])
    total = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    return {
        "top1": 100.0 * total["top1"] / total["examples"],
        "top5": 100.0 * total["top5"] / total["examples"],
        "loss": total["loss"] / total["examples"],
    }


def even_size(batch_size: int, dataset: DataSet, devices: int) -> int:
    """Examples a step of evaluation, as many on each device."""
    return -(-min(batch_size, dataset.test.size) // devices) * devices


@functools.partial(jax.jit, static_argnames="model")
def batch_sums(model: nn.Module, variables: Any, batch: dict) -> dict[str, jax.Array]:
    """Weighted sums over one batch.

    Args:
        model: A Linen classifier.
        variables: Its collections.
        batch: ``image`` [b, h, w, c], ``label`` [b] and ``weight`` [b].

    Returns:
        ``top1`` and ``top5`` (hits), ``loss`` and ``examples``.
    """
    logits = predict(model, variables, batch["image"])
    labels, weight = batch["label"], batch["weight"]
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == labels[:, None]
    return {
        "top1": jnp.sum(weight * hits[:, 0]),
        "top5": jnp.sum(weight * jnp.any(hits, axis=1)),
        "loss": jnp.sum(weight * cross_entropy(logits, labels)),
        "examples": jnp.sum(weight),
    }
