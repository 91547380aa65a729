"""Damping chosen by leave-one-out cross-validation over the gradients.

The step δ is a damped least-squares solution of ``G δ = b``, with the gradients as rows
of G and a right-hand side b. Fitted to all rows but n, with

    S = N λ I + G Gᵀ

its error in row n is

    e_n = [S⁻¹ b]_n / [S⁻¹]_nn

(Golub, Heath & Wahba, Generalized Cross-Validation, 1979, Eq. 1.4, which divides by the
mean of the diagonal instead of each entry). So the mean of e_n² over a path of dampings
costs one eigendecomposition of N x N, and no data is held out. The shift N λ is a ratio
of variances, noise to signal, which does not depend on N: the best shift for a thousand
rows is used for more rows as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.equations.factors import inverse_factor_by_rows
from woodfisher_jax.equations.precision import in_float64, matmul, wide

MULTIPLES = tuple(float(10.0**x) for x in np.arange(-4.0, 1.01, 0.25))
"""Dampings tried: N λ in units of the mean eigenvalue of G Gᵀ."""

MOST_ROWS = 1000
"""Most rows in the search; an eigendecomposition of 4,000 outlasts the whole step."""


class ChosenDamping(NamedTuple):
    """A damping and its leave-one-out error.

    Attributes:
        damping: λ.
        multiple: N λ in units of the mean eigenvalue of G Gᵀ; one of MULTIPLES.
        error: Mean of e_n² divided by the mean of b_n²: 0 where each row is predicted
            exactly from the others, 1 or more where they do not predict it.
    """

    damping: float
    multiple: float
    error: float


def leave_one_out_residuals(
    gram: jax.Array, right: jax.Array, shifts: jax.Array
) -> jax.Array:
    """``e_n = [S⁻¹ b]_n / [S⁻¹]_nn`` with ``S = s I + G Gᵀ``, for each shift s.

    By one eigendecomposition; on a TPU, whose compiler takes minutes for one in
    float64, by a factor for each shift (:func:`residuals_by_factors`).

    Args:
        gram: G Gᵀ, [N, N].
        right: b, [N].
        shifts: s = N λ > 0, [k].

    Returns:
        Array [k, N].
    """
    return jax.lax.platform_dependent(
        gram, right, shifts, tpu=residuals_by_factors, default=_residuals_by_eigenvalues
    )


def residuals_by_factors(
    gram: jax.Array, right: jax.Array, shifts: jax.Array
) -> jax.Array:
    """The same with ``S⁻¹ = L⁻ᵀ L⁻¹``; NaN for a shift that is lost in rounding."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)

    def one(shift: jax.Array) -> jax.Array:
        inverse = inverse_factor_by_rows(gram + shift * identity)
        solved = matmul(matmul(right[None], inverse.T), inverse)[0]
        return solved / jnp.sum(inverse * inverse, axis=0)

    return jax.lax.map(one, shifts)


def _residuals_by_eigenvalues(
    gram: jax.Array, right: jax.Array, shifts: jax.Array
) -> jax.Array:
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0.0)  # Rounding may make the smallest negative.
    along, squares = matmul(right[None], vectors)[0], vectors * vectors

    # Of all shifts at once: [k, N] entries are few beside [N, N].
    inverses = 1.0 / (values + shifts[:, None])
    solved = matmul(along * inverses, vectors.T)
    return solved / matmul(inverses, squares.T)


NO_GRADIENTS = (
    "no weight has a gradient (a curvature, for naivehess) in any of the samples, or "
    "its square is below 1e-38, so that they rank nothing, whatever the damping. With "
    "batch norm in training mode the gradient of one example is zero: use running "
    "averages; with a contrastive loss too: use batch_size above 1. Else look for "
    "samples (inputs) that are all zero, units that are dead, stop_gradient, or a "
    "function that does not use its params"
)
"""What is said where the outputs or the loss do not depend on the weights."""


class LeaveOneOut(NamedTuple):
    """What :func:`choose_damping` takes of the rows, float64.

    Attributes:
        mean: Mean eigenvalue of G Gᵀ.
        errors: Mean of e_n² for each of MULTIPLES.
        square: Mean of b_n².
    """

    mean: jax.Array
    errors: jax.Array
    square: jax.Array


@jax.jit
@in_float64
def leave_one_out(gram: jax.Array, right: jax.Array) -> LeaveOneOut:
    """The leave-one-out error of every damping of MULTIPLES; pure.

    Args:
        gram: G Gᵀ, [N, N]; where N exceeds MOST_ROWS, evenly spaced rows are used.
        right: b, [N].
    """
    every = -(-len(right) // MOST_ROWS)
    gram, right = wide(gram)[::every, ::every], wide(right)[::every]
    mean = jnp.trace(gram) / gram.shape[0]
    left = leave_one_out_residuals(gram, right, mean * wide(MULTIPLES))
    return LeaveOneOut(mean, jnp.mean(left * left, axis=1), jnp.mean(right * right))


def choose_damping(
    found: LeaveOneOut, num_samples: int, least: float = 0.0
) -> ChosenDamping:
    """The damping of MULTIPLES with the smallest leave-one-out error.

    Args:
        found: Of the rows. Where b is zero, any damping predicts it.
        num_samples: N, at least 2.
        least: Smallest multiple to choose; default no limit.

    Raises:
        ValueError: If N is below 2, gradients are all zero, or they or b not finite.
    """
    mean, square = float(found.mean), float(found.square)
    if mean == 0:
        raise ValueError(NO_GRADIENTS)
    if num_samples < 2 or not (0 < mean < np.inf and square < np.inf):
        raise ValueError(
            "damping='auto' needs at least 2 gradients that are finite, and a finite "
            f"right-hand side; got N={num_samples}, mean squared norm {mean:.3g}, root "
            f"mean square of the right-hand side {square**0.5:.3g}; give a number, "
            "such as damping=1e-5"
        )
    errors = np.asarray(found.errors)
    allowed = np.isfinite(errors) & (np.asarray(MULTIPLES) >= least)
    best = int(np.argmin(np.where(allowed, errors, np.inf)))
    multiple = MULTIPLES[best]
    error = float(errors[best]) / square if square else 0.0
    return ChosenDamping(mean * multiple / num_samples, multiple, error)
