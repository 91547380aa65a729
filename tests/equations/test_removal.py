"""Groups of inputs taken out, and their prices, against float64 least squares."""

import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import INPUTS, OUTPUTS

from woodfisher_jax.equations.removal import losses_in_turn, without_inputs


def groups_of(size, among=None):
    """Neighbours in groups, [groups, size]."""
    return np.arange(INPUTS if among is None else among).reshape(-1, size)


def taken_out(layer, groups, number, together=1, there=None, damping=0.01):
    found, stays = without_inputs(
        *(jnp.asarray(layer[n], jnp.float32) for n in ("weights", "moment", "cross")),
        jnp.ones(INPUTS, bool) if there is None else there,
        groups,
        jnp.float32(damping),
        number=number,
        together=together,
    )
    return np.asarray(found), np.asarray(stays)


def fitted(layer, left, damping=0.01):
    """Least squares in float64 on some inputs, and its objective."""
    moment, cross = layer["moment"], layer["cross"]
    ridge = damping * np.mean(np.diag(moment)) * np.eye(INPUTS)
    own, wanted = moment + ridge, layer["weights"] @ (cross + ridge)
    found = np.zeros((OUTPUTS, INPUTS))
    found[:, left] = np.linalg.solve(own[np.ix_(left, left)], wanted[:, left].T).T
    return found, np.trace(found @ own @ found.T) - 2 * np.trace(found @ wanted.T)


@pytest.mark.parametrize(("size", "number", "together"), [(1, 3, 1), (4, 2, 2)])
def test_inputs_that_stay_are_fitted_by_least_squares(layer, size, number, together):
    found, stays = taken_out(layer, groups_of(size), number, together)
    assert stays.sum() == INPUTS - number * size
    np.testing.assert_allclose(
        found, fitted(layer, np.flatnonzero(stays))[0], atol=1e-4
    )
    assert not found[:, ~stays].any()


@pytest.mark.parametrize("groups", [groups_of(2), groups_of(INPUTS // 4).T])
def test_the_group_that_goes_is_that_of_the_lowest_objective(layer, groups):
    _, stays = taken_out(layer, groups, 1)
    objective = [
        fitted(layer, np.delete(np.arange(INPUTS), group))[1] for group in groups
    ]
    best = groups[int(np.argmin(objective))]
    assert sorted(np.flatnonzero(~stays)) == sorted(best)


def losses_of(layer, groups, number, together=1, damping=0.01):
    found = losses_in_turn(
        *(jnp.asarray(layer[n], jnp.float32) for n in ("weights", "moment")),
        jnp.ones(INPUTS, bool),
        groups,
        jnp.float32(damping),
        number=number,
        together=together,
    )
    return np.asarray(found)


@pytest.mark.parametrize("together", [1, 2])
def test_losses_in_turn_add_up_to_the_error_without_these_inputs(layer, together):
    own, groups = {**layer, "cross": layer["moment"]}, groups_of(4)
    losses = losses_of(layer, groups, 2, together)
    _, left = taken_out(own, groups, 2, together)
    stays = left[groups[:, 0]]
    assert np.isinf(losses[stays]).all()
    whole = fitted(own, np.arange(INPUTS))[1]
    error = fitted(own, np.flatnonzero(left))[1] - whole
    assert float(losses[~stays].sum()) == pytest.approx(error, rel=1e-3)


def test_the_first_to_go_costs_what_it_is_worth_beside_all(layer):
    own = {**layer, "cross": layer["moment"]}
    whole = fitted(own, np.arange(INPUTS))[1]
    each = [fitted(own, np.delete(np.arange(INPUTS), i))[1] - whole for i in range(4)]
    losses = losses_of(layer, groups_of(1, among=4), 3)
    first = int(np.argmin(each))
    assert losses[first] == pytest.approx(each[first], rel=1e-3)
    # None costs less than it does beside all others, nor than the one before it.
    gone = np.flatnonzero(np.isfinite(losses))
    assert len(gone) == 3
    assert (losses[gone] >= np.array(each)[gone] * (1 - 1e-3)).all()
    assert losses[gone].min() == losses[first]


def test_equal_inputs_are_missed_with_the_last_of_them():
    moment = np.ones((2, 2)) + 1e-6 * np.eye(2)
    twice = {"weights": np.ones((1, 2)), "moment": np.pad(moment, (0, INPUTS - 2))}
    twice["weights"] = np.pad(twice["weights"], ((0, 0), (0, INPUTS - 2)))
    losses = losses_of(twice, groups_of(1, among=2), 2, damping=1e-4)
    least, most = sorted(losses)
    assert most > 100 * least
    assert most == pytest.approx(4.0, rel=0.01)


def test_inputs_that_have_gone_do_not_come_back(layer):
    there = np.arange(INPUTS) % 3 > 0
    found, stays = taken_out(layer, groups_of(1), 3, there=there)
    assert not (stays & ~there).any()
    assert stays.sum() == int(there.sum()) - 3
    left = np.flatnonzero(stays)
    np.testing.assert_allclose(found, fitted(layer, left)[0], atol=1e-4)


def test_inputs_of_no_group_stay(layer):
    _, stays = taken_out(layer, groups_of(1, among=4), 3)
    assert stays[4:].all()
    assert stays.sum() == INPUTS - 3
