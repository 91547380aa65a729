"""Accuracy counts every test example once."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax import data, models
from woodfisher_jax.training.evaluate import evaluate


@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluate_is_counting(batch_size: int) -> None:
    dataset = data.load("digits")
    model = models.build_model("mlp", hidden=(32,))
    rng = np.random.default_rng(0)
    params = {
        "fc1": {"kernel": jnp.float32(rng.standard_normal((64, 32)))},
        "fc2": {"kernel": jnp.float32(rng.standard_normal((32, 10)))},
    }
    x = dataset.test.images.reshape(-1, 64) / dataset.scale
    x = ((x - dataset.mean[0]) / dataset.std[0]).astype(np.float64)
    z = np.maximum(x @ np.float64(params["fc1"]["kernel"]), 0)
    z = z @ np.float64(params["fc2"]["kernel"])
    labels = dataset.test.labels
    rank = (z > z[np.arange(len(z)), labels][:, None]).sum(1)
    logp = z - z.max(1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(1, keepdims=True))
    found = evaluate(model, params, {}, dataset, batch_size=batch_size)
    assert found["top1"] == pytest.approx(100 * np.mean(rank < 1), abs=1e-4)
    assert found["top5"] == pytest.approx(100 * np.mean(rank < 5), abs=1e-4)
    assert found["loss"] == pytest.approx(
        -np.mean(logp[np.arange(len(z)), labels]), rel=1e-5
    )


def test_top5_of_few_classes() -> None:
    dataset = data.load("digits")
    model = models.build_model("mlp", hidden=(), num_classes=3)
    params = {"fc1": {"kernel": jnp.ones((64, 3))}}
    kept = dataset.test.labels < 3
    three = dataset._replace(
        test=data.Split(dataset.test.images[kept], dataset.test.labels[kept])
    )
    assert evaluate(model, params, {}, three)["top5"] == 100.0
