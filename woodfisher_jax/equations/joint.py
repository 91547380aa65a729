"""The joint update: the kept weights at the minimum of the quadratic model.

Optimal Brain Surgeon gives the best update for the removal of one weight. For many,
WoodFisher adds these updates, as if each weight were removed alone. The joint update
removes them together: with the set S of kept and the set P of pruned weights,

    minimize  δᵀ F δ / 2 + ḡᵀ δ    subject to  δ_P = -w_P

(Kurtic et al., The Optimal BERT Surgeon, arXiv:2203.07259, Eq. 2, for all of P.) Since
F = λ I + GᵀG / N, the solution on S lies in the span of the rows of G_S, and one system
of N equations gives it; no matrix of the size of the weights is formed.
"""

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.fisher import SOLVERS
from woodfisher_jax.equations.precision import in_float64, matmul, wide
from woodfisher_jax.equations.products import along_rows, sum_of_rows


@in_float64
def joint_update(
    gradients: jax.Array,
    weights: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    damping: jax.Array,
    solver: str = "sample_space",
    factor: jax.Array | None = None,
) -> jax.Array:
    """The minimizer of one block's quadratic model with the pruned weights at zero.

    With the right-hand side ``z = G_P w_P + y``,

        δ_S = G_Sᵀ (N λ I + G_S G_Sᵀ)⁻¹ z = (λ I + G_SᵀG_S / N)⁻¹ G_Sᵀ z / N
        δ_P = -w_P

    where y gives the first-order term: ``ḡ = -Gᵀy / N``. So y = 0 omits it and y = -1
    is the mean of these gradients. With rows ``g_n = ∇(r_n · f(w, x_n))`` of a
    network's outputs f, ``y_n = r_n · (f* - f)`` moves the outputs towards f*: δ is
    then the damped least-squares solution of ``G δ = y`` on S.

    Args:
        gradients: G, [N, c], zero for weights that are pruned already.
        weights: w, [c].
        kept: True on S, [c].
        targets: y, [N].
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`; the first
            form is computed for "sample_space", the second for the others.
        factor: The solver's factor of G_S, if it is known; default: it is computed.

    Returns:
        δ [c], in the dtype of the gradients; NaN where F is too ill conditioned.
    """
    staying = jnp.where(kept, gradients, 0.0)
    gone = wide(jnp.where(kept, 0.0, weights))
    missed = along_rows(gradients, gone) + targets
    update = least_squares(staying, missed, damping, solver, factor)
    return jnp.where(kept, update, -weights)


@in_float64
def joint_update_of_few(
    gradients: jax.Array,
    weights: jax.Array,
    columns: jax.Array,
    targets: jax.Array,
    damping: jax.Array,
    factor: jax.Array | None = None,
) -> jax.Array:
    """:func:`joint_update` by the sample-space solver for a set S of few columns.

    The same formula with G_S as a matrix of its own, [N, s], in place of G with zeros.

    Args:
        gradients: G, [N, c].
        weights: w, [c].
        columns: S, [s], each once; c is padding.
        targets: y, [N].
        damping: λ > 0.
        factor: The factor of G_S, if it is known; default: it is computed.

    Returns:
        δ [c], in the dtype of the gradients; NaN where F is too ill conditioned.

    Example:
        >>> G, w = jnp.array([[1.0, 1.0]]), jnp.array([3.0, 2.0])
        >>> wf.equations.joint.joint_update_of_few(
        ...     G, w, jnp.array([0]), jnp.zeros(1), 1.0
        ... ).tolist()
        [1.0, -2.0]
    """
    gone = wide(weights.at[columns].set(0.0, mode="drop"))
    missed = along_rows(gradients, gone) + targets
    few = columns_at(gradients, columns)
    update = least_squares(few, missed, damping, factor=factor)
    return (-weights).at[columns].set(update, mode="drop")


def columns_at(gradients: jax.Array, columns: jax.Array) -> jax.Array:
    """G_S, [N, s], of columns S of G [N, c]; zeros where a column is c, padding."""
    return jnp.take(gradients, columns, axis=1, mode="fill", fill_value=0)


@in_float64
def least_squares(
    gradients: jax.Array,
    values: jax.Array,
    damping: jax.Array,
    solver: str = "sample_space",
    factor: jax.Array | None = None,
) -> jax.Array:
    """The damped solution δ of ``G δ = z``, in the span of the rows of G.

        δ = Gᵀ (N λ I + G Gᵀ)⁻¹ z = F⁻¹ Gᵀz / N

    So the Newton step h = F⁻¹ḡ is -δ with z = y, for ``ḡ = -Gᵀy / N``.

    Args:
        gradients: G, [N, c].
        values: z, [N].
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`; the first
            form is computed for "sample_space", the second for the others.
        factor: The solver's factor of G, if it is known; default: it is computed.

    Returns:
        δ [c], in the dtype of the gradients; NaN where F is too ill conditioned.

    Example:
        >>> G, z = jnp.array([[2.0, 0.0]]), jnp.array([5.0])
        >>> wf.equations.joint.least_squares(G, z, 1.0).round(4).tolist()
        [2.0, 0.0]
    """
    row = SOLVERS[solver]
    if factor is None:
        factor = row.factorize(gradients, damping)
    values = wide(values)
    if solver == "sample_space":
        # Nothing is divided by λ, so there is no cancellation as in F⁻¹v.
        solved = matmul(factor.T, matmul(factor, values[:, None]))[:, 0]
        return sum_of_rows(solved, gradients).astype(gradients.dtype)
    right = sum_of_rows(values, gradients) / len(gradients)
    return row.product(factor, gradients, damping, right)
