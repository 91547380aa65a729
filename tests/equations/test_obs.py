"""Saliency and update solve the problem that defines them."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.equations.obs import (
    obd_saliency,
    obs_direction,
    obs_saliency,
)

WIDTH = 7


@pytest.fixture(scope="module")
def problem():
    """Weights and a positive definite curvature with its inverse, in float64."""
    random = np.random.default_rng(0)
    root = random.standard_normal((WIDTH, WIDTH))
    curvature = root @ root.T + 0.3 * np.eye(WIDTH)
    return random.standard_normal(WIDTH), curvature, np.linalg.inv(curvature)


def cheapest_removal(weights, curvature, removed):
    """Oracle: min ½ δᵀFδ subject to δ_q = -w_q for each q in ``removed``, by KKT."""
    constraints = np.eye(WIDTH)[removed]
    count = len(removed)
    system = np.block(
        [[curvature, constraints.T], [constraints, np.zeros((count, count))]]
    )
    right = np.concatenate([np.zeros(WIDTH), -weights[removed]])
    step = np.linalg.solve(system, right)[:WIDTH]
    return step, 0.5 * step @ curvature @ step


def f32(array):
    return jnp.asarray(array, jnp.float32)


def updates(weights, inverse, removed):
    pruned = np.isin(np.arange(WIDTH), removed)
    direction = obs_direction(f32(weights), f32(np.diag(inverse)), jnp.asarray(pruned))
    return inverse @ np.asarray(direction, np.float64)


def test_obs_saliency_is_the_least_loss_increase(problem) -> None:
    weights, curvature, inverse = problem
    found = obs_saliency(f32(weights), f32(np.diag(inverse)))
    expected = [cheapest_removal(weights, curvature, [q])[1] for q in range(WIDTH)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("removed", range(WIDTH))
def test_the_update_of_one_weight_is_the_optimal_one(problem, removed) -> None:
    weights, curvature, inverse = problem
    expected, _ = cheapest_removal(weights, curvature, [removed])
    step = updates(weights, inverse, [removed])
    np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-7)
    assert step[removed] == pytest.approx(-weights[removed], rel=1e-6)


def test_the_update_of_several_is_the_sum_of_the_single_ones(problem) -> None:
    weights, curvature, inverse = problem
    single = [cheapest_removal(weights, curvature, [q])[0] for q in (1, 4, 5)]
    step = updates(weights, inverse, [1, 4, 5])
    np.testing.assert_allclose(step, sum(single), rtol=1e-5, atol=1e-6)


def test_with_diagonal_curvature_obs_is_obd(problem) -> None:
    weights, curvature, _ = problem
    diagonal = np.diag(curvature)
    np.testing.assert_allclose(
        obs_saliency(f32(weights), f32(1 / diagonal)),
        obd_saliency(f32(weights), f32(diagonal)),
        rtol=1e-6,
    )
    # and then removing q moves q only
    step = updates(weights, np.diag(1 / diagonal), [2])
    np.testing.assert_allclose(step, -weights * (np.arange(WIDTH) == 2), rtol=1e-6)


def test_obd_saliency_is_the_loss_increase_without_an_update(problem) -> None:
    weights, curvature, _ = problem
    expected = []
    for q in range(WIDTH):
        removed = np.where(np.arange(WIDTH) == q, -weights, 0)
        expected.append(0.5 * removed @ curvature @ removed)
    found = obd_saliency(f32(weights), f32(np.diag(curvature)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_adjusting_the_others_never_costs_more(problem) -> None:
    weights, curvature, inverse = problem
    with_update = obs_saliency(f32(weights), f32(np.diag(inverse)))
    without = obd_saliency(f32(weights), f32(np.diag(curvature)))
    assert bool(jnp.all(with_update < without))


def test_obs_saliency_with_one_curvature_for_all_orders_by_magnitude(problem) -> None:
    weights, _, _ = problem
    found = obs_saliency(f32(weights), jnp.full(WIDTH, 1e5))
    np.testing.assert_array_equal(np.argsort(found), np.argsort(np.abs(weights)))
