"""Learning rates are the formulas; pruned weights leave no trace in the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from woodfisher_jax.masked import mask_state
from woodfisher_jax.training.network import optimizer
from woodfisher_jax.trees.masks import apply_masks


def rates(name: str, epochs: int = 12, **changes: Any) -> list[float]:
    """The rate at the first step of each epoch, ten steps each."""
    settings: dict[str, Any] = {
        "steps_per_epoch": 10,
        "epochs": epochs,
        "decay_rate": 0.5,
        "decay_start_epoch": 4,
        "decay_every_epochs": 3,
        **changes,
    }
    schedule = optimizer.learning_rate(name, 0.8, **settings)
    return jax.jit(jax.vmap(schedule))(10 * np.arange(epochs)).tolist()


def test_constant() -> None:
    np.testing.assert_allclose(rates("constant"), 0.8, rtol=1e-6)


def test_step_drops_at_the_start_epoch_and_each_few_after() -> None:
    expected = 0.8 * 0.5 ** np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    np.testing.assert_allclose(rates("step"), expected, rtol=1e-6)


def test_exponential_meets_step_where_the_step_ends() -> None:
    expected = 0.8 * 0.5 ** (np.maximum(np.arange(12) - 4, 0) / 3)
    np.testing.assert_allclose(rates("exponential"), expected, rtol=1e-5)


def test_step_may_end_before_the_last_epoch() -> None:
    expected = 0.8 * 0.5 ** np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    found = rates("step", decay_end_epoch=9)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    smooth = rates("exponential", decay_end_epoch=7)
    np.testing.assert_allclose(smooth[7:], 0.4, rtol=1e-5)


def test_the_originals_resnet50_schedule_has_nine_steps() -> None:
    """torch's scheduler steps after the training of epochs 40, 46, ..., 88."""
    found = rates(
        "step",
        100,
        decay_rate=0.6,
        decay_start_epoch=41,
        decay_every_epochs=6,
        decay_end_epoch=91,
    )
    steps = [sum((e - 40) % 6 == 0 for e in range(40, min(n, 91))) for n in range(100)]
    np.testing.assert_allclose(found, 0.8 * 0.6 ** np.array(steps), rtol=1e-5)
    assert steps[-1] == 9


