"""First moments of gradients: their mean and their mean squared norms."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from woodfisher_jax.rows.gradients import Gradients
from woodfisher_jax.trees import blocks


@jax.jit
def _added(
    total: tuple[Gradients, Gradients], chunk: Gradients
) -> tuple[Gradients, Gradients]:
    sums, squares = total
    return (
        {path: sums[path] + jnp.sum(g, axis=0) for path, g in chunk.items()},
        {path: squares[path] + jnp.sum(g * g) for path, g in chunk.items()},
    )


class Moments:
    """Mean gradient and trace of the Fisher, added up while gradients pass.

    Attributes:
        mean: From path to ``ḡ = (1/N) Σ_n g_n``, of those that have passed.
        trace: From path to ``(1/N) Σ_n ‖g_n‖²``, the trace of the undamped Fisher.
    """

    def __init__(self) -> None:
        self.mean: Gradients = {}
        self.trace: dict[str, float] = {}

    def through(self, chunks: Iterable[Gradients]) -> Iterator[Gradients]:
        """Passes chunks on; what has passed counts when the last one is through.

        Args:
            chunks: From path to gradients [n, ...] of some tensors.

        Yields:
            The same.
        """
        total: tuple[Gradients, Gradients] = {}, {}
        count = 0
        for chunk in chunks:
            if not count:
                total = (
                    {path: jnp.zeros(g.shape[1:]) for path, g in chunk.items()},
                    {path: jnp.zeros(()) for path in chunk},
                )
            total = _added(total, chunk)
            count += len(next(iter(chunk.values())))
            yield chunk
        sums, squares = total
        self.mean |= {path: g / count for path, g in sums.items()}
        self.trace |= {path: float(s) / count for path, s in squares.items()}

    def vector(self, order: blocks.FlatOrder) -> jax.Array:
        """ḡ as a flat vector [d]."""
        return blocks.flatten(order, self.mean)
