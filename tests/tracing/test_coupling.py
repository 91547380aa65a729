"""Entries that go together in programs with calls, loops and branches."""

import jax
import jax.numpy as jnp
import pytest
from coupled_channels import ONE_TO_ONE, channels, shape

from woodfisher_jax.tracing.coupling import coupled


@pytest.mark.parametrize(
    "between",
    [
        lambda p, x: jax.jit(jax.checkpoint(jax.nn.silu))(x),
        lambda p, x: jax.lax.cond(jnp.array(True), jnp.tanh, jnp.negative, x),
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h + jnp.sin(x) * i, x),
        lambda p, x: (jnp.tanh(x), jnp.mean(x, axis=-1))[0],
        lambda p, x: jax.lax.scan(lambda h, _: (h + 1, h.sum(-1)), x, None, 2)[0],
    ],
    ids=["call", "branches", "loop", "a mean that is not used", "the same in a loop"],
)
def test_entries_that_pass_are_the_same(between) -> None:
    assert channels(between) == ONE_TO_ONE


def test_a_counter_that_is_carried_beside_activations_is_none() -> None:
    """So that the weights that it points at are weights."""
    params = {"up": shape(3, 6, 4), "down": shape(3, 4, 6)}

    def net(p, x):
        step = lambda i, h: h + jnp.tanh(h @ p["up"][i]) @ p["down"][i]  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x)

    coupling = coupled(net, params, shape(2, 6))
    own = [coupling.units.classes(entry) for entry in coupling.weights["up"][2]]
    assert own == [coupling.units.classes(e) for e in coupling.weights["down"][1]]
    assert [coupling.units.reason(unit) for (unit,) in own] == [""] * 4
