"""Roles of axes of tensors that are moved, cut and looked up."""

from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from traced_programs import (
    DENSE,
    IMAGES,
    LABELS,
    TOKENS,
    B,
    C,
    D,
    H,
    Program,
    S,
    X,
    attention,
    conv,
    ones,
    roles,
)

from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees.axes import WeightAxes

PROGRAMS: dict[str, Program] = {
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
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_of_what_is_moved(name: str) -> None:
    net, params, batch, expected = PROGRAMS[name]
    assert roles(net, params, batch) == expected


def test_a_reshape_that_cuts_axes_is_followed() -> None:
    found = find_axes(lambda p, x: x @ p["w"].reshape(C, 16), {"w": ones(16, C)}, X)
    assert found["w"] == WeightAxes((16, 2, 16), "iio")


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
