"""A better set of weights to keep: swaps on the quadratic model.

The statistic of Optimal Brain Surgeon ranks weights as if each went alone. With the set
S that stays, and x = w + δ at the minimum of the model on S (the joint update), taking
in a weight j that is out lowers the model loss, and giving up a weight i that stays
raises it, with the others of S making up for either, by

    gain_j = [Fδ + ḡ]_j² / (2 λ (1 + h_j))
    loss_i = x_i² λ / (2 (1 - h_i)),    h_k = g_kᵀ (N λ I + G_S G_Sᵀ)⁻¹ g_k

with g_k the column of G: λ (1 + h_j) is the Schur complement of F_SS in F, and
(1 - h_i) / λ is [F_SS⁻¹]_ii. So weights of a large gain take the places of weights of a
small loss, several at once, and the model decides: a round that does not lower its loss
is taken back and half as many are swapped. (Yu, Serra, Ramalingam & Zhe, The
Combinatorial Brain Surgeon, ICML 2022, swap by the effect on pairs.)
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
    """The support with the best pairs swapped, as long as a pair's gain is the larger.

    Args:
        kept: S as True, [d].
        gain: Of weights that may come in; -1 for the others [d].
        loss: Of weights that may go; infinite for the others [d].
        most: Pairs at most.
        largest: Bound of ``most``, for the shapes.

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
    """What a weight is worth that comes in, and what one costs that goes [d].

    Args:
        point: x, the minimum on the support [d].
        uphill: Fδ + ḡ there [d].
        leverages: h, [d].
        active: Weights that may come in, [d].
        kept: S as True, [d].
        damping: λ.

    Returns:
        Gains, -1 for what may not come in, and losses, infinite for what is not there.
    """
    left = jnp.maximum(1.0 - leverages, jnp.finfo(leverages.dtype).eps)
    gain = uphill**2 / (2.0 * damping * (1.0 + leverages))
    loss = point**2 * damping / (2.0 * left)
    return jnp.where(active & ~kept, gain, -1.0), jnp.where(kept, loss, jnp.inf)
