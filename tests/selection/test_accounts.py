"""What networks cost while structures go, and which go first."""

import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.accounts import cheapest, lowest_of_each


@pytest.fixture(scope="module")
def found():
    """Six neurons from 3 inputs, read by four neurons, read by two outputs."""

    def net(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    shapes = {"a": (3, 6), "b": (6, 4), "c": (4, 2)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    return wf.structures(net, params, jnp.ones((5, 3)))


def test_costs_are_those_of_the_smaller_arrays(found):
    assert found.account().left == {"size": 50, "macs": 50, "latency": 0}
    first, second = found.units
    # [3, 5], [5, 3] and [3, 2] are left.
    account = found.account([first[2], second[0]])
    assert account.left == {"size": 36, "macs": 36, "latency": 0}
    assert account.of(second[1]) == {"size": 7, "macs": 7, "latency": 0}
    assert account.left == {"size": 36, "macs": 36, "latency": 0}


def test_counted_are_only_the_tensors_asked_for(found):
    assert found.account(counted=["b"]).left == {"size": 24, "macs": 50, "latency": 0}


def test_the_cheapest_for_what_they_save_go_first(found):
    first, second = found.units
    losses = {u: 7.0 + i for i, u in enumerate(first)}
    # One of the second family saves 8 at first, one of the first 7; then it saves 6.
    losses |= {u: 7.9 + i for i, u in enumerate(second)}
    gone = cheapest(found.units, losses, found.account(), {"size": 42}, set())
    assert gone == {second[0]}
    losses[second[1]] = 9.6
    gone = cheapest(found.units, losses, found.account(), {"size": 40}, set())
    assert gone == {second[0], first[0]}
    losses[second[1]] = 9.2
    gone = cheapest(found.units, losses, found.account(), {"size": 40}, set())
    assert gone == {second[0], second[1]}


def test_what_the_last_saves_beyond_the_budget_lets_others_stay(found):
    first, second = found.units
    losses = {u: 9.0 for units in found.units for u in units}
    # The first saves 7, which leaves 43; the second 8 without it.
    losses |= {first[0]: 1.0, second[0]: 2.0}
    gone = cheapest(found.units, losses, found.account(), {"size": 42}, set())
    assert gone == {second[0]}


def test_two_budgets_are_both_met_and_what_has_gone_stays_gone(found):
    first, _ = found.units
    losses = {u: 1.0 for units in found.units for u in units}
    gone = {first[5]}
    budget = {"size": 30, "macs": 25}
    after = cheapest(found.units, losses, found.account(gone), budget, gone)
    left = found.account(after).left
    assert gone < after
    assert left["size"] <= 30
    assert left["macs"] <= 25


def test_a_budget_out_of_reach_says_what_is_left(found):
    losses = {u: 1.0 for units in found.units for u in units}
    with pytest.raises(OptionError, match="6 parameters are left"):
        cheapest(found.units, losses, found.account(), {"size": 5}, set())


def test_the_same_share_of_each_family_by_loss(found):
    first, second = found.units
    losses = dict(zip(first + second, np.arange(10.0)[::-1], strict=True))
    gone = lowest_of_each(found.units, losses, 0.5, set())
    assert gone == {*first[3:], *second[2:]}
    more = lowest_of_each(found.units, losses, 0.99, gone)
    assert more == {*first[1:], *second[1:]}
