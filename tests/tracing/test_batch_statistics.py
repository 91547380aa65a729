"""A network that normalises with its batch, or drops at random, is told from others."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf
from woodfisher_jax.tracing.batch_statistics import training_mode

X = np.asarray(normal(0, 6, 5))
PARAMS = {"a": normal(1, 5, 4), "b": normal(2, 4, 3), "layers": normal(3, 2, 4, 4)}
STATISTICS = "normalises with the mean and variance of the batch"
DROPOUT = "sets activations to zero at random"


def normalised(x: jax.Array, axis: int, train: Any = True) -> jax.Array:
    mean = jnp.where(train, x.mean(axis, keepdims=True), 0.0)
    variance = jnp.where(train, x.var(axis, keepdims=True), 1.0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def by_batch(params: Any, x: jax.Array) -> jax.Array:
    return normalised(x @ params["a"], 0) @ params["b"]


def by_example(params: Any, x: jax.Array) -> jax.Array:
    return normalised(x @ params["a"], 1) @ params["b"]


def by_batch_in_a_scan(params: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, w: jax.Array) -> Any:
        return jax.nn.relu(normalised(h @ w, 0)), None

    return jax.lax.scan(body, x @ params["a"], params["layers"])[0]


def as_a_flag_says(train: bool) -> Any:
    def net(params: Any, x: jax.Array) -> jax.Array:
        return normalised(x @ params["a"], 0, jnp.array(train)) @ params["b"]

    return net


def of_two(params: Any, x: jax.Array) -> jax.Array:
    return by_batch(params, x.reshape(2, 5))


def centred(params: Any, x: jax.Array) -> jax.Array:
    """Examples are compared, and none is scaled."""
    z = x @ params["a"]
    return z / jnp.linalg.norm(z, axis=1, keepdims=True) @ z.T


def dropped(params: Any, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ params["a"])
    stays = jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)
    return jnp.where(stays, 2 * h, 0) @ params["b"]


def multiplied(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["a"]
    stays = jax.random.bernoulli(jax.random.key(0), 0.7, h.shape)
    return h * stays.astype(h.dtype) / 0.7 @ params["b"]


def drawn(params: Any, x: jax.Array) -> jax.Array:
    """A sample of a normal distribution: no number of it is zero."""
    h = x @ params["a"]
    return (h + jnp.exp(h) * jax.random.normal(jax.random.key(0), h.shape)) @ params[
        "b"
    ]


def noisy(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["a"]
    return (h + jax.random.normal(jax.random.key(0), h.shape)) @ params["b"]


def loss_of(net: Any) -> Any:
    return lambda params, x: jnp.mean(net(params, x) ** 2)


def whitened(params: Any, x: jax.Array) -> jax.Array:
    """A loss that compares outputs over the batch, without weights afterwards."""
    z = normalised(x @ params["a"], 0)
    return jnp.sum((z.T @ z / len(z) - jnp.eye(4)) ** 2)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (by_batch, STATISTICS),
        (by_batch_in_a_scan, STATISTICS),
        (as_a_flag_says(True), STATISTICS),
        (dropped, DROPOUT),
        (multiplied, DROPOUT),
    ],
)
def test_training_mode_is_found(net: Any, said: str) -> None:
    (text,) = training_mode("net_fn", net, PARAMS, X[:2])
    assert text.startswith(f"net_fn is in training mode: it {said}")
    assert all(way in text for way in ("train=False", "model.eval()", "inference_mode"))


@pytest.mark.parametrize(
    "net", [by_example, as_a_flag_says(False), of_two, centred, noisy, drawn]
)
def test_other_networks_are_not_taken_for_it(net: Any) -> None:
    assert not training_mode("net_fn", net, PARAMS, X[:2])


def test_of_one_example_or_of_shapes_nothing_is_said() -> None:
    assert not training_mode("net_fn", by_batch, PARAMS, X[:1])
    shapes = jax.eval_shape(lambda: PARAMS)
    assert not training_mode("net_fn", by_batch, shapes, X[:2])


def test_a_loss_may_compare_examples() -> None:
    def found(loss: Any) -> list[str]:
        return training_mode("loss_fn", loss, PARAMS, X[:2], outputs=False)

    assert found(loss_of(by_batch))
    assert not found(loss_of(by_example))
    assert not found(whitened)
    assert not found(lambda params, x: jnp.sqrt(loss_of(by_example)(params, x)))


class Linen(nn.Module):
    """A convolution with batch norm: one image has a variance too."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3,))(x))
        return nn.Dense(2)(nn.relu(x).mean(1))


def of_linen(train: bool) -> tuple[Any, Any, np.ndarray]:
    model, x = Linen(), np.asarray(normal(4, 6, 5, 2))
    variables = model.init(jax.random.key(0), x, train=False)
    rest = {"batch_stats": variables["batch_stats"]}

    def net(params: Any, x: jax.Array) -> Any:
        given = {"params": params, **rest}
        return model.apply(given, x, train=train, mutable=["batch_stats"])[0]

    return net, variables["params"], x


def test_batch_norm_of_linen() -> None:
    net, params, x = of_linen(train=True)
    with pytest.warns(wf.PruneWarning, match=f"loss_fn is in .* it {STATISTICS}"):
        *_, info = wf.prune(loss_of(net), params, x, sparsity=0.5, method="diagfisher")
    assert STATISTICS in info.warnings[0]
    net, params, x = of_linen(train=False)
    assert not training_mode("loss_fn", loss_of(net), params, x[:2], outputs=False)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_equinox(train: bool) -> None:
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    norm = eqx.nn.inference_mode(norm, not train)

    def net(params: Any, x: jax.Array) -> jax.Array:
        over_batch = jax.vmap(norm, (0, None), (0, None), axis_name="batch")
        return over_batch(x @ params["a"], state)[0] @ params["b"]

    assert bool(training_mode("net_fn", net, PARAMS, X[:2])) == train


@pytest.mark.parametrize(
    "call",
    [
        lambda *given: wf.prune_layerwise(*given, sparsity=0.5),
        lambda *given: wf.prune_outputs(*given, sparsity=0.5),
        lambda *given: wf.shrink(*given[:2], wf.init_masks(given[1]), given[2]),
    ],
    ids=["prune_layerwise", "prune_outputs", "shrink"],
)
def test_every_call_warns_before_it_starts(call: Callable[..., object]) -> None:
    params = {"a": PARAMS["a"], "b": PARAMS["b"]}
    warned = pytest.raises(wf.PruneWarning, match=f"net_fn is in training .*{DROPOUT}")
    # Ended by its own warning, a call takes no time if that comes first.
    with warnings.catch_warnings(), warned:
        warnings.simplefilter("error", wf.PruneWarning)
        call(dropped, params, X)