def test_multistep_drops_at_its_epochs() -> None:
    expected = 0.8 * 0.5 ** np.array([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    found = rates("multistep", decay_at_epochs=(2, 7))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_linear_goes_straight_to_its_end() -> None:
    expected = 0.8 + (0.2 - 0.8) * np.arange(12) / 12
    np.testing.assert_allclose(rates("linear", final=0.2), expected, rtol=1e-5)


def test_cosine_restarts_each_period() -> None:
    one = 0.2 + 0.3 * (1 + np.cos(np.pi * np.arange(3) / 3))
    found = rates("cosine_restarts", final=0.2)
    np.testing.assert_allclose(found, np.tile(one, 4), rtol=1e-5)


def test_cyclic_rises_and_falls_each_period() -> None:
    found = rates("cyclic", final=0.2, decay_every_epochs=4)
    np.testing.assert_allclose(found, np.tile([0.2, 0.5, 0.8, 0.5], 3), rtol=1e-5)


def test_one_cycle_peaks_once_at_the_rate() -> None:
    found = rates("one_cycle", 40)
    peak = int(np.argmax(found))
    assert found[peak] == pytest.approx(0.8, rel=1e-3)
    assert (np.diff(found[: peak + 1]) > 0).all()
    assert (np.diff(found[peak:]) < 0).all()


def test_cosine_falls_to_nothing() -> None:
    expected = 0.4 * (1 + np.cos(np.pi * np.arange(12) / 12))
    np.testing.assert_allclose(rates("cosine"), expected, rtol=1e-5)


def test_a_warm_up_multiplies_the_schedule() -> None:
    schedule = optimizer.learning_rate("cosine", 0.8, steps_per_epoch=10, epochs=4)
    warm = optimizer.warm_up(schedule, 20)
    for step in (0, 9, 19, 20, 39):
        factor = min(1, (step + 1) / 20)
        np.testing.assert_allclose(warm(step), factor * schedule(step), rtol=1e-6)
    assert optimizer.warm_up(schedule, 0) is schedule


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_weight_decay_may_leave_all_but_kernels_alone(name: str) -> None:
    """With no gradient, what decays is what moves."""
    params = {
        "fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "scale": jnp.ones(1),
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer.make_optimizer(
        name, optax.constant_schedule(0.1), 0.5, kernels_only=True
    )
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    assert (updates["fc"]["kernel"] < 0).all()
    assert not updates["fc"]["bias"].any()
    assert not updates["scale"].any()
    assert optimizer.kernels(params) == {
        "fc": {"kernel": True, "bias": False},
        "scale": False,
    }


def test_an_optimizer_that_cannot_leave_weights_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels_only: novograd"):
        optimizer.make_optimizer(
            "novograd", optax.constant_schedule(0.1), 0.5, kernels_only=True
        )


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule='lambda'.*cosine"):
        rates("lambda")


RATE = optax.constant_schedule(0.1)


def test_sgd_is_pytorchs() -> None:
    """v <- momentum v + (g + decay w); w <- w - lr v."""
    tx = optimizer.make_optimizer("sgd", RATE, 0.01)
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


def test_weight_decay_is_the_optimizers_own_where_it_has_one() -> None:
    """adamw decays by lr · decay · w on a zero gradient; adam takes it for one."""
    params = jnp.array([2.0, -4.0])
    for name, expected in (("adamw", -0.1 * 0.01 * params), ("adam", [-0.1, 0.1])):
        tx = optimizer.make_optimizer(name, RATE, 0.01)
        updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_settings_are_optaxs() -> None:
    params, gradient = jnp.ones(3), jnp.array([1.0, 2.0, -3.0])
    tx = optimizer.make_optimizer("sgd", RATE, settings={"nesterov": True})
    expected = optax.sgd(RATE, momentum=0.9, nesterov=True)
    np.testing.assert_array_equal(
        tx.update(gradient, tx.init(params), params)[0],
        expected.update(gradient, expected.init(params), params)[0],
    )


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sgd", {"nestrov": True}, "sgd has no option 'nestrov'.*mean 'nesterov'"),
        ("adamw", {"weight_decay": 0.1}, "no option 'weight_decay'.*has b1, b2"),
        ("sgd", {"momentum": 1.0}, r"momentum=1.0; expected a number in \[0, 1\)"),
        ("sgd", {"momentum": "x"}, r"momentum='x'; expected a number in \[0, 1\)"),
        ("adam", {"eps": (1,)}, r"eps=\(1,\); expected a finite number"),
        ("adam", {"eps": float("nan")}, "eps=nan; expected a finite number"),
        ("sgd", {"nesterov": "x"}, "nesterov='x'; expected True or False"),
        ("adam", {"mu_dtype": "x"}, "mu_dtype='x'; expected 'float32'"),
    ],
)
def test_what_optax_lacks_is_refused(name: str, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimizer.check_settings(name, settings)


EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("sgd", "adamw")))
    for name in optimizer.OPTIMIZERS
]
PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
MASK = jnp.array([[True, False, True], [False, True, True]])


@pytest.mark.parametrize("name", EVERY)
def test_mask_state_clears_what_belongs_to_pruned_weights_only(name: str) -> None:
    tx = optimizer.make_optimizer(name, RATE, 1e-4)
    gradients = jax.tree.map(lambda a: 0.5 * a, PARAMS)
    _, state = jax.jit(tx.update)(gradients, tx.init(PARAMS), PARAMS)
    masked = mask_state(state, PARAMS, {"a/kernel": MASK})
    assert jax.tree.structure(masked) == jax.tree.structure(state)
    kernels = 0
    for before, after in zip(
        jax.tree.leaves(state), jax.tree.leaves(masked), strict=True
    ):
        assert before.dtype == after.dtype
        is_kernel = before.shape == (2, 3)
        kernels += is_kernel
        expected = np.where(MASK, before, 0) if is_kernel else before
        np.testing.assert_array_equal(after, expected)
    assert kernels > 0 or name == "sgd"


@pytest.mark.parametrize("name", EVERY)
def test_pruned_weights_stay_zero_and_state_without_decay_is_alike(name: str) -> None:
    masks = {"a/kernel": MASK}
    tx = optimizer.make_optimizer(name, RATE, 1e-2)
    bare = optimizer.make_optimizer(name, RATE, 0.0)
    params = apply_masks(PARAMS, masks)
    state = mask_state(tx.init(params), params, masks)
    assert jax.tree.structure(state) == jax.tree.structure(bare.init(params))
    decaying, rest = jax.jit(tx.update), jax.jit(bare.update)
    for update in (decaying, decaying, rest):
        updates, state = update(params, state, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        np.testing.assert_array_equal(updates["a"]["kernel"] == 0, ~MASK)
