"""Programs of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.driver import programs
from woodfisher_jax.trees import vectors
from woodfisher_jax.trees.blocks import flat_order

PARAMS = {"w": jnp.asarray([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.ones(2)}
MASKS = {"w": jnp.asarray([[True, False], [True, True]])}


def test_it_is_the_function() -> None:
    order = flat_order(MASKS)
    found = programs.to_vectors(PARAMS, MASKS, order)
    np.testing.assert_array_equal(found[1], [1.0, 0.0, 3.0, 0.5])
    expected = vectors.to_vectors({"w": PARAMS["w"]}, MASKS, order)
    np.testing.assert_array_equal(found[1], expected[1])


def test_vectors_go_back_into_the_tree_and_nothing_else_changes() -> None:
    order = flat_order(MASKS)
    params, weights, mask = programs.to_vectors(PARAMS, MASKS, order)
    np.testing.assert_array_equal(params["w"], [[1.0, 0.0], [3.0, 0.5]])
    new, masks = programs.from_vectors(params, 2 * weights, mask, order)
    np.testing.assert_array_equal(new["w"], [[2.0, 0.0], [6.0, 1.0]])
    assert new["b"] is PARAMS["b"]
    np.testing.assert_array_equal(masks["w"], MASKS["w"])


def test_leaves_of_numpy_become_those_of_jax() -> None:
    given = PARAMS | {"b": np.ones(2)}
    params, _, _ = programs.to_vectors(given, MASKS, flat_order(MASKS))
    assert isinstance(params["b"], jax.Array)
