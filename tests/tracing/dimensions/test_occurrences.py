"""Roles of axes of weights that loops, branches and calls read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from traced_programs import DENSE, SQUARE, STACK, C, Program, X, ones, roles

from woodfisher_jax.tracing.axes import find_axes


def _each(f: Callable[..., jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda h, w: (jnp.tanh(f(h, w)), None)


PROGRAMS: dict[str, Program] = {
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
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), {"w": DENSE}, X, {"w": "?"}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_in_loops_and_branches(name: str) -> None:
    net, params, batch, expected = PROGRAMS[name]
    assert roles(net, params, batch) == expected


def test_a_product_in_shard_map_is_hidden() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    spec = jax.sharding.PartitionSpec()

    def net(p: Any, x: jax.Array) -> jax.Array:
        own = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=spec)
        return own(x, p["w"])

    axes = find_axes(net, {"w": DENSE}, X)["w"]
    assert axes.doubt == "enters 'shard_map', which is not followed"
    assert not axes.multiplied
