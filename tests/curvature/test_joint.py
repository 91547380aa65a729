"""The joint update against the equations of the constrained minimum, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from woodfisher_jax.curvature.joint import joint_update, joint_updates

from woodfisher_jax.curvature.checked import CurvatureError

BOTH = pytest.mark.parametrize("solver", ["sample_space", "dense"])


def problem(num_samples, width, seed=0, share=0.5, scale=1.0):
    """Gradients, weights and what stays of one block, in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(num_samples, width)) * scale
    # Weights that explain one another: the update has something to do.
    gradients[:, width // 2 :] += gradients[:, : width - width // 2]
    weights = rng.normal(size=width)
    return gradients, weights, rng.random(width) < share


def fisher(gradients, damping):
    return damping * np.eye(gradients.shape[1]) + gradients.T @ gradients / len(
        gradients
    )


def oracle(gradients, weights, kept, targets, damping):
    """δ from the conditions of the minimum, with multipliers for δ_P = -w_P."""
    width, gone = len(weights), np.flatnonzero(~kept)
    slope = -gradients.T @ targets / len(gradients)
    picks = np.eye(width)[gone]
    system = np.block(
        [
            [fisher(gradients, damping), picks.T],
            [picks, np.zeros((len(gone), len(gone)))],
        ]
    )
    right = np.concatenate([-slope, -weights[gone]])
    return np.linalg.solve(system, right)[:width]


def model_loss(gradients, delta, targets, damping):
    slope = -gradients.T @ targets / len(gradients)
    return delta @ fisher(gradients, damping) @ delta / 2 + slope @ delta


def single(*arrays):
    return [np.asarray(a, bool if a.dtype == bool else np.float32) for a in arrays]


@BOTH
@pytest.mark.parametrize("shape", [(7, 20), (40, 20)])
@pytest.mark.parametrize("target", [0.0, -1.0])
def test_it_is_the_constrained_minimum(solver, shape, target):
    gradients, weights, kept = problem(*shape)
    targets = np.full(len(gradients), target) + 0.1 * np.arange(len(gradients))
    expected = oracle(gradients, weights, kept, targets, 0.1)
    delta, error = joint_update(*single(gradients, weights, kept, targets), 0.1, solver)
    np.testing.assert_allclose(delta, expected, rtol=2e-4, atol=2e-4)
    assert error < 1e-4


@BOTH
def test_of_one_weight_it_is_optimal_brain_surgeon(solver):
    gradients, weights, _ = problem(6, 15)
    for q in (0, 9):
        kept = np.arange(15) != q
        inverse = np.linalg.inv(fisher(gradients, 0.05))
        expected = -weights[q] * inverse[:, q] / inverse[q, q]
        delta, _ = joint_update(
            *single(gradients, weights, kept, np.zeros(6)), 0.05, solver
        )
        np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_where_nothing_goes_it_is_the_newton_step(solver):
    gradients, weights, _ = problem(6, 15)
    kept = np.ones(15, bool)
    mean = gradients.mean(axis=0)
    expected = -np.linalg.solve(fisher(gradients, 0.05), mean)
    delta, _ = joint_update(
        *single(gradients, weights, kept, -np.ones(6)), 0.05, solver
    )
    np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-4)


def test_where_nothing_goes_and_nothing_slopes_nothing_moves():
    gradients, weights, _ = problem(6, 15)
    delta, error = joint_update(
        *single(gradients, weights, np.ones(15, bool), np.zeros(6)), 0.05
    )
    assert not np.any(delta)
    assert error == 0


def test_with_targets_it_is_damped_least_squares():
    """Outputs that are linear in the weights reach what they are to be."""
    gradients, weights, _ = problem(6, 30, scale=3.0)
    wanted = np.random.default_rng(1).normal(size=6)
    delta, _ = joint_update(
        *single(gradients, weights, np.ones(30, bool), wanted), 1e-5
    )
    np.testing.assert_allclose(gradients @ np.asarray(delta), wanted, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_its_model_loss_is_never_above_that_of_other_updates(seed, share, damping):
    gradients, weights, kept = problem(8, 24, seed, share)
    targets = np.zeros(8)
    inverse = np.linalg.inv(fisher(gradients, damping))
    surgeon = -inverse @ np.where(kept, 0, weights / np.diag(inverse))
    none = np.where(kept, 0, -weights)
    summed = np.where(kept, surgeon, -weights)
    delta, _ = joint_update(*single(gradients, weights, kept, targets), damping)
    found = model_loss(gradients, np.asarray(delta, np.float64), targets, damping)
    for other in (summed, none):
        assert found <= model_loss(gradients, other, targets, damping) * (1 + 1e-5)


@BOTH
def test_what_goes_is_exactly_zero_and_what_went_stays_so(solver):
    gradients, weights, kept = problem(6, 15)
    gone = np.arange(15) < 4
    weights[gone], gradients[:, gone], kept[gone] = 0.0, 0.0, False
    arrays = single(gradients, weights, kept, np.zeros(6))
    delta, _ = joint_update(*arrays, 0.05, solver)
    assert not np.any((arrays[1] + np.asarray(delta))[~kept])


def test_blocks_do_not_know_of_each_other():
    blocks = [problem(6, 15, seed) for seed in range(3)]
    gradients, weights, kept = (np.stack(a) for a in zip(*blocks, strict=True))
    targets = np.linspace(-1, 1, 6)
    found = joint_updates(
        *map(jnp.asarray, single(gradients, weights, kept, targets)),
        damping=0.1,
        solver="sample_space",
        names=["a", "b", "c"],
    )
    for delta, block in zip(found, blocks, strict=True):
        expected = oracle(*block, targets, 0.1)
        np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-4)


def test_a_block_that_float32_cannot_do_is_done_in_float64():
    gradients, weights, kept = problem(12, 40, scale=1e3)
    gradients[6:] = gradients[:6] * (1 + 1e-7 * np.arange(40))
    arrays = single(gradients, weights, kept, np.zeros(12))
    _, error = jax.jit(joint_update, static_argnames="solver")(*arrays, 1e-4)
    assert not error <= 1e-4
    found = joint_updates(
        *(jnp.asarray(a)[None] for a in arrays[:3]),
        jnp.zeros(12),
        damping=1e-4,
        solver="sample_space",
        names=["a"],
    )
    wide = [np.asarray(a, bool if a.dtype == bool else np.float64) for a in arrays]
    expected = oracle(*wide, 1e-4)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[0], expected, atol=1e-3 * scale)


def test_one_that_cannot_be_done_at_all_is_refused():
    gradients, weights, kept = problem(12, 40, scale=1e9)
    gradients[6:] = gradients[:6]
    arrays = single(gradients, weights, kept, np.zeros(12))
    with pytest.raises(CurvatureError, match="raise damping"):
        joint_updates(
            *(jnp.asarray(a)[None] for a in arrays[:3]),
            jnp.zeros(12),
            damping=1e-20,
            solver="sample_space",
            names=["a"],
        )
