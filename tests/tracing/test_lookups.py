"""Tables that numbers of a batch choose rows of, and numbers that may be anything."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf
from woodfisher_jax.tracing.lookups import Lookup, lookups

TOKENS = np.array([[0, 1, 2], [3, 4, 0], [1, 1, 1], [2, 0, 3]])
PARAMS = {"table": normal(0, 5, 4), "head": normal(1, 4, 5)}


def indexed(params: Any, tokens: jax.Array) -> jax.Array:
    return params["table"][tokens] @ params["head"]


def taken(params: Any, batch: Any) -> jax.Array:
    table = params["table"].astype(jnp.bfloat16)
    found = jax.jit(lambda t, i: jnp.take(t, i, axis=0))(table, batch["tokens"].T)
    return (found * batch["mask"].T[..., None]) @ params["head"]


def over_examples(params: Any, tokens: jax.Array) -> jax.Array:
    row = jax.vmap(jax.vmap(lambda token: params["table"][token]))
    return row(tokens) @ params["head"]


@pytest.mark.parametrize(
    ("net", "batch", "leaf"),
    [
        (indexed, TOKENS, ""),
        (over_examples, TOKENS, ""),
        (taken, {"mask": np.ones((4, 3), np.float32), "tokens": TOKENS}, "tokens"),
    ],
)
def test_tables_are_found(net: Any, batch: Any, leaf: str) -> None:
    assert lookups(net, PARAMS, batch) == [Lookup(leaf, 5, "table")]


@pytest.mark.parametrize(
    "index",
    [
        lambda tokens: jnp.clip(tokens, 0, 4),
        lambda tokens: jnp.where(tokens < 0, 0, tokens),
        lambda tokens: tokens + 2,
        lambda tokens: tokens[:, :-1],
    ],
)
def test_numbers_that_the_network_changes_are_not_followed(index: Any) -> None:
    assert not lookups(lambda p, t: indexed(p, index(t)), PARAMS, TOKENS)


def test_who_clips_means_what_is_beyond() -> None:
    def net(params: Any, tokens: jax.Array) -> jax.Array:
        return params["table"].at[tokens].get(mode="clip") @ params["head"]

    assert not lookups(net, PARAMS, TOKENS)
    assert not lookups(lambda p, x: x @ p["table"], PARAMS, np.ones((2, 5)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: wf.prune_layerwise(indexed, PARAMS, x, sparsity=0.5, batch_size=1),
        lambda x: wf.prune_outputs(
            lambda p, t: indexed(p, t).mean(1), PARAMS, x, sparsity=0.5
        ),
    ],
)
@pytest.mark.parametrize("wrong", [5, -1])
def test_tokens_outside_the_vocabulary_are_refused(call: Any, wrong: int) -> None:
    tokens = np.array(TOKENS)
    tokens[2, 1] = wrong
    message = (
        rf"inputs has {wrong} at \[2, 1\], which chooses a row of 'table' with 5 rows; "
        "expected whole numbers from 0 to 4"
    )
    with pytest.raises(wf.OptionError, match=message):
        call(tokens)
