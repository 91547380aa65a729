"""The loss on the way, and a quadratic model that is exact where the loss is one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from woodfisher_jax.training.network import loss_path
from woodfisher_jax.trees.samples import Examples

RNG = np.random.default_rng(0)
BEFORE = {"w": jnp.asarray(RNG.standard_normal((3, 2)), jnp.float32), "b": jnp.ones(2)}
AFTER = jax.tree.map(lambda a: 0.3 * a + 0.1, BEFORE)
# Chunks smaller than a group, larger, and larger than all.
QUICK = ((1, 3), (8, 3), (100, 10))
BATCH = (
    RNG.standard_normal((24, 3)).astype(np.float32),
    RNG.standard_normal((24, 2)).astype(np.float32),
)


def squares(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


LOSS = Partial(squares)


@pytest.mark.parametrize("chunk_size", [1, 7, 24, 100])
def test_the_mean_does_not_depend_on_the_chunks(chunk_size: int) -> None:
    found = loss_path.mean_loss(LOSS, BEFORE, BATCH, chunk_size)
    assert found == pytest.approx(float(squares(BEFORE, BATCH)), rel=1e-6)


@pytest.mark.parametrize(
    ("chunk_size", "batch_size"),
    [
        pytest.param(
            chunk_size,
            batch_size,
            marks=[pytest.mark.slow] * ((chunk_size, batch_size) not in QUICK),
        )
        for chunk_size in (1, 8, 100)
        for batch_size in (1, 3, 10)
    ],
)
def test_the_quadratic_model_is_of_the_gradients(
    batch_size: int, chunk_size: int
) -> None:
    direction = jax.tree.map(jnp.subtract, AFTER, BEFORE)
    slopes = []
    for start in range(0, 24 - batch_size + 1, batch_size):
        group = tuple(a[start : start + batch_size] for a in BATCH)
        gradient = jax.grad(squares)(BEFORE, group)
        slopes.append(
            sum(
                float(np.sum(np.float64(g) * np.float64(d)))
                for g, d in zip(
                    jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
                )
            )
        )
    found = loss_path.quadratic_model(
        LOSS, BEFORE, direction, BATCH, batch_size=batch_size, chunk_size=chunk_size
    )
    np.testing.assert_allclose(
        found, (np.mean(slopes), np.mean(np.square(slopes))), rtol=1e-5
    )


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer examples than batch_size=25"):
        loss_path.quadratic_model(LOSS, BEFORE, AFTER, BATCH, batch_size=25)


def test_examples_that_do_not_fit_in_memory_are_read_batch_by_batch() -> None:
    parts = [tuple(a[start : start + 5] for a in BATCH) for start in range(0, 24, 5)]
    samples = Examples(24, lambda: iter(parts))
    options = {"num_steps": 2, "batch_size": 3, "chunk_size": 6}
    found = loss_path.follow(LOSS, BEFORE, AFTER, samples, **options)
    expected = loss_path.follow(LOSS, BEFORE, AFTER, BATCH, **options)
    assert found == expected


def test_the_way_goes_from_before_to_after() -> None:
    path = loss_path.follow(LOSS, BEFORE, AFTER, BATCH, num_steps=4)
    assert path.fractions == [0, 0.25, 0.5, 0.75, 1]
    ends = (path.train[0], path.train[-1])
    expected = [float(squares(params, BATCH)) for params in (BEFORE, AFTER)]
    np.testing.assert_allclose(ends, expected, rtol=1e-5)
    assert path.test == []
    assert path.quadratic[0] == path.with_slope[0] == path.train[0]
    # Near the start the slope tells; a parabola has the curvature that the Fisher has.
    np.testing.assert_allclose(np.diff(path.quadratic, 2), np.diff(path.with_slope, 2))


def test_the_model_is_tangent_to_the_loss() -> None:
    near = jax.tree.map(lambda w, a: w + 1e-2 * (a - w), BEFORE, AFTER)
    path = loss_path.follow(LOSS, BEFORE, near, BATCH, num_steps=1)
    change = path.train[1] - path.train[0]
    assert path.with_slope[1] - path.with_slope[0] == pytest.approx(change, rel=0.05)


def test_the_test_loss_is_measured_beside() -> None:
    path = loss_path.follow(
        LOSS, BEFORE, AFTER, BATCH, num_steps=2, test_loss=lambda p: float(p["b"][0])
    )
    np.testing.assert_allclose(path.test, [1.0, 0.7, 0.4], rtol=1e-5)
