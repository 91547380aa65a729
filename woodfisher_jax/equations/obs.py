"""Optimal Brain Surgeon and Damage: saliencies and updates, elementwise."""

import jax
import jax.numpy as jnp


def magnitude(weights: jax.Array) -> jax.Array:
    """Magnitude saliency: ``|w|``.

    Example:
        >>> wf.obs.magnitude(jnp.array([-2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    return jnp.abs(weights)


def obd_saliency(weights: jax.Array, fisher_diagonal: jax.Array) -> jax.Array:
    """Loss increase when a weight is removed and no other changes: ``F_qq w_q² / 2``.

    Optimal Brain Damage (LeCun et al., 1989, Eq. 5) with the diagonal of the empirical
    Fisher in place of the Hessian's.

    Note: the original adds 1e-4, which in float32 turns small saliencies into ties;
    there is no offset here.

    Args:
        weights: w, [c].
        fisher_diagonal: diag(F), [c].

    Returns:
        Array [c].

    Example:
        >>> wf.obs.obd_saliency(jnp.array([2.0, 1.0]), jnp.array([0.5, 8.0])).tolist()
        [1.0, 4.0]
    """
    return 0.5 * fisher_diagonal * weights * weights


def obs_saliency(weights: jax.Array, inverse_diagonal: jax.Array) -> jax.Array:
    """Loss increase when a weight is removed and all others adjust.

    ``ρ_q = w_q² / (2 [F⁻¹]_qq)``

    WoodFisher (arXiv:2004.14340), Eq. 4.

    Note: the original omits the factor 1/2, which does not change the mask, and adds
    1e-10 to numerator and denominator.

    With a first-order term ḡ, pass ``w - h``, ``h = F⁻¹ḡ``, the minimum of the
    quadratic model, in place of w: the loss rises by ``(w_q - h_q)² / (2 [F⁻¹]_qq)``
    less ``ḡᵀh / 2``, which is the same for all q.

    Args:
        weights: w, [c].
        inverse_diagonal: diag(F⁻¹), [c], positive.

    Returns:
        Array [c].

    Example:
        A large weight in a flat direction has a lower saliency than a small one in a
        steep direction:

        >>> wf.obs.obs_saliency(jnp.array([2.0, 1.0]), jnp.array([8.0, 0.25])).tolist()
        [0.25, 2.0]
    """
    return weights * weights / (2.0 * inverse_diagonal)


def obs_direction(
    weights: jax.Array, inverse_diagonal: jax.Array, newly_pruned: jax.Array
) -> jax.Array:
    """The vector b whose product with F⁻¹ is the sum of single-weight OBS updates.

    ``b_q = -w_q / [F⁻¹]_qq`` for each weight q that is pruned, 0 elsewhere; then
    ``δw = F⁻¹ b = -Σ_q w_q F⁻¹ e_q / [F⁻¹]_qq`` (WoodFisher, Eq. 4, summed over q).
    With a first-order term pass ``w - h``, see :func:`obs_saliency`; then
    ``δw = F⁻¹ b - h``.

    Args:
        weights: w, [c].
        inverse_diagonal: diag(F⁻¹), [c], positive.
        newly_pruned: True for the weights that this step prunes, [c].

    Returns:
        Array [c].

    Example:
        >>> pruned = jnp.array([True, False])
        >>> w, diagonal = jnp.array([2.0, 1.0]), jnp.array([8.0, 0.25])
        >>> wf.obs.obs_direction(w, diagonal, pruned).tolist()
        [-0.25, 0.0]
    """
    return jnp.where(newly_pruned, -weights / inverse_diagonal, 0.0)
