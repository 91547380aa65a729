"""Rounds of swaps between weights that stay and weights that are pruned."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.equations.swaps import prices, swapped

FIRST_SHARE = 0.25
"""Of the weights that stay, how many are swapped at first."""

WORTH = 1e-4
"""Relative fall of the model loss below which a round is taken back."""


class Support(NamedTuple):
    """A set of weights to keep.

    Attributes:
        kept: S as True, [d].
        losses: The model loss before the first round and after each.
    """

    kept: jax.Array
    losses: tuple[float, ...]


def improve(
    fisher: InverseFisher,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    slope: jax.Array,
    rounds: int,
) -> Support:
    """Swaps weights in and out of a support until the model loss no longer falls.

    Args:
        fisher: F and its inverse on supports.
        weights: w, [d].
        active: Weights that may stay, [d].
        kept: S to begin with, [d].
        targets: y, of the slope, as for the joint update [N].
        slope: ḡ, [d].
        rounds: Most rounds; each costs about as much as a joint update and a diagonal.
    """
    # Factors that are known are those of another support.
    fisher = dataclasses.replace(fisher, known=None, grams=None)
    number = int(jnp.sum(kept))
    free = int(jnp.sum(active)) - number
    most = largest = min(max(1, int(FIRST_SHARE * number)), number, free)

    def settled(kept: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        found = fisher.joint_update(weights, kept, targets).value
        step = jnp.where(kept, found, -weights)
        along = fisher.multiplied(step)
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
                fisher.leverages(kept),
                active,
                kept,
                fisher.damping,
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
