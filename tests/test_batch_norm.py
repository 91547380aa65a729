"""Statistics are those of the batches, whichever framework keeps them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import woodfisher_jax as wf
from woodfisher_jax.batch_norm import MANY, reestimate

RNG = np.random.default_rng(0)
X = (3 + 2 * RNG.standard_normal((24, 4))).astype(np.float32)
BATCHES = [X[:16], X[16:]]


def averaged(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return sum(len(x) * of(x.astype(np.float64)) for x in BATCHES) / len(X)


def update(params: Any, state: Any, x: jax.Array) -> Any:
    """Running averages, one that stays, a counter and a flag."""
    y = params * x
    return {
        "mean": 0.99 * state["mean"] + 0.01 * y.mean(0),
        "var": 0.5 * state["var"] + 0.5 * y.var(0),
        "stays": state["stays"],
        "count": state["count"] + 1,
        "first": jnp.array(False),
        "key": state["key"],
    }


def given(old: float) -> Any:
    return {
        "mean": jnp.full(4, old),
        "var": jnp.full(4, old),
        "stays": jnp.array(3.0),
        "count": jnp.array(5),
        "first": jnp.array(True),
        "key": jax.random.key(0),
    }


@pytest.mark.parametrize("old", [0.0, -1e6, np.nan])
def test_any_function_is_solved_for_the_statistics_of_its_batches(old: float) -> None:
    found = reestimate(update, jnp.float32(2), given(old), BATCHES)
    mean, var = averaged(lambda x: 2 * x.mean(0)), averaged(lambda x: 4 * x.var(0))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(found["var"], var, rtol=1e-4)
    assert found["stays"] == 3
    assert found["count"] == 5 + MANY
    assert not found["first"]
    assert found["key"] == jax.random.key(0)


@pytest.mark.parametrize("channels", [4, 5000])
def test_statistics_that_are_not_finite_are_refused(channels: int) -> None:
    def broken(params: Any, state: Any, x: jax.Array) -> Any:
        return 0.9 * state + 0.1 * jnp.nan * params * x.mean()

    with pytest.raises(ValueError, match="or are not finite"):
        reestimate(broken, jnp.float32(2), jnp.ones(channels), BATCHES)


def test_one_batch_need_not_be_in_a_list() -> None:
    one = reestimate(update, jnp.float32(2), given(0.0), X)
    listed = reestimate(update, jnp.float32(2), given(0.0), [X])
    np.testing.assert_array_equal(one["mean"], listed["mean"])


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (4, 3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norms[1](self.dense(self.norms[0](x))))


def in_nnx() -> tuple[Any, Any, Callable[..., jax.Array]]:
    """The function to update with, the state, and the function to evaluate with."""
    model = Nnx()
    model.eval()
    graph, params, state, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def updated(params: Any, state: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, state, rest)
        model.set_attributes(nnx.BatchNorm, use_running_average=False)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    return params, state, updated, lambda s: nnx.merge(graph, params, s, rest)(X)


class Equinox(eqx.Module):
    """Two batch norms with a layer between them."""

    dense: eqx.nn.Linear
    norms: list[eqx.nn.BatchNorm]

    def __init__(self, mode: Any) -> None:
        self.dense = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        self.norms = [eqx.nn.BatchNorm(n, "batch", mode=mode) for n in (4, 3)]

    def __call__(self, x: jax.Array, state: Any) -> Any:
        x, state = self.norms[0](x, state)
        return self.norms[1](self.dense(x), state)


def in_equinox(mode: str = "batch") -> tuple[Any, Any, Callable[..., jax.Array]]:
    model, state = eqx.nn.make_with_state(Equinox)(mode)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def updated(params: Any, state: Any, x: jax.Array) -> Any:
        over = jax.vmap(
            eqx.combine(params, static),
            in_axes=(0, None),
            out_axes=(0, None),
            axis_name="batch",
        )
        return over(x, state)[1]

    def evaluated(state: Any) -> jax.Array:
        model = eqx.nn.inference_mode(eqx.combine(params, static))
        return jax.vmap(model, in_axes=(0, None))(X, state)[0]

    return params, state, updated, evaluated


@pytest.mark.parametrize(
    "framework", [in_nnx, pytest.param(in_equinox, marks=pytest.mark.slow)]
)
def test_one_batch_makes_evaluation_training(framework: Any) -> None:
    """So outputs have mean zero and variance one, also after few updates."""
    params, state, updated, evaluated = framework()
    for _ in range(2):
        state = jax.jit(updated)(params, state, X + 1)
    outputs = np.asarray(jax.jit(evaluated)(reestimate(updated, params, state, X)))
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(outputs.var(0), 1, rtol=1e-3)


def test_statistics_by_those_before_are_refused() -> None:
    params, state, updated, _ = in_equinox("ema")
    trained = jax.jit(updated)(params, state, X + 1)
    with pytest.raises(ValueError, match=r'normalises with the batch.*mode="batch"'):
        reestimate(updated, params, trained, BATCHES)
    # The state of the start has a flag with which the first batch normalises.
    found = reestimate(updated, params, state, BATCHES)
    mean = averaged(lambda x: x.mean(0))
    np.testing.assert_allclose(jax.tree.leaves(found)[1], mean, rtol=1e-4)


def test_another_structure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update_fn returned.*expected a state of"):
        reestimate(lambda p, s, x: [s], {}, {"mean": jnp.ones(4)}, BATCHES)


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate(update, jnp.float32(2), given(0), [])


def test_it_is_public() -> None:
    assert wf.batch_norm.reestimate is reestimate
