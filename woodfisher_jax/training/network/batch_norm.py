"""Batch-norm statistics of a Linen network, estimated again from images."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import numpy as np

from woodfisher_jax import batch_norm
from woodfisher_jax.training.network.objective import variables_of


def reestimate(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    batches: Iterable[dict[str, np.ndarray]],
) -> Any:
    """:func:`woodfisher_jax.batch_norm.reestimate` of a network and its images.

    Args:
        model: A Linen module that is called with ``train``.
        params: Its parameters.
        batch_stats: Its running statistics; an empty dict comes back as it is.
        batches: Batches with an ``image``.

    Returns:
        New running statistics.

    Raises:
        ValueError: If there is no batch.
    """
    return batch_norm.reestimate(_update_of(model), params, batch_stats, batches)


@functools.lru_cache(maxsize=8)
def _update_of(model: nn.Module) -> Callable[[Any, Any, Any], Any]:
    # Cached, because jit recognises a compiled function by its identity.
    def update(params: Any, batch_stats: Any, batch: dict[str, Any]) -> Any:
        variables = variables_of(params, batch_stats)
        return model.apply(
            variables, batch["image"], train=True, mutable=["batch_stats"]
        )[1]["batch_stats"]

    return update
