"""What products say of the axes of their weights."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from traced_programs import (
    DENSE,
    IMAGES,
    SQUARE,
    TOKENS,
    B,
    C,
    Program,
    S,
    X,
    conv,
    ones,
    roles,
)

from woodfisher_jax.tracing.axes import find_axes


def _dispatched(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.one_hot(jnp.argmax(x[0] @ p["r"], -1), 3)
    rows = jnp.einsum("te,td->etd", gates, x[0])
    return jnp.einsum("etf,te->tf", jnp.einsum("etd,edf->etf", rows, p["w"]), gates)


PROGRAMS: dict[str, Program] = {
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
    "grouped by depth": (
        lambda p, x: conv(x, p["w"], groups=3),
        {"w": ones(3, 3, 1, 3)},
        IMAGES,
        {"w": "kkio"},
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
    "embedding as attention": (
        lambda p, t: p["e"][t] @ p["e"][t].swapaxes(-1, -2) @ p["e"][t],
        {"e": ones(50, 16)},
        TOKENS,
        {},
    ),
    "factors of a weight": (
        lambda p, x: x @ (p["w"] * p["in"] * p["out"]),
        {"w": DENSE, "in": ones(C, 1), "out": ones(1, 5)},
        X,
        {"w": "io"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_in_products(name: str) -> None:
    net, params, batch, expected = PROGRAMS[name]
    assert roles(net, params, batch) == expected


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
