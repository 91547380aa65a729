"""Roles of axes found in the jaxpr of small functions; nothing is executed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import woodfisher_jax as wf
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees.axes import WeightAxes

B, S, C, H, D = 2, 6, 32, 4, 8
X = jnp.ones((B, S, C))
IMAGES = jnp.ones((2, 8, 8, 3))
Roles = dict[str, str]


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def roles(f: Callable[..., Any], params: Any, batch: Any) -> Roles:
    """Letters by path; "?" where they are in doubt."""
    found = find_axes(f, params, batch)
    return {path: "?" if axes.doubt else axes.roles for path, axes in found.items()}


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, S, H * D)


def conv(x: jax.Array, w: jax.Array, form: str = "HWIO", groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", form, "NHWC"),
        feature_group_count=groups,
    )


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


# ------------------------------------------------------------- programs, and what's not

SQUARE, STACK, DENSE = ones(C, C), ones(3, C, C), ones(C, 5)
LABELS = jnp.zeros(S, int)
TOKENS = jnp.zeros((B, S), int)


def _each(f: Callable[..., jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda h, w: (jnp.tanh(f(h, w)), None)


def _dispatched(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.one_hot(jnp.argmax(x[0] @ p["r"], -1), 3)
    rows = jnp.einsum("te,td->etd", gates, x[0])
    return jnp.einsum("etf,te->tf", jnp.einsum("etd,edf->etf", rows, p["w"]), gates)


PROGRAMS: dict[str, tuple[Any, Any, Any, Roles]] = {
    "scan": (
        lambda p, x: jax.lax.scan(_each(jnp.matmul), x, p["w"])[0],
        {"w": STACK},
        X,
        {"w": "sio"},
    ),
    "scan of (out, in)": (
        lambda p, x: jax.lax.scan(_each(lambda h, w: h @ w.T), x, p["w"])[0],
        {"w": STACK},
        X,
        {"w": "soi"},
    ),
    "scan in a scan": (
        lambda p, x: jax.lax.scan(
            lambda h, ws: jax.lax.scan(_each(jnp.matmul), h, ws), x, p["w"]
        )[0],
        {"w": ones(3, 2, C, C)},
        X,
        {"w": "ssio"},
    ),
    "scan of the last axis": (
        lambda p, x: jax.lax.scan(_each(jnp.matmul), x, p["w"].transpose(2, 1, 0))[0],
        {"w": ones(C, C, 3)},
        X,
        {"w": "ois"},
    ),
    "vmap": (
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]),
        {"w": ones(B, C, 5)},
        X,
        {"w": "sio"},
    ),
    "vmap of convolutions": (
        lambda p, x: jax.vmap(conv)(x[:, None], p["w"]),
        {"w": ones(2, 3, 3, 3, 5)},
        IMAGES,
        {"w": "skkio"},
    ),
    "fori_loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h @ p["w"][i], x),
        {"w": STACK},
        X,
        {"w": "sio"},
    ),
    "fori_loop of one layer": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h @ p["w"], x),
        {"w": SQUARE},
        X,
        {"w": "io"},
    ),
    "Python loop": (
        lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2],
        {"w": STACK},
        X,
        {"w": "sio"},
    ),
    "while": (
        lambda p, x: jax.lax.while_loop(
            lambda h: jnp.sum(h) < 3, lambda h: h @ p["w"].T, x
        ),
        {"w": ones(C, C)},
        X,
        {"w": "oi"},
    ),
    "remat": (
        lambda p, x: jax.checkpoint(jnp.matmul)(x, p["w"]),
        {"w": DENSE},
        X,
        {"w": "io"},
    ),
    "cond": (
        lambda p, x: jax.lax.cond(
            jnp.sum(x) > 0, lambda: x @ p["a"], lambda: x @ p["b"].T
        ),
        {"a": DENSE, "b": DENSE.T},
        X,
        {"a": "io", "b": "oi"},
    ),
    "grouped by depth": (
        lambda p, x: conv(x, p["w"], groups=3),
        {"w": ones(3, 3, 1, 3)},
        IMAGES,
        {"w": "kkio"},
    ),
    "experts by index": (
        lambda p, b: jnp.einsum("td,tdf->tf", b[0][0], p["w"][b[1]]),
        {"w": ones(3, C, 5)},
        (X, LABELS),
        {"w": "sio"},
    ),
    "experts by two indices": (
        lambda p, b: jnp.einsum("td,tdf->tf", b[0][0], p["w"][b[1], :, b[1]]),
        {"w": ones(4, C, 3, 5)},
        (X, LABELS),
        {"w": "siso"},
    ),
    "experts by dispatch": (
        _dispatched,
        {"w": ones(3, C, 5), "r": ones(C, 3)},
        X,
        {"r": "io", "w": "sio"},
    ),
    "experts by ragged_dot": (
        lambda p, x: jax.lax.ragged_dot(x[0], p["w"], jnp.array([1, 2, 3])),
        {"w": ones(3, C, 5)},
        X,
        {"w": "sio"},
    ),
    "weight norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"]),
        {"w": DENSE, "g": ones(5)},
        X,
        {"w": "io"},
    ),
    "fake quantisation": (
        lambda p, x: x @ (p["w"] + jax.lax.stop_gradient(jnp.round(p["w"]) - p["w"])),
        {"w": DENSE},
        X,
        {"w": "io"},
    ),
    "low rank added": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": DENSE, "a": ones(C, 2), "b": ones(2, 5)},
        X,
        {"w": "io", "a": "?", "b": "?"},
    ),
    "tied autoencoder": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        {"w": DENSE},
        X,
        {"w": "?"},
    ),
    "tied convolutions": (
        lambda p, x: conv(conv(x, p["w"]), p["w"], "HWOI"),
        {"w": ones(3, 3, 3, 5)},
        IMAGES,
        {"w": "?"},
    ),
    "tied embedding": (
        lambda p, t: jnp.tanh(p["e"][t] @ p["w"]) @ p["e"].T,
        {"e": ones(50, 16), "w": ones(16, 16)},
        TOKENS,
        {"e": "oi", "w": "io"},
    ),
    "embedding": (
        lambda p, t: p["e"][t] @ p["w"],
        {"e": ones(50, 16), "w": ones(16, 3)},
        TOKENS,
        {"w": "io"},
    ),
    "embedding as attention": (
        lambda p, t: p["e"][t] @ p["e"][t].swapaxes(-1, -2) @ p["e"][t],
        {"e": ones(50, 16)},
        TOKENS,
        {},
    ),
    "positions, class tokens, scales": (
        lambda p, x: (
            p["scale"]
            * (
                jnp.concatenate([jnp.broadcast_to(p["cls"], (B, 1, C)), x], 1)
                + p["pos"][:, : S + 1]
            )
            @ p["w"]
        ),
        {
            "scale": ones(1, C),
            "cls": ones(1, 1, C),
            "pos": ones(1, 9, C),
            "w": DENSE,
        },
        X,
        {"w": "io"},
    ),
    "biases of attention by table": (
        lambda p, x: jax.nn.softmax(x @ p["w"] + p["t"][jnp.zeros((S, 5), int), 0]) + 1,
        {"t": ones(9, 2), "w": DENSE},
        X,
        {"w": "io"},
    ),
    "concatenated weights": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"].T], 1),
        {"a": DENSE, "b": ones(3, C)},
        X,
        {"a": "io", "b": "oi"},
    ),
    "slices of inputs": (
        lambda p, x: x @ p["w"][:C] + x[..., :4] @ p["w"][C:],
        {"w": ones(C + 4, 5)},
        X,
        {"w": "io"},
    ),
    "strided slices": (
        lambda p, x: x[..., ::2] @ p["w"][::2] + x[..., 1::2] @ p["w"][1::2],
        {"w": DENSE},
        X,
        {"w": "io"},
    ),
    "repeated inputs": (
        lambda p, x: x @ jnp.repeat(p["w"], 2, axis=0),
        {"w": ones(16, 5)},
        X,
        {"w": "io"},
    ),
    "a reshape across inputs and outputs": (
        lambda p, x: x @ p["w"].reshape(C, 3),
        {"w": ones(6, 16)},
        X,
        {"w": "?"},
    ),
    "selected by the batch": (
        lambda p, x: x @ jnp.where(jnp.sum(x) > 0, p["a"], p["b"].T),
        {"a": DENSE, "b": DENSE.T},
        X,
        {"a": "io", "b": "oi"},
    ),
    "branches that give weights": (
        lambda p, x: x @ jax.lax.cond(jnp.sum(x) > 0, lambda: p["a"], lambda: p["b"].T),
        {"a": DENSE, "b": DENSE.T},
        X,
        {"a": "io", "b": "oi"},
    ),
    "chosen inputs": (
        lambda p, x: x[..., :3] @ p["w"][jnp.array([0, 2, 4])],
        {"w": ones(6, 7)},
        X,
        {"w": "io"},
    ),
    "chosen outputs": (
        lambda p, x: x @ p["w"][:, jnp.array([0, 2, 4])],
        {"w": ones(C, 6)},
        X,
        {"w": "io"},
    ),
    "positions by difference": (
        lambda p, x: jnp.einsum(
            "bja,ijac->bic", x, p["w"][jnp.arange(S)[:, None] - jnp.arange(S)]
        ),
        {"w": ones(11, C, 4)},
        X,
        {"w": "kio"},
    ),
    "symmetric": (lambda p, x: x @ (p["w"] + p["w"].T), {"w": SQUARE}, X, {"w": "?"}),
    "beside itself transposed": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"].T], 1),
        {"w": SQUARE},
        X,
        {"w": "?"},
    ),
    "factors of a weight": (
        lambda p, x: x @ (p["w"] * p["in"] * p["out"]),
        {"w": DENSE, "in": ones(C, 1), "out": ones(1, 5)},
        X,
        {"w": "io"},
    ),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), {"w": DENSE}, X, {"w": "?"}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_in_programs(name: str) -> None:
    net, params, batch, expected = PROGRAMS[name]
    assert roles(net, params, batch) == expected


def test_a_reshape_that_cuts_axes_is_followed() -> None:
    found = find_axes(lambda p, x: x @ p["w"].reshape(C, 16), {"w": ones(16, C)}, X)
    assert found["w"] == WeightAxes((16, 2, 16), "iio")


@pytest.mark.parametrize(
    ("net", "shape", "scale"),
    [
        (lambda p, x: jnp.sum(x * p["w"], -1), (C,), False),
        (lambda p, x: jnp.mean((p["w"] * x).transpose(2, 0, 1), 0), (C,), False),
        (lambda p, x: jnp.sum(x[..., None] * p["w"], 2), (C, 3), False),
        (lambda p, x: jnp.sum(x.reshape(B, S, 2, -1) * p["w"], -1), (2, C // 2), False),
        # A scale, whatever follows of what is not its own, or after a shift.
        (lambda p, x: jnp.sum(x * p["w"], 1), (C,), True),
        (lambda p, x: jnp.sum(x * p["w"] + 1, -1), (C,), True),
        (lambda p, x: jnp.max(x * p["w"], -1), (C,), True),
        (lambda p, x: jnp.mean(x * p["w"]), (C,), True),
    ],
)
def test_a_product_by_hand_tells_no_roles(net: Any, shape: Any, scale: bool) -> None:
    params = {"k": SQUARE, "w": ones(*shape)}
    found = find_axes(lambda p, x: net(p, x @ p["k"]), params, X)
    assert found["k"].roles == "io"
    if scale:
        assert "w" not in found
    else:
        assert found["w"].doubt == "has an axis that no product tells a role of"
        assert found["w"].multiplied  # It is prunable by default.


def test_a_product_in_shard_map_is_hidden() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    spec = jax.sharding.PartitionSpec()

    def net(p: Any, x: jax.Array) -> jax.Array:
        own = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=spec)
        return own(x, p["w"])

    axes = find_axes(net, {"w": DENSE}, X)["w"]
    assert axes.doubt == "enters 'shard_map', which is not followed"
    assert not axes.multiplied


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_permuted_axes_have_permuted_roles(order: tuple[int, ...]) -> None:
    back = [order.index(axis) for axis in range(4)]

    def net(p: Any, x: jax.Array) -> jax.Array:
        return conv(x, p["w"].transpose(back))

    kernel = ones(3, 3, 3, 3).transpose(order)
    assert roles(net, {"w": kernel}, IMAGES)["w"] == "".join("kkio"[i] for i in order)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_permuted_heads_stay_heads(order: tuple[int, ...]) -> None:
    back = [order.index(axis) for axis in range(3)]

    def net(p: Any, x: jax.Array) -> jax.Array:
        qkv = (jnp.einsum("bsc,chd->bshd", x, p[n].transpose(back)) for n in "qkv")
        return attention(*qkv) @ p["o"]

    params = {n: ones(C, H, D).transpose(order) for n in "qkv"} | {"o": ones(C, C)}
    found = find_axes(net, params, X)
    for name in "qkv":
        assert found[name].roles == "".join("ioo"[i] for i in order)
        assert found[name].heads == (order.index(1),)


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
