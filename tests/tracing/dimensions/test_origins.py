"""Roles of axes of weights that are computed from tensors."""

import jax
import jax.numpy as jnp
import pytest
from traced_programs import DENSE, SQUARE, Program, X, ones, roles

PROGRAMS: dict[str, Program] = {
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
    "symmetric": (lambda p, x: x @ (p["w"] + p["w"].T), {"w": SQUARE}, X, {"w": "?"}),
    "beside itself transposed": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"].T], 1),
        {"w": SQUARE},
        X,
        {"w": "?"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_of_computed_weights(name: str) -> None:
    net, params, batch, expected = PROGRAMS[name]
    assert roles(net, params, batch) == expected
