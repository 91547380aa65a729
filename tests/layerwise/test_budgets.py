"""How many weights of each layer stay."""

import numpy as np

from woodfisher_jax.layerwise.budgets import shared_out


def test_budgets_leave_something_of_every_layer() -> None:
    """A layer whose weights are all worth least keeps a quarter of its share."""
    rng = np.random.default_rng(0)
    scores = [rng.random(100).astype(np.float32) + 1, np.full(100, 1e-3, np.float32)]
    assert shared_out(scores, 0.8, 0.2) == [35, 5]
    assert shared_out(scores, 0.8, 0.1) == [30, 10]
    assert sum(shared_out(scores, 0.6, 0.2)) == 80
