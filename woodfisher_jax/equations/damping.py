"""Damping chosen by leaving one gradient out: no tuning, no held-out data.

The damped quadratic model predicts what a gradient says of a step from what the others
say. With rows g_n, values b_n that the step is to have along them, and

    S = N λ I + G Gᵀ

the error of that prediction for row n, fitted to all rows but n, is

    e_n = [S⁻¹ b]_n / [S⁻¹]_nn

(Golub, Heath & Wahba, Generalized Cross-Validation, 1979, Eq. 1.4, which divides by the
mean of the diagonal in place of each entry). So the mean of e_n² over a path of
dampings costs one eigendecomposition of N x N. The shift N λ is a ratio of variances,
noise to signal, whatever N is; so a thousand of many rows are asked, and the others
take the shift that these chose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.equations.fisher import matmul

MULTIPLES = tuple(float(10.0**x) for x in np.arange(-4.0, 1.01, 0.25))
"""Dampings tried: N λ in units of the mean eigenvalue of G Gᵀ."""

MOST_ROWS = 1000
"""Rows that are asked; an eigendecomposition of 4,000 takes longer than the step."""


class ChosenDamping(NamedTuple):
    """A damping, and how good it is.

    Attributes:
        damping: λ.
        multiple: N λ in units of the mean eigenvalue of G Gᵀ; one of MULTIPLES.
        error: Mean of e_n² over that of b_n²: 0 where each row is predicted from the
            others, 1 and more where nothing is learned from them.
    """

    damping: float
    multiple: float
    error: float


def leave_one_out_residuals(
    gram: jax.Array, right: jax.Array, shifts: jax.Array
) -> jax.Array:
    """``e_n = [S⁻¹ b]_n / [S⁻¹]_nn`` with ``S = s I + G Gᵀ``, for each shift s.

    Args:
        gram: G Gᵀ, [N, N].
        right: b, [N].
        shifts: s = N λ > 0, [k].

    Returns:
        Array [k, N].
    """
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0.0)  # Rounding makes the smallest negative.
    along, squares = matmul(right[None], vectors)[0], vectors * vectors

    def residuals(shift: jax.Array) -> jax.Array:
        inverse = 1.0 / (values + shift)
        solved = matmul(vectors, (along * inverse)[:, None])[:, 0]
        return solved / matmul(squares, inverse[:, None])[:, 0]

    return jax.lax.map(residuals, shifts)


@jax.jit
def _errors(
    gram: jax.Array, right: jax.Array, multiples: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    every = -(-len(right) // MOST_ROWS)
    gram, right = gram[::every, ::every], right[::every]
    mean = jnp.trace(gram) / gram.shape[0]
    left = leave_one_out_residuals(gram, right, mean * multiples)
    return mean, jnp.mean(left * left, axis=1), jnp.mean(right * right)


def choose_damping(
    gram: jax.Array, right: jax.Array, least: float = 0.0
) -> ChosenDamping:
    """The damping of MULTIPLES with the smallest leave-one-out error.

    Args:
        gram: G Gᵀ, [N, N], N at least 2; evenly spaced rows of more than MOST_ROWS.
        right: b, [N]: what the step is to be along each row; all zero tells nothing.
        least: Multiples below it are not taken; default all are.

    Raises:
        ValueError: If gradients or b are all zero, or not finite.
    """
    mean, errors, square = _errors(gram, right, jnp.asarray(MULTIPLES, jnp.float32))
    if len(right) < 2 or not (0 < float(mean) < np.inf and 0 < float(square) < np.inf):
        raise ValueError(
            "damping='auto' compares what two or more gradients say of the weights "
            f"that go; there are {len(right)}, of mean square {float(mean):.3g}, and "
            f"they say {float(square) ** 0.5:.3g} of them: give a number, such as 1e-5"
        )
    allowed = np.isfinite(errors) & (np.asarray(MULTIPLES) >= least)
    best = int(np.argmin(np.where(allowed, errors, np.inf)))
    multiple = MULTIPLES[best]
    damping = float(mean) * multiple / len(right)
    return ChosenDamping(damping, multiple, float(errors[best]) / float(square))
