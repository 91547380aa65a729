"""The joint update against the equations of the constrained minimum, in float64."""

import jax
import numpy as np
import pytest

from woodfisher_jax.equations.joint import joint_update, joint_update_of_few

BOTH = pytest.mark.parametrize("solver", ["sample_space", "dense"])
NUMBER, WIDTH = 7, 20
update = jax.jit(joint_update, static_argnames="solver")


def problem(num_samples=NUMBER, seed=0, share=0.5, scale=1.0):
    """Gradients, weights and kept weights of one block, in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(num_samples, WIDTH)) * scale
    # Weights that explain one another: the update has something to do.
    gradients[:, WIDTH // 2 :] += gradients[:, : WIDTH // 2]
    return gradients, rng.normal(size=WIDTH), rng.random(WIDTH) < share


def fisher(gradients, damping):
    return damping * np.eye(WIDTH) + gradients.T @ gradients / len(gradients)


def oracle(gradients, weights, kept, targets, damping):
    """δ from the conditions of the minimum, with multipliers for δ_P = -w_P."""
    pruned = np.flatnonzero(~kept)
    slope = -gradients.T @ targets / len(gradients)
    picks = np.eye(WIDTH)[pruned]
    zeros = np.zeros((len(pruned), len(pruned)))
    system = np.block([[fisher(gradients, damping), picks.T], [picks, zeros]])
    right = np.concatenate([-slope, -weights[pruned]])
    return np.linalg.solve(system, right)[:WIDTH]


def model_loss(gradients, delta, targets, damping):
    slope = -gradients.T @ targets / len(gradients)
    return delta @ fisher(gradients, damping) @ delta / 2 + slope @ delta


def found(gradients, weights, kept, targets, damping, solver="sample_space"):
    """δ of arrays in float32."""
    arrays = (np.float32(a) for a in (gradients, weights))
    return np.asarray(
        update(*arrays, kept, np.float32(targets), np.float32(damping), solver=solver)
    )


@BOTH
@pytest.mark.parametrize("num_samples", [NUMBER, 40])
@pytest.mark.parametrize("target", [0.0, -1.0])
def test_it_is_the_constrained_minimum(solver, num_samples, target) -> None:
    gradients, weights, kept = problem(num_samples)
    targets = np.full(num_samples, target) + 0.1 * np.arange(num_samples)
    expected = oracle(gradients, weights, kept, targets, 0.1)
    delta = found(gradients, weights, kept, targets, 0.1, solver)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


def test_pruned_weights_do_not_make_the_fisher_ill_conditioned() -> None:
    """Of F alone; with zeros for their gradients λ is all that is left of them."""
    gradients, weights, kept = problem(40)
    targets, damping = np.zeros(40), 1e-15
    expected = oracle(gradients, weights, kept, targets, damping)
    delta = found(gradients, weights, kept, targets, damping, "dense")
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_of_one_weight_it_is_optimal_brain_surgeon(solver) -> None:
    gradients, weights, _ = problem()
    inverse = np.linalg.inv(fisher(gradients, 0.05))
    for q in (0, 9):
        expected = -weights[q] * inverse[:, q] / inverse[q, q]
        kept = np.arange(WIDTH) != q
        delta = found(gradients, weights, kept, np.zeros(NUMBER), 0.05, solver)
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_where_nothing_is_pruned_it_is_the_newton_step(solver) -> None:
    gradients, weights, _ = problem()
    every = np.ones(WIDTH, bool)
    expected = -np.linalg.solve(fisher(gradients, 0.05), gradients.mean(axis=0))
    delta = found(gradients, weights, every, -np.ones(NUMBER), 0.05, solver)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    delta = found(gradients, weights, every, np.zeros(NUMBER), 0.05, solver)
    assert not np.any(delta)


def test_with_targets_it_is_damped_least_squares() -> None:
    """Outputs that are linear in the weights reach their targets."""
    gradients, weights, _ = problem(scale=3.0)
    targets = np.random.default_rng(1).normal(size=NUMBER)
    delta = found(gradients, weights, np.ones(WIDTH, bool), targets, 1e-5)
    np.testing.assert_allclose(gradients @ delta, targets, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_no_other_update_has_a_lower_model_loss(seed, share, damping) -> None:
    gradients, weights, kept = problem(seed=seed, share=share)
    targets = np.zeros(NUMBER)
    inverse = np.linalg.inv(fisher(gradients, damping))
    surgeon = -inverse @ np.where(kept, 0, weights / np.diag(inverse))
    delta = found(gradients, weights, kept, targets, damping)
    lowest = model_loss(gradients, delta, targets, damping)
    for other in (surgeon, 0.0):
        step = np.where(kept, other, -weights)
        assert lowest <= model_loss(gradients, step, targets, damping) * (1 + 1e-5)


@BOTH
def test_pruned_weights_are_exactly_zero(solver) -> None:
    gradients, weights, kept = problem()
    before = np.arange(WIDTH) < 4
    weights[before], gradients[:, before], kept[before] = 0.0, 0.0, False
    delta = found(gradients, weights, kept, np.zeros(NUMBER), 0.05, solver)
    assert not np.any((np.float32(weights) + delta)[~kept])


def test_of_few_columns_it_is_the_same() -> None:
    of_few = jax.jit(joint_update_of_few)
    for seed, share in ((0, 0.0), (1, 0.2), (2, 0.6), (3, 1.0)):
        gradients, weights, kept = problem(seed=seed, share=share)
        # In any order, with padding among them.
        columns = np.full(WIDTH + 3, WIDTH)
        columns[: kept.sum()] = np.flatnonzero(kept)
        np.random.default_rng(seed).shuffle(columns)
        targets = np.linspace(-1, 1, NUMBER)
        arrays = [np.float32(a) for a in (gradients, weights, targets, 0.1)]
        delta = of_few(*arrays[:2], columns, *arrays[2:])
        expected = found(gradients, weights, kept, targets, 0.1)
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(delta[~kept], -np.float32(weights)[~kept])
