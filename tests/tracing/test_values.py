"""What a weight reads may go if the form it is read in is zero where the weight is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coupled_channels import channels, shape

from woodfisher_jax.tracing import values
from woodfisher_jax.tracing.entries.units import Array

ZEROS, SOME = np.zeros((4, 4), np.float32), np.arange(16).reshape(4, 4) > 5


@pytest.mark.parametrize(
    "of",
    [
        lambda w: w * jnp.exp(w),
        lambda w: jnp.where(w > 0.1, w, 0.0),
        lambda w: jnp.where(SOME, w, ZEROS),
        lambda w: jnp.clip(jnp.round(w / 0.1), -8, 7) * 0.1,
        lambda w: (jnp.clip(jnp.round(w / 0.1) + 128, 0, 255) - 128) * 0.1,
        lambda w: w.astype(jnp.bfloat16) + jax.lax.stop_gradient(jnp.sin(w) - w),
        lambda w: w / jnp.linalg.norm(w, axis=1, keepdims=True),
        lambda w: w**2,
        lambda w: jnp.exp(w) - 1,
        lambda w: 2 / (1 + jnp.exp(-w)) - 1,
        lambda w: jax.lax.fori_loop(0, 3, lambda i, v: v * 2, w),
    ],
)
def test_forms_that_are_zero_where_the_weight_is_read_what_may_go(of) -> None:
    assert channels(lambda p, x: x @ of(p["d"]), d=shape(4, 4)) == [[]] * 4


@pytest.mark.parametrize(
    "of",
    [
        lambda w: 1 + w,
        jax.nn.softplus,
        lambda w: jnp.where(w > 0, 1.0, -1.0),
        lambda w: w**0,
        lambda w: 2 / (1 + jnp.exp(-w)) - 1.5,
        lambda w: 1 / (1 + w),
        lambda w: jnp.maximum(w, 0.1),
        lambda w: jnp.pad(w, ((0, 0), (0, 1)), constant_values=1)[:, 1:],
        lambda w: jax.lax.fori_loop(0, 3, lambda i, v: v + 1, w),
        lambda w: jax.lax.scan(lambda h, r: (h, r + 1), 0.0, w.T)[1].T,
        lambda w: jax.lax.cond(True, lambda v: v + 1, lambda v: v, w),
    ],
)
def test_what_other_forms_read_stays(of) -> None:
    reason = (
        "is read through an operation that is not zero where its weight is, such as "
        "1 + w"
    )
    assert channels(lambda p, x: x @ of(p["d"]), d=shape(4, 4)) == [reason] * 4


def test_what_is_added_to_a_weight_has_to_have_a_mask() -> None:
    low_rank = {"d": shape(4, 4), "r": shape(4, 2), "s": shape(2, 4), "t": shape(4)}
    adapted = lambda p, x: x @ (p["d"] + p["r"] @ p["s"] * p["t"])  # noqa: E731
    assert channels(adapted, **low_rank) == [[]] * 4
    point = lambda p, x: x @ ((p["d"] - p["z"]) * p["t"])  # noqa: E731
    found = channels(point, d=shape(4, 4), z=shape(4), t=shape(4))
    assert all(reason.startswith("is read through an operation") for reason in found)
    # A vector that reads is a weight, not a part of one.
    reader = lambda p, x: (x @ p["z"])[..., None] * p["t"]  # noqa: E731
    assert channels(reader, z=shape(4), t=shape(4)) == [[]] * 4


def test_entries_stay_whose_rows_are_not_zero() -> None:
    """Of a matrix whose last rows are numbers of the program."""

    def between(params, x):
        rows = jnp.concatenate([params["d"], jnp.ones((2, 4))])
        return jnp.concatenate([x[..., :2], x[..., 2:]], -1) @ rows

    found = channels(between, d=shape(2, 4))
    assert found[:2] == [[], []]
    assert all(reason.startswith("is read through") for reason in found[2:])


def test_numbers_are_computed_when_they_are_asked_for_and_once() -> None:
    calls = []

    def number():
        calls.append(1)
        return jnp.zeros(3)

    jaxpr = jax.make_jaxpr(lambda a, b: (a + b) * 2)(jnp.ones(3), jnp.ones(3)).jaxpr
    one = Array((), value=number), Array((), value=lambda: jnp.ones(3))
    (total,) = values.results(jaxpr.eqns[0], one)
    assert total is not None
    assert calls == []
    np.testing.assert_array_equal(total(), 1.0)
    np.testing.assert_array_equal(total(), 1.0)
    assert calls == [1]
    assert values.results(jaxpr.eqns[0], (one[0], Array((), True))) == [None]
    assert values.known(jnp.ones(2)) is not None
    assert values.masked(jax.eval_shape(jax.random.key, 0)) is None


def test_numbers_that_cannot_be_computed_say_nothing() -> None:
    """The form is taken to be zero then."""

    def fails(w):
        raise RuntimeError

    def form(w):
        return jax.pure_callback(fails, jax.ShapeDtypeStruct(w.shape, w.dtype), w) + 1

    jaxpr = jax.make_jaxpr(form)(jnp.ones((4, 4))).jaxpr
    (made,) = values.results(jaxpr.eqns[0], [Array((), value=lambda: jnp.ones((4, 4)))])
    assert made is not None
    assert made() is None
    (more,) = values.results(
        jaxpr.eqns[1], [Array((), value=made), Array((), value=lambda: 1.0)]
    )
    assert more is not None
    assert more() is None


def test_what_a_caller_s_jit_holds_is_not_known() -> None:
    """Then the form is taken to be zero."""

    @jax.jit
    def listed(held):
        found.append(channels(lambda p, x: x @ (p["d"] + held), d=shape(4, 4)))
        return held

    found: list = []
    listed(jnp.ones((4, 4)))
    assert found == [[[]] * 4]
