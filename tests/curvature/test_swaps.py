"""Rounds of swaps on the quadratic model, against every support there is."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.sources import InMemory, laid_out
from woodfisher_jax.curvature.swaps import improve
from woodfisher_jax.rows.compute import Compute

WIDTH, LEFT, DAMPING, SEEDS = 9, 4, 0.05, range(8)


def problem(seed: int):
    """Gradients that explain one another, weights, and the Fisher, in float64."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, 5)) @ rng.normal(size=(5, WIDTH))
    rows += 0.2 * rng.normal(size=rows.shape)
    return rows, rng.normal(size=WIDTH), rows.T @ rows / 12 + DAMPING * np.eye(WIDTH)


def minimum(seed: int, kept, target: float = 0.0):
    """The best step on a support and its model loss."""
    rows, weights, fisher = problem(seed)
    slope = -rows.T @ np.full(12, target) / 12
    step = np.where(kept, 0.0, -weights)
    right = -slope - fisher @ step
    step[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], right[kept])
    return step, step @ fisher @ step / 2 + slope @ step


def improved(seed: int, target: float = 0.0, *, factored: bool = False):
    """The support by the statistic of single weights, and the one after swaps."""
    rows, weights, fisher = problem(seed)
    first = np.zeros(WIDTH, bool)
    first[np.argsort(-(weights**2) / np.diag(np.linalg.inv(fisher)))[:LEFT]] = True
    targets = jnp.full(12, target)
    compute = Compute(solver="sample_space")
    source = InMemory(*laid_out(jnp.float32(rows), None), WIDTH, compute)
    inverse = InverseFisher(source, DAMPING)
    found = improve(
        inverse.factored() if factored else inverse,
        jnp.float32(weights),
        jnp.ones(WIDTH, bool),
        jnp.asarray(first),
        targets,
        jnp.float32(-rows.T @ targets / 12),
        rounds=20,
    )
    return first, np.asarray(found.kept), found.losses


@pytest.fixture(scope="module")
def swapped_supports():
    return {target: [improved(s, target) for s in SEEDS] for target in (0.0, -0.3)}


@pytest.mark.parametrize("target", [0.0, -0.3])
def test_losses_are_those_of_the_supports_and_fall(swapped_supports, target) -> None:
    falls = 0
    for seed, (first, kept, losses) in enumerate(swapped_supports[target]):
        assert kept.sum() == LEFT
        before, after = (minimum(seed, s, target)[1] for s in (first, kept))
        assert losses[0] == pytest.approx(before, rel=1e-3)
        assert losses[-1] == pytest.approx(after, rel=1e-3)
        assert all(np.diff(losses) <= 0)
        falls += after < before - 1e-3 * abs(before)
    assert falls >= 3


def test_a_factor_of_all_weights_is_not_taken_for_that_of_a_support(
    swapped_supports,
) -> None:
    for seed in SEEDS[:3]:
        found = improved(seed, factored=True)[2]
        assert found == pytest.approx(swapped_supports[0.0][seed][2], rel=1e-5)


def test_it_comes_nearer_to_the_best_of_all_supports(swapped_supports) -> None:
    gaps = []
    for seed, (first, kept, _) in enumerate(swapped_supports[0.0]):
        every = [
            minimum(seed, np.isin(np.arange(WIDTH), chosen))[1]
            for chosen in combinations(range(WIDTH), LEFT)
        ]
        gaps.append([minimum(seed, s)[1] - min(every) for s in (first, kept)])
    before, after = np.sum(gaps, axis=0)
    assert 0 <= after < before / 2


def step(seed: int, **options):
    """A pruning step whose gradients are given."""
    rows, weights, _ = problem(seed)
    return wf.prune(
        lambda params, batch: jnp.mean(batch @ params["w"]),
        {"w": jnp.float32(weights)[:, None]},
        np.float32(rows),
        sparsity=1 - LEFT / WIDTH,
        method="woodfisher",
        damping=DAMPING,
        update="joint",
        **options,
    )


@pytest.mark.slow
def test_a_pruning_step_takes_the_support_after_swaps(swapped_supports) -> None:
    seed = next(s for s in SEEDS if len(set(swapped_supports[0.0][s][2])) > 1)
    _, kept, losses = swapped_supports[0.0][seed]
    params, masks, info = step(seed, swaps=20)
    np.testing.assert_array_equal(masks["w"][:, 0], kept)
    np.testing.assert_allclose(info.swap_losses, losses, rtol=1e-3)
    _, weights, fisher = problem(seed)
    scores = weights**2 / (2 * np.diag(np.linalg.inv(fisher)))
    # Of what is pruned in the end, not of what the statistic would have pruned.
    assert info.saliency_sum == pytest.approx(scores[~kept].sum(), rel=1e-3)
    moved = problem(seed)[1] + minimum(seed, kept)[0]
    np.testing.assert_allclose(params["w"][:, 0], moved, rtol=1e-3, atol=1e-4)
    assert not np.any(np.asarray(params["w"][:, 0])[~kept])
    assert step(seed)[2].swap_losses is None
    pruned = {"w": jnp.arange(WIDTH)[:, None] > 1}
    masks = step(seed, swaps=20, masks=pruned)[1]
    assert not masks["w"][:2].any()
    assert int(masks["w"].sum()) == LEFT
