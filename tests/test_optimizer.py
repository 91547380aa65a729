"""Learning rates are the formulas; pruned weights leave no trace in the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from woodfisher_jax import optimizer


def rates(name: str, epochs: int = 12, **changes: float) -> list[float]:
    """The rate at the first step of each epoch, ten steps each."""
    settings = {
        "steps_per_epoch": 10,
        "epochs": epochs,
        "decay_rate": 0.5,
        "decay_start_epoch": 4,
        "decay_every_epochs": 3,
        **changes,
    }
    schedule = optimizer.learning_rate(name, 0.8, **settings)
    return [float(schedule(10 * epoch)) for epoch in range(epochs)]


def test_constant() -> None:
    np.testing.assert_allclose(rates("constant"), 0.8, rtol=1e-6)


def test_step_drops_at_the_start_epoch_and_each_few_after() -> None:
    expected = 0.8 * 0.5 ** np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    np.testing.assert_allclose(rates("step"), expected, rtol=1e-6)


def test_exponential_meets_step_where_the_step_ends() -> None:
    expected = 0.8 * 0.5 ** (np.maximum(np.arange(12) - 4, 0) / 3)
    np.testing.assert_allclose(rates("exponential"), expected, rtol=1e-5)


def test_cosine_falls_to_nothing() -> None:
    expected = 0.4 * (1 + np.cos(np.pi * np.arange(12) / 12))
    np.testing.assert_allclose(rates("cosine"), expected, rtol=1e-5)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule='linear'.*cosine"):
        rates("linear")


def test_sgd_is_pytorchs() -> None:
    """v <- momentum v + (g + decay w); w <- w - lr v."""
    tx = optimizer.sgd(optax.constant_schedule(0.1), 0.9, 0.01)
    rng = np.random.default_rng(0)
    w = rng.standard_normal(5)
    params = jnp.float32(w)
    state, v = tx.init(params), np.zeros(5)
    for _ in range(4):
        g = rng.standard_normal(5)
        v = 0.9 * v + g + 0.01 * w
        w = w - 0.1 * v
        updates, state = tx.update(jnp.float32(g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, w, rtol=1e-6)


def test_mask_state_clears_the_momentum_of_pruned_weights_only() -> None:
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    tx = optimizer.sgd(optax.constant_schedule(0.1), 0.9, 0.0)
    _, state = tx.update(params, tx.init(params), params)
    mask = jnp.array([[True, False, True], [False, True, True]])
    masked = optimizer.mask_state(tx, state, params, {"a/kernel": mask})
    (trace,) = [
        s.trace
        for s in jax.tree.leaves(
            masked, is_leaf=lambda s: isinstance(s, optax.TraceState)
        )
        if isinstance(s, optax.TraceState)
    ]
    np.testing.assert_array_equal(trace["a"]["kernel"], mask.astype(np.float32))
    np.testing.assert_array_equal(trace["a"]["bias"], np.ones(3))
    assert jax.tree.structure(masked) == jax.tree.structure(state)
