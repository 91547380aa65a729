"""Kronecker factors against dense inverses in float64."""

import numpy as np
import pytest

from woodfisher_jax.equations.kronecker import (
    Factor,
    damped,
    diagonal,
    inverse,
    joint_update,
    product,
)

RANDOM = np.random.default_rng(0)
DAMPING = 1e-3


def moment(groups: int, size: int, rank: int = 3) -> np.ndarray:
    """A sum of fewer outer products than there are rows."""
    rows = RANDOM.standard_normal((groups, rank, size))
    return np.swapaxes(rows, 1, 2) @ rows


def random_factor(groups: int = 1) -> Factor:
    """A layer with weights from 6 inputs to 4 outputs in each group, and biases."""
    places = RANDOM.permutation(groups * 4 * 6).reshape(groups, 4, 6)
    biases = RANDOM.permutation(groups * 4).reshape(groups, 4, 1)
    return Factor(
        moment(groups, 7),
        moment(groups, 4),
        {"kernel": places, "bias": biases},
        {"kernel": (2, 3, 4 * groups), "bias": (4 * groups,)},
    )


def dense_inverse(factor: Factor, group: int, pi: bool) -> np.ndarray:
    """(S + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹ of one group."""
    a, s = factor.inputs[group], factor.outputs[group]
    ratio = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s))) if pi else 1.0
    a = a + ratio * np.sqrt(DAMPING) * np.eye(len(a))
    s = s + np.sqrt(DAMPING) / ratio * np.eye(len(s))
    return np.linalg.inv(np.kron(s, a))


def row_by_row(factor: Factor, tensors, group: int) -> np.ndarray:
    """A group's entries of some tensors, output after output, its bias last."""
    parts = [
        np.reshape(tensors[path], -1)[entries[group]]
        for path, entries in factor.entries.items()
    ]
    return np.concatenate(parts, axis=-1).reshape(-1).astype(np.float64)


@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_formula(groups, pi) -> None:
    factor = random_factor(groups)
    inverses = inverse(damped({"kernel": factor}, DAMPING, pi=pi))
    vectors = {
        path: RANDOM.standard_normal(shape).astype(np.float32)
        for path, shape in factor.shapes.items()
    }
    entries, multiplied = diagonal(inverses), product(inverses, vectors)
    for found in (entries, multiplied):
        assert {path: array.shape for path, array in found.items()} == factor.shapes
        assert {str(array.dtype) for array in found.values()} == {"float32"}
    for group in range(groups):
        dense = dense_inverse(factor, group, pi)
        np.testing.assert_allclose(
            row_by_row(factor, entries, group), np.diag(dense), rtol=1e-6
        )
        expected = dense @ row_by_row(factor, vectors, group)
        np.testing.assert_allclose(
            row_by_row(factor, multiplied, group),
            expected,
            atol=1e-6 * np.abs(expected).max(),
        )


def test_pi_makes_the_scale_of_each_factor_irrelevant() -> None:
    """A / c and c S are the same Fisher; √λ on both would tell them apart."""
    factor = random_factor()
    scaled = factor._replace(inputs=factor.inputs / 50, outputs=factor.outputs * 50)
    with_pi, without = (
        [
            diagonal(inverse(damped({"kernel": f}, DAMPING, pi=pi)))["kernel"]
            for f in (factor, scaled)
        ]
        for pi in (True, False)
    )
    np.testing.assert_allclose(*with_pi, rtol=1e-5)
    assert np.max(np.abs(without[0] / without[1] - 1)) > 0.1


def test_a_layer_that_no_gradient_reaches() -> None:
    factor = random_factor()
    factor = factor._replace(outputs=np.zeros_like(factor.outputs))
    found = diagonal(inverse(damped({"kernel": factor}, 1e-2, pi=True)))
    inputs = np.diag(np.linalg.inv(factor.inputs[0] + 0.1 * np.eye(7)))
    np.testing.assert_allclose(
        row_by_row(factor, found, 0), np.tile(10 * inputs, 4), rtol=1e-5
    )


@pytest.mark.parametrize("damping", [0.0, -1.0, np.inf, np.nan])
def test_damping_is_positive(damping) -> None:
    with pytest.raises(ValueError, match=r"damping=.*expected"):
        damped({"kernel": random_factor()}, damping)


def test_what_is_not_positive_definite_is_named() -> None:
    broken = {"w": random_factor()._replace(inputs=-np.eye(7)[None])}
    with pytest.raises(ValueError, match="'w' is not positive definite"):
        inverse(damped(broken, DAMPING))


@pytest.mark.parametrize("groups", [1, 2])
def test_joint_update_is_the_constrained_minimum(groups) -> None:
    factor = random_factor(groups)
    factors = damped({"kernel": factor}, DAMPING)
    weights = {
        path: RANDOM.standard_normal(shape) for path, shape in factor.shapes.items()
    }
    kept = {path: RANDOM.random(w.shape) < 0.5 for path, w in weights.items()}
    found, residual = joint_update(factors, inverse(factors), weights, kept)
    assert residual <= 1e-6
    for group in range(groups):
        dense = np.linalg.inv(dense_inverse(factor, group, pi=False))
        w, stays = (row_by_row(factor, v, group) for v in (weights, kept))
        stays = stays > 0
        right = dense[np.ix_(stays, ~stays)] @ w[~stays]
        expected = -w
        expected[stays] = np.linalg.solve(dense[np.ix_(stays, stays)], right)
        actual = row_by_row(factor, found, group)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_joint_update_of_one_weight_is_that_of_optimal_brain_surgeon() -> None:
    """δ = -w_q F⁻¹ e_q / [F⁻¹]_qq, and nothing without a pruned weight."""
    factor = random_factor()
    factors = damped({"kernel": factor}, DAMPING)
    weights = {
        path: RANDOM.standard_normal(shape) for path, shape in factor.shapes.items()
    }
    kept = {path: np.ones(w.shape, bool) for path, w in weights.items()}
    nothing, residual = joint_update(factors, inverse(factors), weights, kept)
    assert residual == 0
    assert not any(np.any(change) for change in nothing.values())
    place = factor.entries["kernel"][0, 2, 3]
    kept["kernel"].reshape(-1)[place] = False
    found, _ = joint_update(factors, inverse(factors), weights, kept)
    dense, q = dense_inverse(factor, 0, pi=False), 2 * 7 + 3
    expected = -weights["kernel"].reshape(-1)[place] * dense[q] / dense[q, q]
    np.testing.assert_allclose(
        row_by_row(factor, found, 0), expected, rtol=1e-4, atol=1e-6
    )
