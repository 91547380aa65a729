"""Which entries of weights go together, by what an equation does with them."""

import jax
import jax.numpy as jnp
import pytest
from coupled_channels import ONE_TO_ONE, channels


@pytest.mark.parametrize(
    "between",
    [
        lambda p, x: jax.nn.softmax(x, axis=1) * jnp.float32(2),
        lambda p, x: jnp.swapaxes(x, 0, 1).reshape(10, 4),
        lambda p, x: jnp.where(x > 0, x, jnp.ones(4)),
        lambda p, x: jnp.cumsum(x, axis=1)[:, ::2],
        lambda p, x: x[:, jnp.array([0, 0, 4])],
        lambda p, x: jax.lax.dynamic_slice_in_dim(x, 1, 2, axis=1),
        lambda p, x: jax.lax.dynamic_update_slice(x, x[:, :1], (0, 2, 0)),
        lambda p, x: jnp.concatenate([x, jnp.zeros((2, 1, 4))], axis=1),
        lambda p, x: jax.lax.optimization_barrier((x, x))[1],
        lambda p, x: jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16),
        lambda p, x: x * jnp.arange(4),
        lambda p, x: jnp.stack([x, x]).mean(0) + jnp.unstack(x, axis=1)[0][:, None],
        lambda p, x: jnp.tile(x, (2, 3, 1)),
        lambda p, x: x * jnp.tile(jnp.ones((2, 5, 1)), 4),
        lambda p, x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    ],
)
def test_entries_that_pass_are_the_same(between) -> None:
    assert channels(between) == ONE_TO_ONE


def test_what_is_moved_goes_with_its_place() -> None:
    assert channels(lambda p, x: x[..., ::-1]) == [[3], [2], [1], [0]]
    turned = lambda p, x: jnp.concatenate([x[..., 2:], x[..., :2]], -1)  # noqa: E731
    assert channels(turned) == [[2], [3], [0], [1]]
    padded = lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (1, 2)))  # noqa: E731
    assert channels(padded, read=7) == [[1], [2], [3], [4]]
    rows = lambda p, x: x.reshape(2, -1)  # noqa: E731
    assert channels(rows, read=20)[1] == [1, 5, 9, 13, 17]
    halves = lambda p, x: jnp.split(x, 2, axis=-1)[0] + x[..., 2:]  # noqa: E731
    assert channels(halves, read=2) == [[0], [1], [0], [1]]
    pairs = lambda p, x: x[..., ::2] * x[..., 1::2]  # noqa: E731
    assert channels(pairs, read=2) == [[0], [0], [1], [1]]
    repeated = lambda p, x: jnp.repeat(x, 2, axis=-1)  # noqa: E731
    assert channels(repeated, read=8) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda p, x: jax.nn.softmax(x), "is reduced by 'reduce_max'"),
        (lambda p, x: x + x.mean(-1, keepdims=True), "is reduced by 'reduce_sum'"),
        (lambda p, x: jnp.sort(x), "is mixed by 'sort'"),
        (lambda p, x: jnp.cumsum(x, axis=-1), "is mixed by 'cumsum'"),
        (lambda p, x: x[..., jnp.array([1, 0, 3, 2])], "is looked up"),
        (lambda p, x: x + x[..., :1], "is taken alone"),
        (lambda p, x: jnp.fft.fft(x).real, "enters 'fft'"),
        (
            lambda p, x: jax.lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, x),
            "enters 'while'",
        ),
        (
            lambda p, x: jax.lax.reduce_window(
                x, 0.0, jax.lax.add, (1, 1, 2), (1, 1, 1), "SAME"
            ),
            "is pooled in",
        ),
        (
            lambda p, x: jax.lax.dynamic_slice_in_dim(
                x, jnp.int32(x[0, 0, 0]), 2, axis=-1
            ).repeat(2, -1),
            "is cut at a place that is computed",
        ),
    ],
)
def test_what_is_mixed_stays_for_a_reason(between, reason) -> None:
    found = channels(between)
    assert any(isinstance(r, str) and reason in r for r in found), found
