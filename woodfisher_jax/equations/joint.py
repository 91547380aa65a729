"""The joint update: the weights that stay, at the minimum of the quadratic model.

Optimal Brain Surgeon gives the best answer to the removal of one weight. For many,
WoodFisher adds the answers up, as if each weight went alone. The joint update takes
them together: with the set S that stays and the set P that goes,

    minimize  δᵀ F δ / 2 + ḡᵀ δ    subject to  δ_P = -w_P

(Kurtic et al., The Optimal BERT Surgeon, arXiv:2203.07259, Eq. 2, for all of P.) Since
F = λ I + GᵀG / N, the answer lies in the span of the gradients' columns on S, and one
system of N equations gives it; no matrix of the size of the weights is formed.
"""

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.fisher import SOLVERS, matmul, refined_product


def joint_update(
    gradients: jax.Array,
    weights: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    damping: jax.Array,
    solver: str = "sample_space",
    factor: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The minimizer of one block's quadratic model, all other weights at zero.

    With ``z = G_P w_P + y``, what the gradients miss when P goes,

        δ_S = G_Sᵀ (N λ I + G_S G_Sᵀ)⁻¹ z = (λ I + G_SᵀG_S / N)⁻¹ G_Sᵀ z / N
        δ_P = -w_P

    where y stands for the slope of the loss: ``ḡ = -Gᵀy / N``. So y = 0 leaves it out,
    y = -1 takes the mean of these gradients, and with rows ``g_n = ∇(r_n · f(w, x_n))``
    of a network's outputs f, ``y_n = r_n · (f* - f)`` moves them towards f*: δ is then
    the damped least-squares solution of ``G δ = y`` on S.

    Args:
        gradients: G, [N, c], zero for weights that are pruned already.
        weights: w, [c].
        kept: S as True, [c].
        targets: y, [N].
        damping: λ > 0.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`; the first
            form for "sample_space", the second for the others.
        factor: The solver's own of G_S, where it is known already; default formed.

    Returns:
        δ [c], and an estimate of its relative rounding error (scalar).
    """
    staying = jnp.where(kept, gradients, 0.0)
    missed = matmul(gradients, jnp.where(kept, 0.0, weights)) + targets
    if factor is None:
        factor = SOLVERS[solver].factorize(staying, damping)
    if solver == "sample_space":
        update, error = _in_sample_space(factor, staying, missed, damping)
    else:
        slope = matmul(missed[None], staying)[0] / gradients.shape[0]
        row = SOLVERS[solver]
        update, error = refined_product(row, factor, staying, damping, slope)
    return jnp.where(kept, update, -weights), error


def _in_sample_space(
    factor: jax.Array, staying: jax.Array, missed: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gᵀa for ``(N λ I + G Gᵀ) a = z``, refined twice, and the size of the last step.

    The identity is never divided by λ, so nothing cancels as it does in F⁻¹v.
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
    largest = jnp.max(jnp.abs(update))
    return update, jnp.max(jnp.abs(change)) / jnp.where(largest > 0, largest, 1.0)
