"""What a smaller network changes: nothing but rounding, or a clause that says what."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_zoo import normal

from woodfisher_jax.shrinking.comparison import Comparison, any_nan

PARAMS = {"w": normal(0, 3, 4)}
X = normal(1, 5, 3)


def net(params, x):
    return x @ params["w"]


def change(net_fn, other, x=X) -> str:
    return Comparison(net_fn, PARAMS, x).change(other, PARAMS)


def test_the_same_network_changes_nothing() -> None:
    assert change(net, net) == ""
    assert change(net, lambda p, x: net(p, x) * (1 + 1e-6)) == ""


def test_a_difference_is_relative_to_the_largest_output() -> None:
    other = lambda p, x: 1.01 * net(p, x)  # noqa: E731
    wanted = "outputs by 0.01 of the largest, expected at most 1e-05"
    assert change(net, other) == wanted
    assert change(net, lambda p, x: net(p, x)[:, :3]) == (
        "outputs of shape (5, 4) into (5, 3)"
    )
    assert "nan of the largest" in change(net, lambda p, x: net(p, x) * jnp.nan)


@pytest.mark.parametrize("score", [-1e9, np.finfo(np.float32).min, -np.inf])
def test_scores_that_depend_on_no_parameter_set_no_scale(score) -> None:
    legal = jnp.arange(4) < 3
    whole = lambda p, x: jnp.where(legal, net(p, x), score)  # noqa: E731
    other = lambda p, x: jnp.where(legal, 1.01 * net(p, x), score)  # noqa: E731
    assert change(whole, whole) == ""
    assert change(whole, other).startswith("outputs by 0.01 of the largest")


def test_inputs_that_say_nothing_are_not_all_that_is_compared() -> None:
    other = lambda p, x: 1.01 * net(p, x)  # noqa: E731
    found = change(net, other, jnp.zeros((1, 3)))
    assert found.endswith("1e-05, with other numbers in the inputs' places")
    # Where others are no numbers, those of the same sign still are.
    positive = lambda p, x: jnp.log(x) @ p["w"]  # noqa: E731
    other = lambda p, x: 1.01 * positive(p, x)  # noqa: E731
    assert change(positive, other, jnp.ones((1, 3)))
    assert change(positive, positive, jnp.ones((1, 3))) == ""


def test_whole_numbers_stay_as_they_are() -> None:
    """They may be places of a table, or steps."""
    table = lambda p, x: p["w"][x]  # noqa: E731
    other = lambda p, x: jnp.where(x[:, None] > 0, 2 * p["w"][x], p["w"][x])  # noqa: E731
    assert change(table, other, jnp.zeros(5, jnp.int32)) == ""
    assert change(table, other, jnp.ones(5, jnp.int32)) != ""


def test_what_rounding_parameters_changes_is_no_difference() -> None:
    """As in a deep network; but not all of the output."""
    shifted = lambda by: lambda p, x: jnp.sin(1e4 * net(p, x) + by)  # noqa: E731
    assert change(shifted(0.0), shifted(3e-4)) == ""
    assert change(net, lambda p, x: net(p, x) + 3e-4) != ""
    assert change(shifted(0.0), shifted(0.1)).startswith("outputs by 0.1")


def test_an_output_of_rounding_alone_hides_no_other() -> None:
    def both(by: float):
        return lambda p, x: (
            by * net(p, x),
            jax.nn.softmax(net(p, x)).sum(-1) - 1,
        )

    assert change(both(1.0), both(1.0)) == ""
    assert change(both(1.0), both(1.01)).startswith("outputs by 0.01")
    assert change(both(1.0), both(1.01), jnp.zeros((1, 3))) != ""


@pytest.mark.parametrize(
    ("whole", "inputs"),
    [
        # A step that turns negative would never end.
        (
            lambda p, d: jax.lax.while_loop(
                lambda s: s[0] < 1,
                lambda s: (s[0] + d["dt"][0], s[1] / 2),
                (0.0, net(p, d["x"])),
            )[1],
            {"x": X, "dt": jnp.array([0.25])},
        ),
        # Types that give way to others.
        (
            lambda p, d: jax.lax.scan(
                lambda h, _: (h * d["dt"], None),
                net(jax.tree.map(lambda a: a.astype(jnp.bfloat16), p), d["x"]),
                None,
                2,
            )[0],
            {"x": X.astype(jnp.bfloat16), "dt": jnp.asarray(0.1)},
        ),
        (lambda p, x: jnp.log(x) @ p["w"], np.ones((2, 3), np.float32)),
    ],
    ids=["loop", "weak type", "numpy"],
)
def test_other_inputs_are_such_as_the_function_takes(whole, inputs) -> None:
    assert change(whole, whole, inputs) == ""


def test_a_function_that_refuses_other_inputs_is_not_asked() -> None:
    def positive(x):
        if (x < 0).any():
            raise ValueError("x < 0")
        return x

    def checked(params, x):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return net(params, jax.pure_callback(positive, kind, x))

    assert change(checked, checked, jnp.abs(X)) == ""


@pytest.mark.slow
def test_other_inputs_lie_where_the_given_ones_have_to() -> None:
    """And nowhere else: parameters on another device draw inputs there."""
    code = """
import jax, jax.numpy as jnp
from woodfisher_jax.shrinking.comparison import Comparison
net = lambda p, x: x @ p
mesh = jax.sharding.Mesh(jax.devices(), ("d",))
over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
w, x = jnp.ones((3, 4)), jnp.ones((4, 3))
there = jax.device_put(w, jax.devices()[1])
copies = jax.device_put(w, each)
for params, inputs in ((there, x), (copies, x), (w, jax.device_put(x, over))):
    assert Comparison(net, params, inputs).change(net, params) == ""
    assert Comparison(net, params, 0 * inputs).change(lambda p, x: 2 * x @ p, params)
"""
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | settings)


def test_any_nan_looks_into_all_outputs() -> None:
    assert any_nan({"a": jnp.zeros(2), "b": jnp.array([1.0, jnp.nan])})
    assert not any_nan({"a": jnp.zeros(2, int), "b": jnp.array([jnp.inf])})
