"""A pruning step takes its arguments in any form, or says which it expects."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf

PARAMS = {"w": normal(0, 5, 3), "b": jnp.ones(3)}
X = np.asarray(normal(1, 6, 5))
MASKS = {"w": jnp.arange(15).reshape(5, 3) % 3 > 0}


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - 1) ** 2)


def of_array(params: Any, x: Any) -> jax.Array:
    return loss(params, {"x": x})


def assert_same(one: Any, other: Any) -> None:
    """Parameters and masks of two steps are identical."""
    jax.tree.map(np.testing.assert_array_equal, one[:2], other[:2])


def test_masks_as_a_tree() -> None:
    expected = wf.prune(of_array, PARAMS, X, sparsity=0.6, masks=MASKS)
    for tree in (wf.masks_tree(PARAMS, MASKS), {"w": MASKS["w"], "b": None}):
        found = wf.prune(of_array, PARAMS, X, sparsity=0.6, masks=tree)
        assert_same(found, expected)
        assert list(found[1]) == ["w"]


def test_numbers_of_jax_and_numpy() -> None:
    expected = wf.prune(
        of_array, PARAMS, X, sparsity=0.5, damping=0.25, num_samples=4, recompute=1
    )
    for kind in (jnp.asarray, np.asarray):
        found = wf.prune(
            of_array,
            PARAMS,
            X,
            sparsity=kind(0.5),
            damping=kind(0.25, np.float32),
            num_samples=kind(4),
            recompute=kind(1),
        )
        assert_same(found, expected)


class Encoding(collections.UserDict):
    """A mapping that JAX does not know."""


def test_samples_in_a_mapping_that_is_no_dict() -> None:
    expected = wf.prune(loss, PARAMS, {"x": X}, sparsity=0.5)
    assert_same(wf.prune(loss, PARAMS, Encoding(x=X), sparsity=0.5), expected)


def test_a_generator_of_two_arrays_is_two_batches() -> None:
    expected = wf.prune(of_array, PARAMS, X, sparsity=0.5, num_samples=6)
    halves = (half for half in (X[:3], X[3:]))
    assert_same(wf.prune(of_array, PARAMS, halves, sparsity=0.5), expected)


@pytest.mark.parametrize(
    "method",
    [
        "diagfisher",
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in ("woodfisherblock", "woodtaylor", "naivehess", "kfac")
        ),
    ],
)
def test_samples_with_typed_random_keys(method: str) -> None:
    keys = jax.random.split(jax.random.key(2), 6)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (5,)))(keys)

    def dropped(params: Any, batch: Any) -> jax.Array:
        masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (5,)))(batch[1])
        return of_array(params, batch[0] * masks)

    def run(loss: Any, samples: Any) -> Any:
        return wf.prune(loss, PARAMS, samples, sparsity=0.5, method=method)

    assert_same(run(dropped, (X, keys)), run(of_array, X * np.asarray(kept)))


def test_under_jit_one_sentence_says_what_to_call() -> None:
    def pruned(params: Any, x: Any, sparsity: Any = 0.5) -> Any:
        return wf.prune(of_array, params, x, sparsity=sparsity)[0]

    for call in (
        lambda: jax.jit(pruned)(PARAMS, X),
        lambda: jax.jit(lambda x: pruned(PARAMS, x))(X),
        lambda: jax.jit(lambda s: pruned(PARAMS, X, s))(0.5),
        lambda: jax.jit(lambda: pruned(PARAMS, X))(),
        lambda: jax.vmap(pruned, (0, None))(jax.tree.map(lambda a: a[None], PARAMS), X),
        lambda: jax.jit(lambda: wf.plan_pruning(of_array, PARAMS, X, sparsity=0.5))(),
    ):
        with pytest.raises(
            TypeError, match=r"wf\.pl?\w+ cannot run under jit.*wf\.step"
        ):
            call()
