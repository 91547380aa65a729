"""Pytrees as flat vectors and back, and errors that name the tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.trees.blocks import flat_order
from woodfisher_jax.trees.vectors import (
    all_finite,
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
LEAVES = {"w": PARAMS["w"]}
ORDER = flat_order(MASKS)


def test_vectors_are_the_masked_weights_and_go_back_in_their_dtype() -> None:
    leaves, weights, active = to_vectors(LEAVES, MASKS, ORDER)
    np.testing.assert_array_equal(leaves["w"], [[1, 0, 3], [4, 5, 0]])
    np.testing.assert_array_equal(weights, [1, 0, 3, 4, 5, 0])
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(active, [1, 0, 1, 1, 1, 0])
    kept = active.at[0].set(False)
    new, masks = from_vectors(leaves, 2 * weights, kept, ORDER)
    np.testing.assert_array_equal(new["w"], [[0, 0, 6], [8, 10, 0]])
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(masks["w"], [[0, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_weight_that_nothing_moves_keeps_its_bits(dtype: str) -> None:
    with jax.enable_x64(True):
        w = jnp.asarray([[1 / 3, 1e-3, -1e-5], [np.pi, -0.0, 2e4]], dtype)
        leaves, weights, active = to_vectors({"w": w}, MASKS, ORDER)
        new, _ = from_vectors(leaves, weights.at[0].add(1.0), active, ORDER)
        assert new["w"].dtype == w.dtype
        stays = np.array([[False, False, True], [True, True, False]])
        bits = [np.asarray(a)[stays].tobytes() for a in (new["w"], w)]
        assert bits[0] == bits[1]
        assert float(new["w"][0, 0]) == pytest.approx(4 / 3, rel=1e-2)


@pytest.mark.parametrize("shape", [(1,), (5000,), (32, 192)])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_no_number_that_is_not_finite_is_overlooked(shape, value) -> None:
    """The maximum of XLA on a CPU overlooks NaN in arrays of the larger shapes."""
    sound = jax.jit(all_finite)
    assert sound(jnp.full(shape, 3e38))
    assert not sound(jnp.full(shape, value))
    assert not sound(jnp.zeros(shape).at[(-1,) * len(shape)].set(value))


def test_what_is_not_finite_is_named() -> None:
    for value in (jnp.nan, jnp.inf):
        broken = PARAMS | {"b": jnp.asarray([0.0, value, 1.0])}
        with pytest.raises(ValueError, match=r"params\['b'\] .* nan or inf"):
            check_weights(broken)
    masked = {"w": PARAMS["w"].at[0, 1].set(jnp.nan)}
    check_weights(to_vectors(masked, MASKS, ORDER)[0])
    two = flat_order({"a": jnp.ones(2), "c": jnp.ones(3)})
    check_finite(jnp.ones(5), two, "the score of", "it")
    with pytest.raises(ValueError, match="the score of 'c' is not finite: it over"):
        check_finite(jnp.ones(5).at[2].set(jnp.inf), two, "the score of", "it")
