"""Products of wide blocks against NumPy in float64."""

import jax
import numpy as np

from woodfisher_jax.equations.products import along_rows, gram_matrix, leverages


def test_columns_of_zeros_that_fill_the_last_panel_add_nothing() -> None:
    rows = np.random.default_rng(2).standard_normal((3, 2051)).astype(np.float32)
    exact = rows.astype(np.float64)
    vector = exact[0] + 1
    with jax.enable_x64(True):
        np.testing.assert_allclose(gram_matrix(rows), exact @ exact.T, rtol=1e-12)
        np.testing.assert_allclose(along_rows(rows, vector), exact @ vector, rtol=1e-12)
        lower = np.tril(np.ones((3, 3)))
        squares = np.sum((lower @ exact) ** 2, axis=0)
        np.testing.assert_allclose(leverages(lower, exact), squares, rtol=1e-12)
