"""An error of a network in training mode says what to do in its framework."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import woodfisher_jax as wf
from woodfisher_jax.tracing.training_mode import explained

X = np.ones((4, 3), np.float32)


class Linen(nn.Module):
    """Dropout before batch norm."""

    drop: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=not (train and self.drop))(nn.Dense(2)(x))
        return nn.BatchNorm(use_running_average=not train)(x)


class Nnx(nnx.Module):
    """With batch norm."""

    def __init__(self) -> None:
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.dense(x))


class Equinox(eqx.Module):
    """Batch norm before dropout."""

    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self) -> None:
        self.dense = eqx.nn.Linear(3, 2, key=jax.random.key(0))
        self.norm = eqx.nn.BatchNorm(2, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x: jax.Array, state: Any) -> Any:
        x, state = self.norm(self.dense(x), state)
        return self.dropout(x), state


def linen(drop: bool = False, stats: bool = True, **options: Any) -> Any:
    model = Linen(drop)
    variables = model.init(jax.random.key(0), X, train=False)
    rest = {"batch_stats": variables["batch_stats"]} if stats else {}

    def net(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, x, train=True, **options)

    return net, variables["params"]


def in_nnx() -> Any:
    graph, params, rest = nnx.split(Nnx(), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params


def in_equinox(pass_state: bool = True, **options: Any) -> Any:
    model, state = eqx.nn.make_with_state(Equinox)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def net(params: Any, x: jax.Array) -> Any:
        model = eqx.combine(params, static)
        if not pass_state:
            return jax.vmap(model)(x)
        axes = {"in_axes": (0, None), "out_axes": (0, None)}
        return jax.vmap(model, **axes, **options)(x, state)[0]

    return net, params


CASES = {
    "train=False": linen(drop=True),
    "use_running_average=not train": linen(),
    '"batch_stats": batch_stats': linen(stats=False),
    "take the outputs alone": linen(mutable=["batch_stats"]),
    "model.eval()": in_nnx(),
    "dropout is on; take model = eqx.nn.inference_mode": in_equinox(axis_name="batch"),
    "has no name": in_equinox(),
    "the network has a state": in_equinox(pass_state=False),
}


@pytest.mark.parametrize("remedy", CASES)
def test_prune_says_what_to_do(remedy: str) -> None:
    net, params = CASES[remedy]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(net(params, x).sum(axis=-1) ** 2)

    with pytest.raises(Exception) as caught:  # noqa: PT011 - the framework's own
        wf.prune(loss_fn, params, X, sparsity=0.5)
    (note,) = (n for n in caught.value.__notes__ if n.startswith("woodfisher_jax: "))
    assert remedy in note
    assert note.endswith("(docs/batch_norm.md)")


@pytest.mark.parametrize("remedy", ["train=False", "model.eval()"])
def test_prune_outputs_says_what_to_do(remedy: str) -> None:
    net, params = CASES[remedy]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        wf.prune_outputs(net, params, X, sparsity=0.5)
    assert any(remedy in note for note in caught.value.__notes__)


def test_statistics_say_what_to_do() -> None:
    net, params = CASES["dropout is on; take model = eqx.nn.inference_mode"]
    with pytest.raises(RuntimeError, match="Dropout requires a key") as caught:
        wf.batch_norm.reestimate(lambda p, s, x: net(p, x), params, {"m": X[0]}, X)
    assert any("inference_mode" in note for note in caught.value.__notes__)


def test_a_loss_beside_its_state_is_named() -> None:
    with pytest.raises(TypeError, match="no state or metrics beside it"):
        wf.prune(lambda p, x: (jnp.mean(p["w"]), x), {"w": X}, X, sparsity=0.5)


def test_other_errors_have_no_note() -> None:
    with pytest.raises(ValueError, match="own") as caught, explained():
        raise ValueError("the user's own")
    assert not hasattr(caught.value, "__notes__")


def test_a_function_that_only_fails_under_jit_is_said_to_fail_there() -> None:
    def untraced(params: Any, x: jax.Array) -> jax.Array:
        if isinstance(x, jax.core.Tracer):
            raise ValueError("values are wanted")
        return x @ params["w"]

    params = {"w": jnp.ones((X.shape[-1], 3))}
    untraced(params, X)  # alone it does not fail
    with pytest.raises(wf.OptionError, match=r"call jax.jit\(net_fn\) on them"):
        wf.structures(untraced, params, X)
