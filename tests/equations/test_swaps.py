"""Swaps of weights on the quadratic model, against every support there is."""

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.equations.swaps import improve, prices, swapped

WIDTH, LEFT, DAMPING = 9, 4, 0.05


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients that explain one another, and weights."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, 5)) @ rng.normal(size=(5, WIDTH))
    return rows + 0.2 * rng.normal(size=rows.shape), rng.normal(size=WIDTH)


class Dense:
    """The model of one block in float64, by inverses of its parts."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.fisher = rows.T @ rows / len(rows) + DAMPING * np.eye(WIDTH)

    def joint_update(self, weights: Any, kept: Any, targets: Any) -> Any:
        weights, kept = np.asarray(weights, float), np.asarray(kept)
        step = np.where(kept, 0.0, -weights)
        right = self.rows.T @ np.asarray(targets) / len(self.rows)
        right = right - self.fisher @ step
        step[kept] = np.linalg.solve(self.fisher[np.ix_(kept, kept)], right[kept])
        return jnp.asarray(step)

    def multiplied(self, vector: Any) -> Any:
        return jnp.asarray(self.fisher @ np.asarray(vector, float))

    def leverages(self, kept: Any) -> Any:
        support = np.where(np.asarray(kept), self.rows, 0.0)
        count = len(self.rows)
        gram = count * DAMPING * np.eye(count) + support @ support.T
        return jnp.asarray(np.sum(self.rows * np.linalg.solve(gram, self.rows), 0))

    damping = DAMPING

    def loss(self, weights: Any, kept: Any, targets: Any) -> float:
        step = np.asarray(self.joint_update(weights, kept, targets), float)
        slope = -self.rows.T @ np.asarray(targets) / len(self.rows)
        return float(step @ self.fisher @ step / 2 + slope @ step)


def first(weights: np.ndarray, model: Dense) -> np.ndarray:
    """The support by the statistic of single weights."""
    score = weights**2 / np.diag(np.linalg.inv(model.fisher))
    kept = np.zeros(WIDTH, bool)
    kept[np.argsort(-score)[:LEFT]] = True
    return kept


def improved(seed: int, target: float = 0.0, rounds: int = 20) -> tuple[Any, ...]:
    rows, weights = problem(seed)
    model, targets = Dense(rows), np.full(len(rows), target)
    begun = first(weights, model)
    slope = jnp.asarray(-rows.T @ targets / len(rows))
    every = jnp.ones(WIDTH, bool)
    found = improve(
        model, jnp.asarray(weights), every, jnp.asarray(begun), targets, slope, rounds
    )
    return model, weights, targets, begun, found


@pytest.mark.parametrize("target", [0.0, -0.3])
def test_the_losses_are_those_of_the_supports_and_fall(target: float) -> None:
    falls = 0
    for seed in range(8):
        model, weights, targets, begun, found = improved(seed, target)
        assert int(jnp.sum(found.kept)) == LEFT
        before, after = (
            model.loss(weights, kept, targets) for kept in (begun, found.kept)
        )
        assert found.losses[0] == pytest.approx(before, rel=1e-4)
        assert found.losses[-1] == pytest.approx(after, rel=1e-4)
        assert all(np.diff(found.losses) <= 0)
        falls += after < before - 1e-3 * abs(before)
    assert falls >= 3


def test_it_comes_nearer_to_the_best_of_all_supports() -> None:
    gaps = []
    for seed in range(8):
        model, weights, targets, begun, found = improved(seed)
        every = []
        for chosen in combinations(range(WIDTH), LEFT):
            kept = np.isin(np.arange(WIDTH), chosen)
            every.append(model.loss(weights, kept, targets))
        best, start = min(every), model.loss(weights, begun, targets)
        assert found.losses[-1] >= best * (1 - 1e-4)
        gaps.append((start - best, found.losses[-1] - best))
    before, after = np.sum(gaps, axis=0)
    assert after < before / 2


@pytest.mark.parametrize("target", [0.0, -0.3])
def test_prices_are_what_one_weight_more_or_less_changes(target: float) -> None:
    rows, weights = problem(3)
    model, targets = Dense(rows), np.full(len(rows), target)
    kept = first(weights, model)
    step = np.asarray(model.joint_update(weights, kept, targets), float)
    uphill = model.fisher @ step - rows.T @ targets / len(rows)
    gain, loss = prices(
        jnp.asarray(weights + step),
        jnp.asarray(uphill),
        model.leverages(kept),
        jnp.ones(WIDTH, bool),
        jnp.asarray(kept),
        DAMPING,
    )
    here = model.loss(weights, kept, targets)
    for k in range(WIDTH):
        other = kept.copy()
        other[k] = not kept[k]
        change = model.loss(weights, other, targets) - here
        found = float(loss[k]) if kept[k] else -float(gain[k])
        assert found == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert bool(jnp.all(jnp.isinf(loss[~kept])))
    assert bool(jnp.all(gain[kept] == -1))


def test_pairs_are_swapped_while_the_gain_is_the_larger() -> None:
    kept = jnp.array([True, True, True, False, False, False])
    gain = jnp.array([-1.0, -1.0, -1.0, 9.0, 2.0, 4.0])
    loss = jnp.array([1.0, 3.0, 8.0, jnp.inf, jnp.inf, jnp.inf])
    pair = swapped(kept, gain, loss, jnp.asarray(1), 3)
    assert pair.tolist() == [False, True, True, True, False, False]
    # 9 for 1 and 4 for 3, but not 2 for 8.
    every = swapped(kept, gain, loss, jnp.asarray(3), 3)
    assert every.tolist() == [False, False, True, True, False, True]


def step(rows: np.ndarray, weights: np.ndarray, **options: Any) -> Any:
    """A pruning step whose gradients are given."""
    params = {"w": jnp.asarray(weights, jnp.float32)[:, None]}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(batch @ params["w"])

    return wf.prune(
        loss_fn,
        params,
        jnp.asarray(rows, jnp.float32),
        sparsity=1 - LEFT / WIDTH,
        method="woodfisher",
        damping=DAMPING,
        update="joint",
        **options,
    )


def test_a_pruning_step_swaps_as_the_dense_model_does() -> None:
    seed = next(s for s in range(9) if len(set(improved(s)[-1].losses)) > 1)
    model, weights, targets, _, expected = improved(seed)
    rows, _ = problem(seed)
    params, masks, info = step(rows, weights, swaps=20)
    np.testing.assert_array_equal(masks["w"][:, 0], expected.kept)
    np.testing.assert_allclose(info.swap_losses, expected.losses, rtol=1e-3)
    moved = weights + np.asarray(model.joint_update(weights, expected.kept, targets))
    np.testing.assert_allclose(params["w"][:, 0], moved, rtol=1e-3, atol=1e-4)
    assert not np.any(np.asarray(params["w"][:, 0])[~np.asarray(expected.kept)])
    assert step(rows, weights)[2].swap_losses is None


def test_what_is_pruned_stays_pruned() -> None:
    rows, weights = problem(1)
    gone = {"w": jnp.arange(WIDTH)[:, None] > 1}
    masks = step(rows, weights, swaps=20, masks=gone)[1]
    assert not masks["w"][:2].any()
    assert int(masks["w"].sum()) == LEFT


@pytest.mark.parametrize(
    "options",
    [
        {"swaps": -1},
        {"swaps": 1.5},
        {"swaps": 3, "update": "sum"},
        {"swaps": 3, "scope": "layer"},
        {"swaps": 3, "pattern": "4x1", "method": "woodfisherblock"},
    ],
)
def test_what_has_no_use_for_swaps_is_refused(options: dict[str, Any]) -> None:
    given = {"method": "woodfisher", "update": "joint", "sparsity": 0.5, **options}
    with pytest.raises(ValueError, match="swaps="):
        wf.prune(
            lambda p, x: jnp.mean(x @ p["w"]), {"w": jnp.eye(4)}, jnp.eye(4), **given
        )
