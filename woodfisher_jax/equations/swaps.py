"""Swaps: exchange pruned and kept weights while the loss of the quadratic model falls.

The statistic of Optimal Brain Surgeon ranks weights as if each were removed alone. Let
S be the set of kept weights, and x = w + δ the minimum of the model on S (the joint
update). Restoring a pruned weight j lowers the model loss, and removing a kept weight i
raises it, with the others of S adjusted, by

    gain_j = [Fδ + ḡ]_j² / (2 λ (1 + h_j))
    loss_i = x_i² λ / (2 (1 - h_i)),    h_k = g_kᵀ (N λ I + G_S G_Sᵀ)⁻¹ g_k

with g_k the column of G: λ (1 + h_j) is the Schur complement of F_SS in F, and
(1 - h_i) / λ is [F_SS⁻¹]_ii. A round swaps several weights with large gains for weights
with small losses. If the model loss does not fall, the round is undone and half as many
are swapped. (Yu, Serra, Ramalingam & Zhe, The Combinatorial Brain Surgeon, ICML 2022,
swap by the effect on pairs.)
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames="largest")
def swapped(
    kept: jax.Array,
    gain: jax.Array,
    loss: jax.Array,
    most: jax.Array,
    largest: int,
) -> jax.Array:
    """The set S after swapping the best pairs whose gain exceeds the loss.

    Args:
        kept: True on S, [d].
        gain: Gain of each weight that may be restored, -1 for the others [d].
        loss: Loss of each weight that may be removed, infinite for the others [d].
        most: Most pairs to swap.
        largest: Upper bound of ``most``, for static shapes.

    Returns:
        The new S as a mask, [d].

    Example:
        >>> from woodfisher_jax.equations.swaps import swapped
        >>> swapped(
        ...     jnp.array([True, True, False]),
        ...     jnp.array([-1.0, -1.0, 5.0]),
        ...     jnp.array([3.0, 1.0, jnp.inf]),
        ...     1,
        ...     1,
        ... ).tolist()
        [True, False, True]
    """
    gains, incoming = jax.lax.top_k(gain, largest)
    losses, outgoing = jax.lax.top_k(-loss, largest)
    chosen = (gains > -losses) & (jnp.arange(largest) < most)
    nowhere = len(kept)
    kept = kept.at[jnp.where(chosen, outgoing, nowhere)].set(False, mode="drop")
    return kept.at[jnp.where(chosen, incoming, nowhere)].set(True, mode="drop")


@jax.jit
def prices(
    point: jax.Array,
    uphill: jax.Array,
    leverages: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    damping: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Loss decrease from restoring, and increase from removing, each weight.

    Args:
        point: x, the minimum of the model on S [d].
        uphill: Gradient of the model there, Fδ + ḡ [d].
        leverages: h, [d].
        active: True for weights that may be restored, [d].
        kept: True on S, [d].
        damping: λ.

    Returns:
        Gains [d], -1 for weights that cannot be restored, and losses [d], infinite for
        weights that are not kept.
    """
    left = jnp.maximum(1.0 - leverages, jnp.finfo(leverages.dtype).eps)
    gain = uphill**2 / (2.0 * damping * (1.0 + leverages))
    loss = point**2 * damping / (2.0 * left)
    return jnp.where(active & ~kept, gain, -1.0), jnp.where(kept, loss, jnp.inf)
