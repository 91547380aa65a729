"""Damping by trial is the best of those tried, on held-out examples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf

LEVELS = [10.0**power for power in range(-5, 4)]


def loss_fn(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    outputs = jnp.tanh(batch["x"] @ params["hidden"]) @ params["out"]
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=-1))


def drawn(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 10)).astype(np.float32)
    y = np.tanh(x[:, :3] * 1.5) + 0.1 * rng.normal(size=(count, 3))
    return {"x": x, "y": y.astype(np.float32)}


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(first, (10, 12)) / 3,
        "out": jax.random.normal(second, (12, 3)) / 3,
    }
    slope = jax.jit(jax.grad(loss_fn))
    for _ in range(300):
        change = slope(params, drawn(1, 200))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, change)
    return {"loss_fn": loss_fn, "params": params, "samples": drawn(1, 60)}


OPTIONS = {"method": "woodfisher", "update": "joint", "sparsity": 0.7}


@pytest.mark.slow
def test_it_finds_the_best_of_a_row_of_fixed_dampings(given: dict[str, Any]) -> None:
    held = drawn(2, 300)
    losses = {}
    for level in LEVELS:
        found = wf.prune(**given, damping=level, **OPTIONS)[0]
        losses[level] = float(loss_fn(found, held))
    best = min(losses, key=losses.__getitem__)
    assert LEVELS[0] < best < LEVELS[-1]
    for start in (best / 100, best, best * 100):
        params, masks, info = wf.prune_searched(
            **given, held_out=held, damping=start, **OPTIONS
        )
        assert info.trials[-1].damping == pytest.approx(best)
        assert info.trials[-1].measured == pytest.approx(losses[best], rel=1e-4)
        assert float(loss_fn(params, held)) == pytest.approx(losses[best], rel=1e-4)
        assert wf.sparsity(masks) == pytest.approx(0.7, abs=0.01)


@pytest.mark.slow
def test_trials_go_on_while_the_loss_falls(given: dict[str, Any]) -> None:
    shown = []

    def progress(label: str, done: int, total: int) -> None:
        if label.startswith("damping="):
            shown.append((label, done))

    _, _, info = wf.prune_searched(
        **given, held_out=drawn(2, 300), factor=3.0, progress=progress, **OPTIONS
    )
    assert shown[:2] == [("damping=auto", 0), ("damping=auto", 1)]
    assert [done for _, done in shown] == [0, 1] * len(info.trials)
    losses = [trial.measured for trial in info.trials]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) >= 3
    dampings = np.sort([trial.damping for trial in info.trials])
    np.testing.assert_allclose(dampings[1:] / dampings[:-1], 3.0, rtol=1e-4)
    best = int(np.argmin(np.abs(dampings - info.trials[-1].damping)))
    assert 0 < best < len(dampings) - 1  # Worse on either side.


@pytest.mark.slow
def test_another_measure_than_the_loss_may_decide(given: dict[str, Any]) -> None:
    dense = given["params"]

    def moved(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        del batch
        changes = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, dense)
        return sum(jax.tree.leaves(changes))

    found = {}
    for name, measure in (("loss", None), ("distance", moved)):
        params, _, info = wf.prune_searched(
            **given, held_out=drawn(2, 300), measure=measure, **OPTIONS
        )
        found[name] = info.trials[-1].damping
        expected = (measure or loss_fn)(params, drawn(2, 300))
        assert info.trials[-1].measured == pytest.approx(float(expected), rel=1e-4)
    assert found["distance"] > found["loss"]  # More damping moves the weights less.


def test_auto_is_where_it_starts(given: dict[str, Any]) -> None:
    chosen = wf.prune(**given, damping="auto", **OPTIONS)[2].dampings
    assert chosen is not None
    _, _, info = wf.prune_searched(**given, held_out=drawn(2, 300), **OPTIONS)
    start = max(found.damping for found in chosen)
    assert any(trial.damping == pytest.approx(start) for trial in info.trials)


@pytest.mark.slow
def test_what_every_trial_finds_is_warned_of_once(given: dict[str, Any]) -> None:
    unread = given["params"] | {"unread": jnp.ones((3, 2))}

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return loss_fn(params, batch) + 0 * jnp.sum(batch["y"] @ params["unread"])

    with pytest.warns(wf.PruneWarning, match="gradient for 'unread'") as said:
        _, _, info = wf.prune_searched(
            loss, unread, given["samples"], drawn(2, 300), damping=1e-3, **OPTIONS
        )
    assert len(info.trials) > 1
    assert [one.filename for one in said] == [__file__]


def test_bad_arguments_are_refused(given: dict[str, Any]) -> None:
    run = functools.partial(wf.prune_searched, held_out=drawn(2, 30), **OPTIONS)
    with pytest.raises(ValueError, match="factor=1"):
        run(**given, factor=1)
    with pytest.raises(ValueError, match="samples is an iterator"):
        run(**given | {"samples": iter([given["samples"]])})
    bad = drawn(2, 30)
    bad["y"][0] = np.nan
    with pytest.raises(ValueError, match="held_out: the measure is nan"):
        run(**given, held_out=bad)
