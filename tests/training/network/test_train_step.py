"""A step over the whole batch, in parts, in half precision, with an average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from spread_training import Net

from woodfisher_jax.models import MLP
from woodfisher_jax.training.network.train_step import (
    Metrics,
    TrainState,
    averaged,
    averaging,
    copied,
    network,
    train_step,
)

TX = optax.sgd(0.1, momentum=0.9)
KEPT = {"fc1/kernel": np.arange(64 * 6).reshape(64, 6) % 3 > 0}


def problem(model: Any) -> tuple[TrainState, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    batch = {
        "image": random.standard_normal((12, 8, 8, 1)).astype(np.float32),
        "label": random.integers(0, 10, 12).astype(np.int32),
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"])
    masks = {k: jnp.asarray(m) for k, m in KEPT.items() if isinstance(model, MLP)}
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    return TrainState(params, stats, masks, TX.init(params)), batch


def step(
    model: Any, state: TrainState, batch: Any, stop: Any = (0,), **options: Any
) -> tuple[TrainState, Metrics]:
    flags = np.asarray(stop, np.float32)
    return train_step(
        copied(state), batch, flags, model=model, tx=TX, label_smoothing=0.1, **options
    )


def close(one: Any, other: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


MODEL = MLP((6,))


def test_a_step_needs_no_second_state() -> None:
    state, batch = problem(MODEL)
    state = averaging(copied(state), 0.5)
    settings = {"model": MODEL, "tx": TX, "label_smoothing": 0.1, "average_decay": 0.5}
    after, _ = train_step(state, batch, np.zeros(1, np.float32), **settings)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("parts", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_parts_of_a_batch_have_its_loss_and_gradient(parts: int) -> None:
    """Without batch norm, to rounding; and parts of one example too."""
    state, batch = problem(MODEL)
    whole, metrics = step(MODEL, state, batch)
    got, found = step(MODEL, state, batch, accumulation_steps=parts)
    close(got.params, whole.params, atol=1e-6)
    close(got.opt_state, whole.opt_state, atol=1e-6)
    np.testing.assert_allclose(found.loss, metrics.loss, rtol=1e-6)


@pytest.mark.slow
def test_parts_are_normalised_each_by_itself() -> None:
    """Three parts: the mean of three gradients, and three updates of the statistics."""
    model = Net()
    state, batch = problem(model)
    got, metrics = step(model, state, batch, accumulation_steps=3)
    moved, losses, stats = [], [], state.batch_stats
    for part in range(3):
        rows = jax.tree.map(lambda a, i=part: a[i::3], batch)
        after, found = step(model, state._replace(batch_stats=stats), rows)
        stats = after.batch_stats
        moved.append(after.params)
        losses.append(found.loss)
    # The first step of SGD is linear in the gradient.
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *moved)
    close(got.params, mean, atol=1e-6)
    close(got.batch_stats, stats, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-6)
    whole, _ = step(model, state, batch)
    bn = [s.batch_stats["bn"]["mean"] for s in (got, whole)]
    assert abs(bn[0] - bn[1]).max() > 1e-3


def test_pruned_weights_stay_zero_in_the_average_too() -> None:
    state, batch = problem(MODEL)
    mask = state.masks["fc1/kernel"]
    params = dict(state.params, fc1={"kernel": state.params["fc1"]["kernel"] * mask})
    state = averaging(state._replace(params=params), 0.5)
    for _ in range(3):
        state, _ = step(MODEL, state, batch, average_decay=0.5)
    for tree in (state.params, state.average["params"]):
        kernel = np.asarray(tree["fc1"]["kernel"])
        assert (kernel[~KEPT["fc1/kernel"]] == 0).all()
        assert (kernel[KEPT["fc1/kernel"]] != 0).all()


def test_the_average_is_the_recursion() -> None:
    model = Net()
    state, batch = problem(model)
    state = averaging(state, 0.75)
    expected = network(state)
    for _ in range(3):
        state, _ = step(model, state, batch, average_decay=0.75)
        expected = jax.tree.map(
            lambda a, w: 0.75 * a + 0.25 * w, expected, network(state)
        )
    close(state.average, expected, atol=1e-6)
    assert averaged(state).params is state.average["params"]
    assert averaged(state).batch_stats is state.average["batch_stats"]


def test_without_an_average_the_network_is_the_last() -> None:
    state, batch = problem(MODEL)
    assert averaging(state, 0.0).average == ()
    after, _ = step(MODEL, state, batch)
    assert after.average == ()
    assert averaged(after) is after


def test_half_precision_keeps_weights_and_statistics_in_float32() -> None:
    model = Net()
    state, batch = problem(model)
    full, expected = step(model, state, batch)
    half, metrics = step(model.clone(dtype="bfloat16"), state, batch)
    leaves = jax.tree.leaves((half._replace(masks={}), metrics.loss))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    # Eight bits of mantissa: near, and not the same.
    assert metrics.loss != expected.loss
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-2)
    close(half.params, full.params, atol=2e-2)


@pytest.mark.parametrize(("flags", "stop"), [((0, 0, 0), 0), ((0, 15, 0), 15)])
def test_every_device_hears_what_one_is_asked(flags: tuple, stop: int) -> None:
    state, batch = problem(MODEL)
    assert step(MODEL, state, batch, flags)[1].stop == stop
