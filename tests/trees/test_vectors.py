"""Pytrees as flat vectors and back, and errors that name the tensor."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.trees.blocks import flat_order
from woodfisher_jax.trees.vectors import (
    check_finite,
    check_weights,
    from_vectors,
    to_vectors,
)

PARAMS = {
    "b": jnp.arange(3.0),
    "w": jnp.arange(1.0, 7.0, dtype=jnp.bfloat16).reshape(2, 3),
}
MASKS = {"w": jnp.asarray([[True, False, True], [True, True, False]])}
ORDER = flat_order(MASKS)


def test_there_and_back() -> None:
    params, weights, active = to_vectors(PARAMS, MASKS, ORDER)
    np.testing.assert_array_equal(weights, [1, 0, 3, 4, 5, 0])
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(active, [1, 0, 1, 1, 1, 0])
    kept = active.at[0].set(False)
    new, masks = from_vectors(params, 2 * weights, kept, ORDER)
    np.testing.assert_array_equal(new["w"], [[0, 0, 6], [8, 10, 0]])
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["b"], PARAMS["b"])
    np.testing.assert_array_equal(masks["w"], [[0, 0, 1], [1, 1, 0]])


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"params\['b'\] holds nan or inf"):
        check_weights(PARAMS | {"b": jnp.asarray([0.0, jnp.nan])})
    two = flat_order({"a": jnp.ones(2), "c": jnp.ones(3)})
    check_finite(jnp.ones(5), two, "the score of", "it")
    with pytest.raises(ValueError, match="the score of 'c' is not finite: it over"):
        check_finite(jnp.ones(5).at[2].set(jnp.inf), two, "the score of", "it")
