"""Gradients laid out by block as they arrive, so that they are formed only once."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from woodfisher_jax.pruning import blocks
from woodfisher_jax.pruning.gradients import Gradients

Store = tuple[jax.Array, ...]
"""For each group of a layout the gradients [num_blocks, N, c], float32."""


@partial(jax.jit, static_argnames="order", donate_argnames="store")
def _write(
    store: Store,
    chunk: Gradients,
    layout: blocks.Layout,
    start: jax.Array,
    order: blocks.FlatOrder,
) -> Store:
    """Writes the gradients of n samples into the store from sample ``start``."""
    rows = blocks.flatten(order, chunk)
    return tuple(
        jax.lax.dynamic_update_slice(
            kept,
            jnp.moveaxis(blocks.gather(rows, group), 0, 1),
            (jnp.int32(0), start, jnp.int32(0)),
        )
        for kept, group in zip(store, layout, strict=True)
    )


def gradients_by_block(
    chunks: Iterable[Gradients],
    order: blocks.FlatOrder,
    layout: blocks.Layout,
    num_samples: int,
) -> Store:
    """Gathers the gradients of all samples.

    Args:
        chunks: From path to gradients [n, ...]; the n add up to ``num_samples``.
        order: The flat order of the tensors.
        layout: Which weight sits in which block.
        num_samples: N.

    Returns:
        The store.
    """
    store = tuple(
        jnp.zeros((len(group), num_samples, group.shape[1]), jnp.float32)
        for group in layout
    )
    start = 0
    for chunk in chunks:
        store = _write(store, chunk, layout, jnp.int32(start), order)
        start += len(chunk[order.paths[0]])
    return store


@jax.jit
def _add_squares(total: Gradients, chunk: Gradients) -> Gradients:
    return jax.tree.map(lambda t, g: t + jnp.sum(g * g, axis=0), total, chunk)


def mean_square(chunks: Iterable[Gradients], num_samples: int) -> Gradients:
    """Diagonal of the undamped empirical Fisher, without keeping any gradient.

    ``F_qq = (1/N) Σ_n g_nq²``

    Args:
        chunks: From path to gradients [n, ...]; the n add up to ``num_samples``.
        num_samples: N.

    Returns:
        From path to an array of the parameter's shape.
    """
    total: Gradients | None = None
    for chunk in chunks:
        if total is None:
            total = {path: jnp.zeros(g.shape[1:]) for path, g in chunk.items()}
        total = _add_squares(total, chunk)
    assert total is not None
    return jax.tree.map(lambda t: t / num_samples, total)
