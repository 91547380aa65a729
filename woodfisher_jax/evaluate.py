"""Top-1, top-5 and loss over a data set; runnable on a saved run.

python -m woodfisher_jax.evaluate --workdir=runs/digits-20260101-120000
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from woodfisher_jax.data import DataSet
from woodfisher_jax.data.batches import test_batches
from woodfisher_jax.objective import cross_entropy, predict, variables_of


@functools.partial(jax.jit, static_argnames="model")
def _count(model: nn.Module, variables: Any, batch: dict) -> dict[str, jax.Array]:
    """Weighted sums over one batch."""
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


def evaluate(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    dataset: DataSet,
    *,
    batch_size: int = 1000,
) -> dict[str, float]:
    """Judges a classifier on the test split, on its running statistics.

    Args:
        model: A Linen classifier.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        dataset: Where the test split is.
        batch_size: Examples a step; it does not change the result.

    Returns:
        ``top1`` and ``top5`` in percent, ``loss`` in nats an example.
    """
    variables = variables_of(params, batch_stats)
    sums = [
        {name: float(value) for name, value in _count(model, variables, batch).items()}
        for batch in test_batches(dataset, batch_size)
    ]
    total = {name: sum(part[name] for part in sums) for name in sums[0]}
    return {
        "top1": 100.0 * total["top1"] / total["examples"],
        "top5": 100.0 * total["top5"] / total["examples"],
        "loss": total["loss"] / total["examples"],
    }
