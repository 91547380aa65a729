"""Layer-wise pruning against float64 least squares and plain sorting."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import INPUTS, OUTPUTS

from woodfisher_jax.equations.layerwise import (
    inverse_by_blocks,
    inverse_of,
    keep_of_each,
    layer_error,
    least_squares_on,
    pruned_layer,
)


def prune(layer, kept=96, damping=0.01, allowed=None, importance=None, **options):
    shape = (1, OUTPUTS, INPUTS)
    pruned, mask = pruned_layer(
        jnp.asarray(layer["weights"][None], jnp.float32),
        jnp.asarray(layer["moment"][None], jnp.float32),
        jnp.asarray(layer["cross"][None], jnp.float32),
        jnp.ones(shape[:2]) if importance is None else importance,
        jnp.ones(shape, bool) if allowed is None else allowed,
        kept,
        damping,
        jnp.array([0.3, 1.0]),
        **{"rounds": 8, "polish": 30, **options},
    )
    return np.asarray(pruned[0], np.float64), np.asarray(mask[0])


def best_on(mask: np.ndarray, layer, damping: float) -> np.ndarray:
    """Least squares of each output on its support, in float64."""
    ridge = damping * np.trace(layer["moment"]) / INPUTS * np.eye(INPUTS)
    moment, wanted = (
        layer["moment"] + ridge,
        layer["weights"] @ (layer["cross"] + ridge),
    )
    best = np.zeros_like(layer["weights"])
    for row, support in enumerate(mask):
        inside = moment[np.ix_(support, support)]
        best[row, support] = np.linalg.solve(inside, wanted[row, support])
    return best


def error(pruned: np.ndarray, layer) -> float:
    aim = layer["z"] @ layer["weights"].T
    return float(np.sum((layer["x"] @ pruned.T - aim) ** 2) / np.sum(aim**2))


def test_the_weights_that_stay_are_least_squares_on_their_support(layer) -> None:
    pruned, mask = prune(layer)
    assert mask.sum() == 96
    assert (pruned[~mask] == 0).all()
    np.testing.assert_allclose(pruned, best_on(mask, layer, 0.01), atol=2e-4)


def test_the_support_is_better_than_that_of_magnitudes_and_of_norms(layer) -> None:
    pruned, _ = prune(layer)
    norms = np.sqrt(np.diag(layer["moment"]))
    for scores in (np.abs(layer["weights"]), np.abs(layer["weights"]) * norms):
        mask = scores >= np.sort(scores.ravel())[-96]
        assert error(pruned, layer) < 0.9 * error(best_on(mask, layer, 0.01), layer)


def test_without_sparsity_the_layer_is_fitted_to_the_aim(layer) -> None:
    pruned, mask = prune(layer, kept=OUTPUTS * INPUTS)
    assert mask.all()
    assert error(pruned, layer) <= error(layer["weights"], layer)


def test_two_of_four_consecutive_inputs_stay(layer) -> None:
    pruned, mask = prune(layer, pattern=(2, 4))
    assert (mask.reshape(OUTPUTS, -1, 4).sum(axis=-1) == 2).all()
    np.testing.assert_allclose(pruned, best_on(mask, layer, 0.01), atol=2e-4)


def test_pruned_weights_stay_pruned(layer) -> None:
    allowed = np.random.default_rng(1).random((1, OUTPUTS, INPUTS)) < 0.7
    _, mask = prune(layer, kept=60, allowed=jnp.asarray(allowed))
    assert mask.sum() == 60
    assert not (mask & ~allowed[0]).any()


def test_an_output_that_matters_more_keeps_more(layer) -> None:
    importance = jnp.ones((1, OUTPUTS)).at[0, 3].set(10.0)
    _, even = prune(layer)
    _, uneven = prune(layer, importance=importance)
    assert uneven[3].sum() > even[3].sum()


def test_inputs_that_are_zero_lose_their_weights_first(layer) -> None:
    silent = {**layer, "moment": layer["moment"].copy(), "cross": layer["cross"].copy()}
    for name in ("moment", "cross"):
        silent[name][2, :] = silent[name][:, 2] = 0
    pruned, mask = prune(silent)
    assert not mask[:, 2].any()
    assert np.isfinite(pruned).all()


def test_the_relative_error_is_that_of_the_outputs(layer) -> None:
    pruned, _ = prune(layer)
    found = layer_error(
        *(jnp.asarray(a[None]) for a in (layer["weights"], pruned, layer["moment"]))
    )
    same = {**layer, "z": layer["x"]}
    np.testing.assert_allclose(found, error(pruned, same), rtol=1e-4)
    zero = jnp.zeros((1, 2, 3))
    assert layer_error(zero, zero, jnp.eye(3)[None]) == 0


def test_conjugate_gradients_lower_the_error_with_every_step(layer) -> None:
    mask = np.random.default_rng(2).random((1, OUTPUTS, INPUTS)) < 0.5
    moment = jnp.asarray(layer["moment"][None] + 0.01 * np.eye(INPUTS))
    wanted = jnp.asarray(layer["weights"][None]) @ moment
    start = jnp.where(mask, layer["weights"][None], 0.0)
    values = []
    for steps in (0, 2, 4, 8):
        found = least_squares_on(jnp.asarray(mask), start, moment, wanted, steps)
        values.append(float(jnp.sum(found @ moment * found - 2 * found * wanted)))
        assert (np.asarray(found)[~mask] == 0).all()
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_of_equal_scores_the_first_of_a_group_stay() -> None:
    scores = jnp.array([[3.0, 1.0, 3.0, 3.0], [0.0, 0.0, 5.0, 0.0]])
    expected = [[True, False, True, False], [True, False, True, False]]
    assert keep_of_each(scores, 2, 4).tolist() == expected


@pytest.mark.parametrize(
    "size", [300, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 128))]
)
def test_the_inverse_by_blocks_is_the_inverse(size: int) -> None:
    rng = np.random.default_rng(size)
    # Second moments of inputs that depend on one another, with ADMM's least penalty.
    x = rng.normal(size=(4 * size, size)) + 2 * rng.normal(size=(4 * size, 1))
    moment = x.T @ x / len(x)
    scale = np.sqrt(np.diag(moment))
    matrix = np.float32(moment / scale / scale[:, None] + 0.3 * np.eye(size))
    wanted = np.linalg.inv(matrix.astype(np.float64))
    assert np.linalg.cond(matrix) > size
    for found in (inverse_by_blocks(matrix), inverse_of(matrix[None])[0]):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_a_tpu_is_given_does_not_grow_with_the_matrix() -> None:
    lengths = []
    for size in (300, 2000):
        traced = jax.jit(inverse_of).trace(jax.ShapeDtypeStruct((1, size, size), "f4"))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        factored = re.findall(r"cholesky.*tensor<(?:1x)+(\d+)x", text)
        assert set(factored) == {"128"}
        lengths.append(len(text.splitlines()))
    assert lengths[0] == lengths[1]
