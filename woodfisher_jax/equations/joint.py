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

from woodfisher_jax.equations.fisher import (
    SOLVERS,
    matmul,
    refined_product,
    relative,
    rounding_of,
)


def joint_update(
    gradients: jax.Array,
    weights: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    damping: jax.Array,
    solver: str = "sample_space",
    factor: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
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
        δ [c], and an estimate of its relative rounding error (scalar).
    """
    staying = jnp.where(kept, gradients, 0.0)
    missed = matmul(gradients, jnp.where(kept, 0.0, weights)) + targets
    update, error = least_squares(staying, missed, damping, solver, factor)
    return jnp.where(kept, update, -weights), error


def least_squares(
    gradients: jax.Array,
    values: jax.Array,
    damping: jax.Array,
    solver: str = "sample_space",
    factor: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
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
        δ [c], and an estimate of its relative rounding error (scalar).

    Example:
        >>> G, z = jnp.array([[2.0, 0.0]]), jnp.array([5.0])
        >>> wf.equations.joint.least_squares(G, z, 1.0)[0].round(4).tolist()
        [2.0, 0.0]
    """
    row = SOLVERS[solver]
    if factor is None:
        factor = row.factorize(gradients, damping)
    if solver == "sample_space":
        return _in_sample_space(factor, gradients, values, damping)
    right = matmul(values[None], gradients)[0] / gradients.shape[0]
    found, error = refined_product(row, factor, gradients, damping, right)
    # The rounding of Gᵀz leaves the span of the rows, where F⁻¹ divides it by λ.
    moved = row.product(factor, gradients, damping, rounding_of(right)[None])
    return found, jnp.maximum(error, relative(moved, found))


def _in_sample_space(
    factor: jax.Array, staying: jax.Array, missed: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gᵀa for ``(N λ I + G Gᵀ) a = z``, refined twice, and the size of the last step.

    Nothing is divided by λ, so there is no cancellation as in F⁻¹v.
    """
    shift = staying.shape[0] * damping

    def solved(right: jax.Array) -> jax.Array:
        return matmul(matmul(right, factor.T), factor)

    def product(a: jax.Array) -> jax.Array:
        return shift * a + matmul(matmul(a, staying), staying.T)

    right = missed[None]
    a = solved(right)
    a = a + solved(right - product(a))
    last = solved(right - product(a))
    update, change = matmul(jnp.concatenate([a + last, last]), staying)
    return update, relative(change, update)
