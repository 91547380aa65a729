"""Cross entropy against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.models import build_model
from woodfisher_jax.training.network.objective import (
    cross_entropy,
    frozen_errors,
    frozen_loss,
    linearized_loss,
    macs_per_weight,
)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_the_formula(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((7, 5)), rng.integers(0, 5, 7)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(1 - smoothing) * logp[np.arange(7), labels] - smoothing * logp.mean(1)
    found = cross_entropy(jnp.float32(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_uniform_logits_cost_the_logarithm_of_the_classes() -> None:
    found = cross_entropy(jnp.zeros((2, 8)), jnp.array([0, 7]), 0.3)
    np.testing.assert_allclose(found, np.log(8), rtol=1e-6)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    logits, labels = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([1])
    np.testing.assert_allclose(
        cross_entropy(logits + 40.0, labels), cross_entropy(logits, labels), rtol=1e-5
    )


def test_the_frozen_loss_takes_smoothing() -> None:
    model = build_model("mlp", hidden=(4,))
    image = jax.random.normal(jax.random.key(0), (3, 8))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    batch = {"image": image, "label": jnp.array([0, 3, 9])}
    found = jax.jit(frozen_loss(model, {}, 0.2))(variables["params"], batch)
    logits = jax.jit(model.apply)(variables, image)
    expected = jax.jit(cross_entropy)(logits, batch["label"], 0.2)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    plain = jax.jit(frozen_loss(model, {}))(variables["params"], batch)
    assert abs(float(plain) - float(found)) > 1e-3


def test_the_linearized_loss_is_exact_where_the_logits_are_linear() -> None:
    model = build_model("mlp", hidden=(4,))
    image = jax.random.normal(jax.random.key(0), (6, 8))
    params = jax.jit(model.init)(jax.random.key(1), image)["params"]
    batch = {"image": image, "label": jnp.array([0, 3, 9, 1, 2, 5])}
    zeros = jax.tree.map(np.zeros_like, params)
    linear_loss = jax.jit(linearized_loss(model, {}, params, 0.1))
    loss = jax.jit(frozen_loss(model, {}, 0.1))
    for layer, linear in (("fc2", True), ("fc1", False)):
        step = zeros | {layer: jax.tree.map(lambda a: -1.5 * a, params[layer])}
        after = jax.tree.map(np.add, params, step)
        found, expected = linear_loss(step, batch), loss(after, batch)
        # A unit whose sign turns leaves the linear model of the first layer.
        assert bool(np.isclose(found, expected, rtol=1e-5)) is linear


def test_the_frozen_errors_are_those_of_predictions() -> None:
    model = build_model("mlp", hidden=(4,))
    image = jax.random.normal(jax.random.key(0), (8, 8))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    right = np.argmax(jax.jit(model.apply)(variables, image), axis=-1)
    errors = jax.jit(frozen_errors(model, {}))
    for wrong in (0, 3, 8):
        label = np.where(np.arange(8) < wrong, (right + 1) % 10, right)
        found = errors(variables["params"], {"image": image, "label": label})
        assert float(found) == wrong / 8


def test_new_batch_statistics_do_not_compile_again() -> None:
    model = build_model("resnet20")
    image = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    filled = lambda tree, value: jax.tree.map(  # noqa: E731
        lambda a: jnp.asarray(np.full(a.shape, value, np.float32)), tree
    )
    params = filled(variables["params"], 0.01)
    stats, other = (filled(variables["batch_stats"], n) for n in (1, 2))
    batch = {"image": image + 1.0, "label": jnp.array([0, 1])}
    traces = []

    @jax.jit
    def value(loss_fn, params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    value(frozen_loss(model, stats), params, batch)
    value(frozen_loss(model, other), params, batch)
    assert len(traces) == 1


def test_macs_of_a_weight_are_its_uses_for_one_image() -> None:
    model = build_model("resnet20")
    image = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    costs = macs_per_weight(model, variables, (32, 32, 3))
    assert costs["conv1/kernel"] == 32 * 32
    assert costs["layer2/block0/conv1/kernel"] == 16 * 16
    assert costs["fc/kernel"] == 1
    assert not [path for path in costs if path.endswith(("bias", "scale"))]
