"""Mean gradient, squares and traces, added up while the rows pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.rows.moments import moments
from woodfisher_jax.trees.blocks import flat_order

ROWS = np.random.default_rng(0).standard_normal((11, 10))
ORDER = flat_order({"a": jnp.ones((3, 2)), "b": jnp.ones(4)})


@pytest.mark.parametrize("cuts", [[4, 5], []])
def test_moments_do_not_depend_on_chunks(cuts) -> None:
    found = moments(jnp.float32(part) for part in np.split(ROWS, cuts))
    np.testing.assert_allclose(found.mean, ROWS.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.squares, (ROWS**2).mean(0), rtol=1e-5)
    trace = {"a": (ROWS[:, :6] ** 2).sum() / 11, "b": (ROWS[:, 6:] ** 2).sum() / 11}
    assert found.trace(ORDER) == pytest.approx(trace, rel=1e-5)
