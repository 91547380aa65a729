"""Roles of axes found in the jaxpr of small functions; nothing is executed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from traced_programs import IMAGES, B, C, D, H, S, X, attention, ones, roles

import woodfisher_jax as wf
from woodfisher_jax.tracing.axes import find_axes, traced
from woodfisher_jax.trees.axes import WeightAxes

# ------------------------------------------------------------------------------ layers

LINEN: dict[str, tuple[nn.Module, jax.Array, str, tuple[int, ...]]] = {
    "dense": (nn.Dense(5), X, "io", (C, 5)),
    "dense general": (nn.DenseGeneral((4, 5), axis=(-2, -1)), X, "iioo", (S, C, 4, 5)),
    "conv": (nn.Conv(5, (3, 3)), IMAGES, "kkio", (3, 3, 3, 5)),
    "grouped": (
        nn.Conv(6, (3, 3), feature_group_count=3),
        IMAGES,
        "kkio",
        (3, 3, 1, 6),
    ),
    "transposed": (nn.ConvTranspose(5, (3, 3)), IMAGES, "kkio", (3, 3, 3, 5)),
    "transposed kernel": (
        nn.ConvTranspose(5, (3, 3), transpose_kernel=True),
        IMAGES,
        "kkoi",
        (3, 3, 5, 3),
    ),
}


@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen(name: str) -> None:
    module, x, letters, shape = LINEN[name]
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    found = find_axes(lambda p, x: module.apply({"params": p}, x), params, x)
    assert found == {"kernel": WeightAxes(shape, letters)}


def test_attention_of_linen() -> None:
    module = nn.MultiHeadDotProductAttention(num_heads=H)
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    found = find_axes(lambda p, x: module.apply({"params": p}, x), params, X)
    assert {path.split("/")[0]: axes[:3] for path, axes in found.items()} == {
        **dict.fromkeys(("query", "key", "value"), ((C, H, D), "ioo", (1,))),
        "out": ((H, D, C), "iio", (0,)),
    }
    assert len({axes.attention for axes in found.values()}) == 1


def test_layers_of_nnx() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, C, (3, 3), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(H, C, decode=False, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.attention(self.conv(x).reshape(2, 64, C))

    graph, state = nnx.split(Net())
    found = find_axes(lambda p, x: nnx.merge(graph, p)(x), state, IMAGES)
    assert {path: axes.roles for path, axes in found.items()} == {
        "attention/key/kernel/value": "ioo",
        "attention/out/kernel/value": "iio",
        "attention/query/kernel/value": "ioo",
        "attention/value/kernel/value": "ioo",
        "conv/kernel/value": "kkio",
    }


class _Self(eqx.Module):
    layer: eqx.nn.MultiheadAttention

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x, x, x)


EQUINOX: dict[str, tuple[Callable[[jax.Array], Any], jax.Array, set[str]]] = {
    "linear": (lambda key: eqx.nn.Linear(C, 5, key=key), X[0], {"oi"}),
    "conv": (lambda key: eqx.nn.Conv2d(4, 5, 3, key=key), ones(2, 4, 8, 8), {"oikk"}),
    "transposed": (
        lambda key: eqx.nn.ConvTranspose2d(4, 5, 3, key=key),
        ones(2, 4, 8, 8),
        {"oikk"},
    ),
    "attention": (
        lambda key: _Self(eqx.nn.MultiheadAttention(H, C, key=key)),
        X,
        {"ooi", "oii"},
    ),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_layers_of_equinox(name: str) -> None:
    make, x, letters = EQUINOX[name]
    params, rest = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)
    net = lambda p, x: jax.vmap(eqx.combine(p, rest))(x)  # noqa: E731
    assert set(roles(net, params, x).values()) == letters


def test_lstm_has_a_product_of_inputs_and_one_of_its_state() -> None:
    module = nn.RNN(nn.OptimizedLSTMCell(5))
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    found = roles(lambda p, x: module.apply({"params": p}, x), params, X)
    assert len(found) == 8
    assert set(found.values()) == {"io"}


# --------------------------------------------------------------------------- attention


def _out(p: Any, qkv: Any) -> jax.Array:
    return attention(*(a.reshape(B, S, H, D) for a in qkv)) @ p["o"]


FUSED: dict[str, tuple[Any, tuple[int, ...], WeightAxes]] = {
    "[3, H, D] outputs": (
        lambda p, x: _out(p, jnp.split(x @ p["qkv"], 3, -1)),
        (C, 3 * C),
        WeightAxes((C, 3, H, D), "iooo", (2,), "o"),
    ),
    "[H, 3, D] outputs": (
        lambda p, x: _out(p, jnp.moveaxis((x @ p["qkv"]).reshape(B, S, H, 3, D), 3, 0)),
        (C, 3 * C),
        WeightAxes((C, H, 3 * D), "ioo", (1,), "o"),
    ),
    "[3, H, D, C]": (
        lambda p, x: _out(p, jnp.einsum("bsc,thdc->tbshd", x, p["qkv"])),
        (3, H, D, C),
        WeightAxes((3, H, D, C), "oooi", (1,), "o"),
    ),
    "[H, D, 3, C]": (
        lambda p, x: _out(p, jnp.einsum("bsc,hdtc->tbshd", x, p["qkv"])),
        (H, D, 3, C),
        WeightAxes((H, D, 3, C), "oooi", (0,), "o"),
    ),
    "sliced by hand": (
        lambda p, x: _out(
            p, [(x @ p["qkv"])[..., i * C : i * C + C] for i in range(3)]
        ),
        (C, 3 * C),
        WeightAxes((C, 3, H, D), "iooo", (2,), "o"),
    ),
    "the weight is sliced": (
        lambda p, x: _out(p, [x @ w for w in jnp.split(p["qkv"], 3, 1)]),
        (C, 3 * C),
        WeightAxes((C, 3, H, D), "iooo", (2,), "o"),
    ),
    "the weight is sliced, outputs first": (
        lambda p, x: _out(p, [x @ p["qkv"][i * C : i * C + C].T for i in range(3)]),
        (3 * C, C),
        WeightAxes((3, H, D, C), "oooi", (1,), "o"),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name: str) -> None:
    net, shape, axes = FUSED[name]
    found = find_axes(net, {"qkv": ones(*shape), "o": ones(C, C)}, X)
    assert found == {"o": WeightAxes((H, D, C), "iio", (0,), "o"), "qkv": axes}


SEPARATE = {name: ones(C, C) for name in "qkvo"}


def _rotary(p: Any, x: jax.Array) -> jax.Array:
    def turned(a: jax.Array) -> jax.Array:
        left, right = jnp.split(a, 2, -1)
        angle = jnp.arange(S)[:, None, None] * jnp.arange(D // 2)
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([left * c - right * s, left * s + right * c], -1)

    q, k, v = ((x @ p[n]).reshape(B, S, H, D) for n in "qkv")
    return attention(turned(q), turned(k), v) @ p["o"]


@pytest.mark.parametrize(
    "net",
    [
        lambda p, x: _out(p, [x @ p[n] for n in "qkv"]),
        lambda p, x: (
            jax.nn.dot_product_attention(
                *((x @ p[n]).reshape(B, S, H, D) for n in "qkv")
            ).reshape(B, S, C)
            @ p["o"]
        ),
        _rotary,
    ],
    ids=["plain", "dot_product_attention", "rotary"],
)
def test_heads_are_kept_apart_by_both_products(net: Any) -> None:
    found = find_axes(net, SEPARATE, X)
    for name in "qkv":
        assert found[name][:3] == ((C, H, D), "ioo", (1,))
    assert found["o"][:3] == ((H, D, C), "iio", (0,))
    assert len({axes.attention for axes in found.values()}) == 1


def test_heads_of_one_size_with_everything_else() -> None:
    def net(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = ((x @ p[n]).reshape(4, 4, 2, 2) for n in "qkv")
        return jax.nn.dot_product_attention(q, k, v).reshape(4, 4, 4) @ p["o"]

    found = find_axes(net, {n: ones(4, 4) for n in "qkvo"}, ones(4, 4, 4))
    assert {axes[:3] for axes in found.values()} == {
        ((4, 2, 2), "ioo", (1,)),
        ((2, 2, 4), "iio", (0,)),
    }


GROUPED: dict[str, Any] = {
    "repeat": lambda q, k, v: attention(q, *(jnp.repeat(a, 2, axis=2) for a in (k, v))),
    "dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v
    ).reshape(B, S, C),
}


@pytest.mark.parametrize("name", GROUPED)
def test_queries_that_share_keys_go_together(name: str) -> None:
    def net(p: Any, x: jax.Array) -> jax.Array:
        q = (x @ p["q"]).reshape(B, S, H, D)
        k, v = ((x @ p[n]).reshape(B, S, 2, D) for n in "kv")
        return GROUPED[name](q, k, v) @ p["o"]

    params = {"q": ones(C, C), "k": ones(C, 16), "v": ones(C, 16), "o": ones(C, C)}
    found = find_axes(net, params, X)
    assert found["q"][:3] == ((C, 2, 16), "ioo", (1,))
    assert found["k"][:3] == found["v"][:3] == ((C, 2, 8), "ioo", (1,))
    assert found["o"][:3] == ((2, 16, C), "iio", (0,))


@pytest.mark.parametrize("before", [True, False])
def test_heads_that_are_mixed_count_nothing(before: bool) -> None:
    """Scores of one head are sums over all: a head of the queries is no head of v."""

    def net(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("bti,ihd->bhtd", x, p[n]) for n in "qkv")
        scores = q @ k.swapaxes(-1, -2)
        if before:
            scores = jax.nn.softmax(jnp.einsum("bhqk,hg->bgqk", scores, p["mix"]))
        else:
            scores = jnp.einsum("bhqk,hg->bgqk", jax.nn.softmax(scores), p["mix"])
        return jnp.einsum("bgqd,gdo->bqo", scores @ v, p["o"])

    params = {n: ones(C, H, D) for n in "qkv"}
    params |= {"mix": ones(H, H), "o": ones(H, D, C)}
    found = find_axes(net, params, X)
    assert {axes.roles for axes in found.values()} == {"ioo", "iio", "io"}
    assert not any(axes.heads for axes in found.values())


def test_experts_that_gates_keep_apart_are_no_heads() -> None:
    def net(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ p["gate"])
        hidden = jnp.einsum("btd,edo->bteo", x, p["up"])
        return jnp.einsum("bteo,eod,bte->btd", hidden, p["down"], gates)

    params = {"gate": ones(C, 4), "up": ones(4, C, 5), "down": ones(4, 5, C)}
    found = find_axes(net, params, X)
    assert len(found) == 3
    assert not any(axes.heads for axes in found.values())


@pytest.mark.parametrize(("width", "heads"), [(8, 2), (4, 4)])
def test_a_fused_projection_of_unequal_parts_has_no_heads(
    width: int, heads: int
) -> None:
    def net(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(x @ p["qkv"], [C, C + heads * width], -1)
        q = q.reshape(B, S, C // width, width)
        k, v = (a.reshape(B, S, heads, width) for a in (k, v))
        return jax.nn.dot_product_attention(q, k, v).reshape(B, S, C) @ p["o"]

    params = {"qkv": ones(C, C + 2 * heads * width), "o": ones(C, C)}
    found = find_axes(net, params, X)
    assert found["qkv"] == WeightAxes((C, C + 2 * heads * width), "io")


def test_a_name_that_the_loss_does_not_confirm_is_in_doubt_for_patterns() -> None:
    def loss_fn(p: Any, x: jax.Array) -> jax.Array:
        hidden = x @ p["kernel"]
        return jnp.mean(hidden * p["scale"]["kernel"])

    params = {"kernel": ones(4, 8), "scale": {"kernel": ones(2, 8)}}
    prune = partial(
        wf.prune, loss_fn, params, ones(2, 2, 4), pattern="2:4", method="globalmagni"
    )
    _, masks, _ = prune()
    assert set(masks) == {"kernel"}
    with pytest.raises(wf.OptionError, match=r"'scale/kernel'.* is in no product"):
        prune(prunable="kernel")


def test_a_function_without_a_hash_is_walked() -> None:
    @dataclasses.dataclass  # with fields that are compared, and so no hash
    class Net:
        scale: jax.Array

        def __call__(self, params, x):
            return self.scale * (x @ params["w"])

    net = Net(jnp.ones(2))
    axes = find_axes(net, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    assert axes["w"].roles == "io"


def test_a_layer_without_neurons_is_none() -> None:
    """As after one that was taken out whole."""
    params = {"a": jnp.ones((3, 0)), "c": jnp.ones((0, 2)), "d": jnp.ones((3, 2))}

    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["c"] + x @ p["d"]

    trace = traced(net, params, jnp.ones((4, 3)))
    assert list(trace.axes()) == list(trace.all_axes()) == ["d"]
