"""What a smaller network changes: nothing but rounding, or a clause that says what."""

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


def test_any_nan_looks_into_all_outputs() -> None:
    assert any_nan({"a": jnp.zeros(2), "b": jnp.array([1.0, jnp.nan])})
    assert not any_nan({"a": jnp.zeros(2, int), "b": jnp.array([jnp.inf])})
