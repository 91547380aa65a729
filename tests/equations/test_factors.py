"""Inverse factors against NumPy in float64."""

import jax
import numpy as np

from woodfisher_jax.equations.factors import inverse_factor_by_rows
from woodfisher_jax.equations.precision import in_float64


def test_the_factor_of_tpus_is_that_of_cholesky() -> None:
    g = np.random.default_rng(0).standard_normal((40, 60))
    matrix = g @ np.diag(np.logspace(0, -2, 60)) @ g.T + 1e-6 * np.eye(40)
    found = in_float64(jax.jit(inverse_factor_by_rows))(matrix)
    assert found.dtype == np.float64
    wanted = np.linalg.inv(np.linalg.cholesky(matrix))
    np.testing.assert_allclose(found, wanted, atol=1e-11 * np.abs(wanted).max())
    # A matrix without a factor has none here.
    none = in_float64(jax.jit(inverse_factor_by_rows))(-matrix)
    assert np.isnan(np.asarray(none)).any()
