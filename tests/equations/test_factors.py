"""Inverse factors against NumPy in float64."""

import jax
import numpy as np

from woodfisher_jax.equations.factors import inverse_factor_by_rows, shifted_factor
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


def test_rows_of_other_scales_are_no_reason_to_refuse() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 9))
    rows *= np.logspace(0, -9, 6)[:, None]
    rows[3] = 0.0
    gram, shift = rows @ rows.T, 1e-19
    matrix = gram + shift * np.eye(6)
    scales = np.sqrt(np.diagonal(matrix))
    alike = matrix / np.outer(scales, scales)
    assert np.linalg.cond(matrix) > 1e18
    assert np.linalg.cond(alike) < 50
    with jax.enable_x64(True):
        inverse = np.asarray(shifted_factor(gram, shift)) * scales
        np.testing.assert_allclose(inverse.T @ inverse, np.linalg.inv(alike), rtol=1e-9)
        # What is ill conditioned in every scale is refused.
        repeated = np.tile(gram, (2, 2))
        assert np.isnan(np.asarray(shifted_factor(repeated, shift))).all()
