"""One file for each kind of curvature, built from the loss and the samples."""

from woodfisher_jax.curvature.checked import (
    CurvatureError,
    inverse_diagonals,
    inverse_products,
)

__all__ = ["CurvatureError", "inverse_diagonals", "inverse_products"]
