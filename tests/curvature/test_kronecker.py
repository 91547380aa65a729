"""What the curvature of Kronecker factors refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.curvature.kronecker import KroneckerInverse
from woodfisher_jax.equations.kronecker import Factor
from woodfisher_jax.trees.blocks import flat_order


def test_a_joint_update_that_is_not_solved_is_refused() -> None:
    """Factors of which the inverses are not those: the iteration cannot end."""
    places = np.arange(6).reshape(1, 2, 3)
    shapes = {"w": (2, 3)}
    outputs = np.array([[[2.0, 1.0], [1.0, 2.0]]])
    own = Factor(np.eye(3)[None], outputs, {"w": places}, shapes)
    wrong = own._replace(inputs=np.full((1, 3, 3), np.nan))
    order = flat_order({"w": np.ones((2, 3), bool)})
    found = KroneckerInverse({"w": own}, {"w": wrong}, order)
    kept = jnp.array([True, False, True, True, True, False])
    with pytest.raises(CurvatureError, match=r"residual of .*; raise damping"):
        found.joint_update(jnp.ones(6), kept, jnp.zeros(1))
