"""Losses of the rows' examples after a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.gradients import as_partial
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.values import missed, row_values
from woodfisher_jax.trees.blocks import flat_order
from woodfisher_jax.trees.prunable import init_masks

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
X = np.random.default_rng(0).normal(size=(14, 2)).astype(np.float32)


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]) ** 2, axis=1))


def problem(
    batch_size: int, number: int, samples: Any = X, microbatch: int = 8
) -> Problem:
    masks = init_masks(PARAMS)
    return Problem(
        as_partial(loss_fn),
        PARAMS,
        masks,
        samples,
        flat_order(masks),
        number,
        batch_size,
        Compute(microbatch_size=microbatch),
    )


@pytest.mark.parametrize("microbatch", [1, 4, 100])
@pytest.mark.parametrize(("m", "number"), [(1, 14), (1, 5), (3, 4)])
def test_each_value_is_the_mean_loss_of_its_examples(
    m: int, number: int, microbatch: int
) -> None:
    one = np.sum(np.tanh(X @ np.asarray(PARAMS["w"])) ** 2, axis=1)
    expected = one[: m * number].reshape(number, m).mean(axis=1)
    for samples in (X, [X[:6], X[6:]]):
        found = row_values(problem(m, number, samples, microbatch), PARAMS)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_missed_is_zero_where_the_targets_are_the_changes() -> None:
    given, after = problem(1, 14), {"w": 0.9 * PARAMS["w"]}
    start = row_values(given, PARAMS)
    changes = row_values(given, after) - start
    assert missed(given, start, after, changes) == 0
    assert missed(given, start, PARAMS, changes) == pytest.approx(np.mean(changes**2))
    wild = {"w": jnp.full((2, 2), jnp.nan)}
    assert missed(given, start, wild, changes) == np.inf


def test_squares_beyond_float32_are_no_overflow() -> None:
    far = np.full(14, 1e25, np.float32)
    start = np.zeros(14, np.float32)
    found = missed(problem(1, 14), start, PARAMS, far)
    assert found == pytest.approx(1e50, rel=1e-5)
