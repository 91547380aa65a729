"""Groups under Kronecker factors against the explicit product."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.curvature.kronecker_groups import kronecker_saliencies
from woodfisher_jax.equations.kronecker import Factor
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees.blocks import flat_order, unflatten


@pytest.mark.parametrize("several", [False, True])
def test_kronecker_factors_give_what_their_product_does(several):
    """Of a layer of two groups of channels, read in another order than its factors."""
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 5, 5)), rng.normal(size=(2, 4, 4))
    inputs, outputs = (m @ np.swapaxes(m, 1, 2) + np.eye(m.shape[1]) for m in roots)
    kernel, bias = np.arange(32).reshape(4, 2, 4), np.arange(8).reshape(2, 4, 1)
    # [inputs, groups, outputs]: entries are by group, output and input.
    entries = {"kernel": kernel.transpose(1, 2, 0), "bias": bias}
    shapes = {"kernel": (4, 2, 4), "bias": (8,)}
    factor = Factor(inputs, outputs, entries, shapes)
    order = flat_order({path: np.ones(shape) for path, shape in shapes.items()})
    weights = rng.normal(size=order.size)
    of = rng.permutation(np.arange(order.size) // 4)
    slots = np.array([np.sum(of[:i] == number) for i, number in enumerate(of)])
    removals = np.array([[0, 1], [1, 3], [0, 3]]) if several else None
    groups = Groups(of, slots, 10, np.zeros(10), removals)
    found = kronecker_saliencies({"kernel": factor}, weights, order, groups)

    places = unflatten(order, jnp.arange(order.size))
    by_factor = np.concatenate(
        [np.asarray(places[p]).reshape(-1)[e] for p, e in entries.items()], axis=-1
    )
    inverse = np.zeros((order.size, order.size))
    for number in range(2):
        mine = by_factor[number].reshape(-1)
        inverse[np.ix_(mine, mine)] = np.kron(outputs[number], inputs[number])
    for number in range(groups.number):
        members = np.flatnonzero(of == number)
        for choice, value in enumerate(found[number]):
            group = members if removals is None else members[removals[choice]]
            part = weights[group]
            expected = part @ np.linalg.solve(inverse[np.ix_(group, group)], part) / 2
            assert value == pytest.approx(expected)
