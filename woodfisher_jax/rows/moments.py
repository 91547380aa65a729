"""Sums over all gradients that are taken while they pass, without keeping any."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.blocks import FlatOrder


class Moments(NamedTuple):
    """First and second moments of N gradients.

    Attributes:
        mean: ``ḡ = (1/N) Σ_n g_n``, [d].
        squares: ``(1/N) Σ_n g_n²``, the diagonal of the undamped Fisher [d].
    """

    mean: jax.Array
    squares: jax.Array

    def trace(self, order: FlatOrder) -> dict[str, float]:
        """Trace of the undamped Fisher of each tensor, ``(1/N) Σ_n ‖g_n‖²``."""
        squares = np.asarray(self.squares, np.float64)
        return {
            path: float(squares[start:stop].sum())
            for path, (start, stop) in zip(
                order.paths, pairwise(order.offsets), strict=True
            )
        }


@jax.jit
def _added(total: Moments, rows: jax.Array) -> Moments:
    sums = Moments(jnp.sum(rows, axis=0), jnp.sum(rows * rows, axis=0))
    return jax.tree.map(jnp.add, total, sums)


def moments(chunks: Iterable[jax.Array]) -> Moments:
    """Moments of rows that come in chunks [n, d].

    Args:
        chunks: Of :func:`~woodfisher_jax.rows.gradients.row_chunks`.
    """
    total, count = None, 0
    for rows in chunks:
        if total is None:
            total = Moments(jnp.zeros(rows.shape[1]), jnp.zeros(rows.shape[1]))
        total = _added(total, rows)
        count += len(rows)
    assert total is not None
    return jax.tree.map(lambda sums: sums / count, total)
