"""Batch-norm statistics are those of the images, whatever training left behind."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.training.network.batch_norm import reestimate


class Net(nn.Module):
    """Two batch norms of different momentum, the second after a layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        x = nn.BatchNorm(not train, momentum=0.99, name="first")(x)
        x = nn.Dense(3, name="dense")(x)
        return nn.BatchNorm(not train, momentum=0.0, epsilon=1e-3, name="second")(x)


def batches(*lengths: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"image": (3 + 2 * rng.standard_normal((n, 2, 2, 1))).astype(np.float32)}
        for n in lengths
    ]


@pytest.fixture
def variables() -> Any:
    found = jax.jit(Net().init)(jax.random.key(0), batches(4)[0]["image"])
    stats = jax.tree.map(lambda a: a + 100.0, found["batch_stats"])
    return {"params": found["params"], "batch_stats": stats}


def expected(params: Any, images: list[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Float64 oracle: the mean over batches of their mean and variance."""
    sums: dict[str, Any] = {"first": [], "second": []}
    for image in images:
        x = image.reshape(len(image), -1).astype(np.float64)
        sums["first"].append((x.mean(0), x.var(0), len(x)))
        scale, bias = (np.asarray(params["first"][k]) for k in ("scale", "bias"))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias
        x = x @ np.asarray(params["dense"]["kernel"]) + np.asarray(
            params["dense"]["bias"]
        )
        sums["second"].append((x.mean(0), x.var(0), len(x)))
    return {
        name: {
            "mean": np.average([p[0] for p in parts], 0, [p[2] for p in parts]),
            "var": np.average([p[1] for p in parts], 0, [p[2] for p in parts]),
        }
        for name, parts in sums.items()
    }


@pytest.mark.parametrize("lengths", [(8,), (8, 8, 8), (8, 8, 3)])
def test_statistics_are_the_mean_over_batches(variables: Any, lengths: tuple) -> None:
    given = batches(*lengths)
    found = reestimate(Net(), variables["params"], variables["batch_stats"], given)
    oracle = expected(variables["params"], [batch["image"] for batch in given])
    assert found.keys() == oracle.keys()
    for layer, statistics in oracle.items():
        for name, value in statistics.items():
            np.testing.assert_allclose(
                found[layer][name], value, rtol=1e-4, atol=1e-5, err_msg=layer
            )


def test_one_batch_makes_evaluation_training(variables: Any) -> None:
    (batch,) = batches(16)
    stats = reestimate(Net(), variables["params"], variables["batch_stats"], [batch])
    apply = jax.jit(Net().apply, static_argnames=("train", "mutable"))
    trained, _ = apply(variables, batch["image"], train=True, mutable=("batch_stats",))
    judged = apply({**variables, "batch_stats": stats}, batch["image"])
    np.testing.assert_allclose(judged, trained, rtol=1e-3, atol=1e-4)


def test_a_network_without_batch_norm_stays() -> None:
    assert reestimate(Net(), {}, {}, []) == {}


def test_no_images_are_refused(variables: Any) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate(Net(), variables["params"], variables["batch_stats"], [])


class Fixed(nn.Module):
    """A statistic that training does not update."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        scale = self.variable("batch_stats", "scale", lambda: jnp.full(1, 7.0))
        return x * scale.value


def test_a_statistic_that_training_leaves_stays() -> None:
    stats = {"scale": jnp.full(1, 7.0)}
    np.testing.assert_array_equal(
        reestimate(Fixed(), {}, stats, batches(4))["scale"], stats["scale"]
    )
