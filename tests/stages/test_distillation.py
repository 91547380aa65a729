"""An optimizer brings the outputs of a pruned network near those wanted."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from woodfisher_jax.stages.distillation import distil


class Net(nn.Module):
    """A layer, a batch norm, a layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(not train, momentum=0.5, name="bn")(x)
        return nn.Dense(3, name="last")(nn.relu(x))


@jax.jit
def in_training(variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return Net().apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.fixture
def given() -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    dense = jax.jit(Net().init)(jax.random.key(0), x)
    wanted, _ = in_training(dense, x)
    mask = np.random.default_rng(1).random((4, 6)) < 0.7
    return {
        "params": dense["params"],
        "batch_stats": dense["batch_stats"],
        "masks": {"first/kernel": jnp.asarray(mask)},
        "batch": {"image": x, "wanted": np.asarray(wanted)},
    }


def distance(params: Any, given: dict[str, Any]) -> float:
    """E |z - z*|² / 2, normalised by the batch."""
    variables = {"params": params, "batch_stats": given["batch_stats"]}
    outputs, _ = in_training(variables, given["batch"]["image"])
    missed = np.asarray(outputs) - given["batch"]["wanted"]
    return float((missed**2).sum(-1).mean() / 2)


def run(
    given: dict[str, Any], steps: int, rate: float, frozen: bool = False
) -> tuple[Any, Any]:
    return distil(
        Net(),
        given["params"],
        given["batch_stats"],
        given["masks"],
        [given["batch"]] * steps,
        optax.sgd(rate),
        frozen=frozen,
    )


def masked_params(given: dict[str, Any]) -> Any:
    mask = given["masks"]["first/kernel"]
    first = given["params"]["first"]
    return {
        **given["params"],
        "first": {**first, "kernel": first["kernel"] * mask},
    }


def test_one_step_is_that_of_the_slope(given: dict[str, Any]) -> None:
    start = masked_params(given)
    params, _ = run(given, 1, 0.1)
    mask = np.asarray(given["masks"]["first/kernel"])
    before = np.asarray(start["first"]["kernel"], np.float64)
    step = np.zeros_like(before)
    for i, j in np.argwhere(mask):
        sides = []
        for sign in (1, -1):
            kernel = start["first"]["kernel"].at[i, j].add(sign * 1e-2)
            moved = {**start, "first": {**start["first"], "kernel": kernel}}
            sides.append(distance(moved, given))
        step[i, j] = -0.1 * (sides[0] - sides[1]) / 2e-2
    found = np.asarray(params["first"]["kernel"], np.float64) - before
    np.testing.assert_allclose(found, step, rtol=0.05, atol=2e-4)


def test_outputs_come_near_and_pruned_weights_stay_zero(given: dict[str, Any]) -> None:
    params, stats = run(given, 60, 0.1)
    start = distance(masked_params(given), given)
    assert distance(params, given) < start / 2
    mask = np.asarray(given["masks"]["first/kernel"])
    assert not np.any(np.asarray(params["first"]["kernel"])[~mask])
    assert np.all(np.asarray(params["first"]["kernel"])[mask] != 0)
    x = given["batch"]["image"] @ np.asarray(params["first"]["kernel"])
    mean = x.mean(0) + np.asarray(params["first"]["bias"])
    np.testing.assert_allclose(stats["bn"]["mean"], mean, atol=0.1)


def test_frozen_statistics_stay_and_are_what_is_fitted(given: dict[str, Any]) -> None:
    stats = {"bn": {"mean": jnp.full(6, 0.3), "var": jnp.full(6, 2.0)}}
    given["batch_stats"] = stats

    def missed(params: Any) -> float:
        variables = {"params": params, "batch_stats": stats}
        outputs = Net().apply(variables, given["batch"]["image"])
        return float(((outputs - given["batch"]["wanted"]) ** 2).mean())

    params, after = run(given, 60, 0.1, frozen=True)
    assert missed(params) < missed(masked_params(given)) / 4
    for name, value in stats["bn"].items():
        np.testing.assert_array_equal(after["bn"][name], value)


def test_a_dense_network_stays_as_it_is(given: dict[str, Any]) -> None:
    whole = given | {"masks": {"first/kernel": jnp.ones((4, 6), bool)}}
    params, _ = run(whole, 3, 0.1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        before = given["params"]
        for key in path:
            before = before[key.key]
        np.testing.assert_allclose(leaf, before, atol=1e-5)


def test_bad_batches_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        run(given, 0, 0.1)
    given["batch"]["wanted"] = given["batch"]["wanted"][:, :2]
    with pytest.raises(ValueError, match="wanted' has \\(32, 2\\)"):
        run(given, 1, 0.1)
