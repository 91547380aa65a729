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
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

FIRST_SHARE = 0.25
"""Of the weights that stay, how many are swapped at first."""

WORTH = 1e-4
"""Relative fall of the model loss below which a round is taken back."""


class Model(Protocol):
    """The quadratic model ``δᵀFδ / 2 + ḡᵀδ`` of one step."""

    def joint_update(
        self, weights: jax.Array, kept: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Its minimum on a support [d]."""
        ...

    def multiplied(self, vector: jax.Array) -> jax.Array:
        """F v [d]."""
        ...

    def leverages(self, kept: jax.Array) -> jax.Array:
        """Values h of every weight [d]."""
        ...

    @property
    def damping(self) -> float:
        """λ."""
        ...


class Support(NamedTuple):
    """A set of weights to keep.

    Attributes:
        kept: S as True, [d].
        losses: The model loss before the first round and after each.
    """

    kept: jax.Array
    losses: tuple[float, ...]


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
    damping: float,
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


def improve(
    model: Model,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    slope: jax.Array,
    rounds: int,
) -> Support:
    """Swaps weights in and out of a support until the model loss no longer falls.

    Args:
        model: F and its inverse on supports.
        weights: w, [d].
        active: Weights that may stay, [d].
        kept: S to begin with, [d].
        targets: y, of the slope, as for the joint update [N].
        slope: ḡ, [d].
        rounds: Most rounds; each costs about as much as a joint update and a diagonal.
    """
    number = int(jnp.sum(kept))
    free = int(jnp.sum(active)) - number
    most = largest = min(max(1, int(FIRST_SHARE * number)), number, free)

    def settled(kept: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        step = jnp.where(kept, model.joint_update(weights, kept, targets), -weights)
        along = model.multiplied(step)
        return step, along + slope, float(jnp.dot(step, along / 2 + slope))

    step, uphill, best = settled(kept)
    losses = [best]
    loss = None
    for _ in range(rounds):
        if most < 1:
            break
        if loss is None:
            gain, loss = prices(
                weights + step,
                uphill,
                model.leverages(kept),
                active,
                kept,
                model.damping,
            )
        other = swapped(kept, gain, loss, jnp.asarray(most), largest)
        if bool(jnp.all(other == kept)):
            break
        step_, uphill_, found = settled(other)
        if found < best - WORTH * abs(best):
            kept, step, uphill, best, loss = other, step_, uphill_, found, None
        else:
            most //= 2
        losses.append(best)
    return Support(kept, tuple(losses))
