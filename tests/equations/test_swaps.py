"""What one swap on the quadratic model changes, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.equations.swaps import prices, swapped

WIDTH, LEFT, DAMPING = 9, 4, 0.05


@pytest.mark.parametrize("target", [0.0, -0.3])
def test_prices_are_what_one_weight_more_or_less_changes(target: float) -> None:
    rng = np.random.default_rng(3)
    rows, weights = rng.normal(size=(12, WIDTH)), rng.normal(size=WIDTH)
    fisher = rows.T @ rows / 12 + DAMPING * np.eye(WIDTH)
    slope = -rows.T @ np.full(12, target) / 12
    kept = np.arange(WIDTH) % 2 == 0

    def minimum(kept: np.ndarray) -> tuple[np.ndarray, float]:
        step = np.where(kept, 0.0, -weights)
        right = -slope - fisher @ step
        step[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], right[kept])
        return step, step @ fisher @ step / 2 + slope @ step

    step, here = minimum(kept)
    support = np.where(kept, rows, 0.0)
    gram = 12 * DAMPING * np.eye(12) + support @ support.T
    leverages = np.sum(rows * np.linalg.solve(gram, rows), 0)
    single = (weights + step, fisher @ step + slope, leverages)
    gain, loss = prices(
        *(jnp.float32(a) for a in single), jnp.ones(WIDTH, bool), kept, DAMPING
    )
    for k in range(WIDTH):
        other = kept ^ (np.arange(WIDTH) == k)
        found = float(loss[k]) if kept[k] else -float(gain[k])
        assert found == pytest.approx(minimum(other)[1] - here, rel=1e-3, abs=1e-6)
    assert np.isinf(loss[~kept]).all()
    assert (gain[kept] == -1).all()


def test_pairs_are_swapped_while_the_gain_is_the_larger() -> None:
    kept = jnp.array([True, True, True, False, False, False])
    gain = jnp.array([-1.0, -1.0, -1.0, 9.0, 2.0, 4.0])
    loss = jnp.array([1.0, 3.0, 8.0, jnp.inf, jnp.inf, jnp.inf])
    pair = swapped(kept, gain, loss, jnp.asarray(1), 3)
    assert pair.tolist() == [False, True, True, True, False, False]
    # 9 for 1 and 4 for 3, but not 2 for 8.
    every = swapped(kept, gain, loss, jnp.asarray(3), 3)
    assert every.tolist() == [False, False, True, True, False, True]
