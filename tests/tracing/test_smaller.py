"""Programs on smaller arrays: every setting that has a length in it follows."""

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.tracing.coupling import coupled
from woodfisher_jax.tracing.smaller import Smaller

NUMBERS = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(NUMBERS.normal(size=size), jnp.float32)
    for name, size in {"a": (3, 4), "b": (4,), "c": (23, 2), "up": (2, 4, 4)}.items()
}
X = jnp.asarray(NUMBERS.normal(size=(2, 5, 3)), jnp.float32)
HELD = jnp.arange(4.0)


def net(params, x):
    """Settings with lengths: of constants, random numbers, loops, views and parts."""
    h = x @ params["a"] * jnp.tile(jnp.full((2, 1, 1), 3.0), 4)
    h = h + jnp.broadcast_to(params["b"], (2, 5, 4)) * HELD
    key = jax.random.key(0, impl="rbg")  # compiled faster than the default
    h = h * (jax.random.bits(key, h.shape) % 3) * jnp.arange(4)
    h = jax.lax.scan(lambda h, w: (h @ w, None), h, params["up"], reverse=True)[0]
    h = jax.lax.switch(jnp.array(7), [jnp.tanh, jnp.cos, jnp.sin], h)
    h = jax.lax.dynamic_slice_in_dim(h, 1, 2, axis=1)[:, jnp.array([1, 0])]
    a, b = jnp.split(jnp.concatenate([h, h[..., ::-1]], -1), 2, axis=-1)
    h = jnp.pad(a - b, ((0, 0), (0, 0), (1, 2)))
    # Seven, every second of them, and three times the four.
    more = jnp.broadcast_to(a[..., None], (2, 2, 4, 3)).reshape(2, 2, 12)
    h = jnp.concatenate([h, h[..., ::2], more], -1)
    return jax.lax.optimization_barrier(h) @ params["c"]


def smaller(*entries: int) -> tuple[Smaller, list[jax.Array], dict]:
    """The program without some outputs of "a", its arrays, and what is masked."""
    coupling = coupled(net, PARAMS, X)
    units, axes = coupling.units, coupling.weights
    gone = {u for i in entries for u in units.classes(axes["a"][1][i])}
    assert not any(units.reason(unit) for unit in gone)
    small = Smaller(coupling, gone)
    masked = dict(PARAMS)
    for path, axis in (("c", 0), ("up", 1)):
        left = np.zeros(masked[path].shape[axis])
        left[small.kept(axes[path][axis])] = 1
        masked[path] *= np.expand_dims(
            left, [*range(axis), *range(axis + 1, masked[path].ndim)]
        )
    return small, [small.cut(PARAMS[path], axes[path]) for path in PARAMS], masked


def test_a_smaller_program_gives_what_the_masked_one_gives() -> None:
    small, arrays, masked = smaller(0)
    assert [a.shape for a in arrays][:2] == [(3, 2), (2,)]
    (found,) = jax.jit(small)([*arrays, X])
    np.testing.assert_allclose(found, jax.jit(net)(masked, X), atol=1e-5)


def test_a_watch_sees_numbers_in_every_round_and_branch() -> None:
    def loop(params, x):
        read = lambda h, w: (h @ w, None)  # noqa: E731
        h = jax.lax.scan(read, x, params["up"], reverse=True)[0]
        branches = [lambda h: h, lambda h: h @ params["up"][0]]
        return jax.lax.switch(0, branches, h)

    seen = []

    def watch(place, equation, operands):
        assert equation.primitive.name == "dot_general"
        (_, activations), (weight, other) = operands
        assert (activations.active, other.active) == (True, False)
        seen.append((place, float(weight[0, 0])))

    params, x = {"up": PARAMS["up"]}, jnp.ones((2, 4))
    whole = Smaller(coupled(loop, params, x), set(), watch)
    (found,) = whole([params["up"], x])
    np.testing.assert_allclose(found, loop(params, x), atol=1e-5)
    places, weights = zip(*seen, strict=True)
    assert places[0] == places[1] != places[2]
    assert weights == tuple(float(params["up"][i, 0, 0]) for i in (1, 0, 0))
