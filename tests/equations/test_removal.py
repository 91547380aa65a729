"""Groups of inputs taken out, and their prices, against float64 least squares."""

import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import INPUTS, OUTPUTS

from woodfisher_jax.equations.removal import losses_in_turn, without_inputs


def taken_out(layer, size, number, together=1, allowed=None, damping=0.01, may_go=None):
    found, stays = without_inputs(
        *(jnp.asarray(layer[n], jnp.float32) for n in ("weights", "moment", "cross")),
        jnp.ones(INPUTS // size, bool) if allowed is None else allowed,
        jnp.ones(INPUTS // size, bool) if may_go is None else may_go,
        jnp.float32(damping),
        size=size,
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
    found, stays = taken_out(layer, size, number, together)
    left = np.flatnonzero(np.repeat(stays, size))
    assert stays.sum() == INPUTS // size - number
    np.testing.assert_allclose(found, fitted(layer, left)[0], atol=1e-4)
    assert not found[:, np.repeat(~stays, size)].any()


def test_the_input_that_goes_is_that_of_the_lowest_objective(layer):
    _, stays = taken_out(layer, 2, 1)
    groups = range(INPUTS // 2)
    objective = [
        fitted(layer, np.array([i for i in range(INPUTS) if i // 2 != g]))[1]
        for g in groups
    ]
    assert int(np.flatnonzero(~stays)[0]) == int(np.argmin(objective))


def losses_of(layer, size, number, together=1, may_go=None, damping=0.01):
    groups = jnp.ones(INPUTS // size, bool)
    found = losses_in_turn(
        *(jnp.asarray(layer[n], jnp.float32) for n in ("weights", "moment")),
        groups,
        groups if may_go is None else may_go,
        jnp.float32(damping),
        size=size,
        number=number,
        together=together,
    )
    return np.asarray(found)


@pytest.mark.parametrize("together", [1, 2])
def test_losses_in_turn_add_up_to_the_error_without_these_inputs(layer, together):
    own = {**layer, "cross": layer["moment"]}
    losses = losses_of(layer, 4, 2, together)
    _, stays = taken_out(own, 4, 2, together)
    assert np.isinf(losses[stays]).all()
    left = np.flatnonzero(np.repeat(stays, 4))
    whole = fitted(own, np.arange(INPUTS))[1]
    error = fitted(own, left)[1] - whole
    assert float(losses[~stays].sum()) == pytest.approx(error, rel=1e-3)


def test_the_first_to_go_costs_what_it_is_worth_beside_all(layer):
    own = {**layer, "cross": layer["moment"]}
    whole = fitted(own, np.arange(INPUTS))[1]
    each = [fitted(own, np.delete(np.arange(INPUTS), i))[1] - whole for i in range(4)]
    losses = losses_of(layer, 1, 3, may_go=jnp.arange(INPUTS) < 4)
    first = int(np.argmin(each))
    assert losses[first] == pytest.approx(each[first], rel=1e-3)
    # None costs less than it does beside all others, nor than the one before it.
    gone = np.flatnonzero(np.isfinite(losses))
    assert len(gone) == 3
    assert gone.max() < 4
    assert (losses[gone] >= np.array(each)[gone] * (1 - 1e-3)).all()
    assert losses[gone].min() == losses[first]


def test_equal_inputs_are_missed_with_the_last_of_them():
    moment = np.ones((2, 2)) + 1e-6 * np.eye(2)
    twice = {"weights": np.ones((1, 2)), "moment": np.pad(moment, (0, INPUTS - 2))}
    twice["weights"] = np.pad(twice["weights"], ((0, 0), (0, INPUTS - 2)))
    losses = losses_of(twice, 1, 2, may_go=jnp.arange(INPUTS) < 2, damping=1e-4)
    least, most = sorted(losses[:2])
    assert most > 100 * least
    assert most == pytest.approx(4.0, rel=0.01)


def test_inputs_that_have_gone_do_not_come_back(layer):
    allowed = jnp.arange(INPUTS) % 3 > 0
    found, stays = taken_out(layer, 1, 3, allowed=allowed)
    assert not (stays & ~np.asarray(allowed)).any()
    assert stays.sum() == int(allowed.sum()) - 3
    left = np.flatnonzero(stays)
    np.testing.assert_allclose(found, fitted(layer, left)[0], atol=1e-4)


def test_only_inputs_that_may_go_do(layer):
    may_go = jnp.arange(INPUTS) < 4
    _, stays = taken_out(layer, 1, 3, may_go=may_go)
    assert stays[4:].all()
    assert stays.sum() == INPUTS - 3
