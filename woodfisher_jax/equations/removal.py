"""Groups of inputs that a layer no longer reads, its outputs kept.

Problem and letters are those of :mod:`~woodfisher_jax.equations.layerwise`: P minimises
``tr(P A Pᵀ) - 2 tr(P Bᵀ)``, here with whole columns of zeros.
"""

from functools import partial

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.layerwise import inverse_of
from woodfisher_jax.equations.precision import matmul


@partial(jax.jit, static_argnames=("number", "together"))
def without_inputs(
    weights: jax.Array,
    moment: jax.Array,
    cross: jax.Array,
    there: jax.Array,
    groups: jax.Array,
    damping: jax.Array,
    *,
    number: int,
    together: int,
) -> tuple[jax.Array, jax.Array]:
    """A layer that no longer reads some groups of its inputs, outputs kept.

    Optimal Brain Surgeon for whole groups Q of inputs, from the least-squares weights
    ``P = B A⁻¹`` on: those of lowest

        tr(P_Q ([A⁻¹]_QQ)⁻¹ P_Qᵀ)

    go, and ``P ← P - P_Q ([A⁻¹]_QQ)⁻¹ [A⁻¹]_Q``, so that P stays the least-squares
    solution on what is left; A⁻¹ follows alike.

    Args:
        weights: W, [outputs, inputs].
        moment: E[x xᵀ], [inputs, inputs].
        cross: E[z xᵀ], of the same shape.
        there: Inputs that are there, bool [inputs].
        groups: The inputs of each group that may go, [groups, size], no input twice;
            they are all there, or the group is gone already.
        damping: λ' relative to the mean of A's diagonal.
        number: Groups that go, fewer than are there.
        together: Groups that go at once.

    Returns:
        P, zero where inputs have gone, and which inputs stay, bool [inputs].

    Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089), algorithm 1, there one group
    at a time.
    """
    ridge = _ridge(moment, damping)
    wanted = matmul(weights, cross + ridge)
    stays, _ = _in_turn(wanted, moment + ridge, there, groups, number, together)
    # Once more from the start, without the rounding of all steps.
    damped = _on(stays, moment + ridge)
    return jnp.linalg.solve(damped, (wanted * stays).T).T * stays, stays


@partial(jax.jit, static_argnames=("number", "together"))
def losses_in_turn(
    weights: jax.Array,
    moment: jax.Array,
    there: jax.Array,
    groups: jax.Array,
    damping: jax.Array,
    *,
    number: int,
    together: int,
) -> jax.Array:
    """What each group of inputs adds to a layer's error when it is its turn to go.

    Groups go in the order of :func:`without_inputs`. Their losses add up to the
    least-squares error without them, unless one is below that of the group before it:
    it is then raised to that, so that losses never fall along the order.

    Args:
        weights: W, [outputs, inputs], each row times the root of what its output is
            worth.
        moment: E[x xᵀ], [inputs, inputs].
        there: Inputs that are there, bool [inputs].
        groups: The inputs of each group, as for :func:`without_inputs`.
        damping: λ' relative to the mean of A's diagonal.
        number: Groups that go, fewer than are there.
        together: Groups that go at once; they have equal losses.

    Returns:
        [groups], infinite for those that stay or are gone already.

    Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089), section 3.2.
    """
    ridge = _ridge(moment, damping)
    wanted = matmul(weights, moment + ridge)
    _, losses = _in_turn(wanted, moment + ridge, there, groups, number, together)
    return losses


def _ridge(moment: jax.Array, damping: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.diagonal(moment))
    return damping * jnp.where(mean > 0, mean, 1.0) * jnp.eye(moment.shape[0])


def _on(left: jax.Array, moment: jax.Array) -> jax.Array:
    """A on what is left, the identity elsewhere."""
    return jnp.where(left & left[:, None], moment, jnp.eye(moment.shape[0]))


def _in_turn(
    wanted: jax.Array,
    moment: jax.Array,
    there: jax.Array,
    groups: jax.Array,
    number: int,
    together: int,
) -> tuple[jax.Array, jax.Array]:
    """Takes out groups of inputs, those of the lowest loss in each step.

    Args:
        wanted: B, [outputs, inputs].
        moment: A, damped, [inputs, inputs].
        there: Inputs that are there, bool [inputs].
        groups: The inputs of each group that may go, [groups, size].
        number: Groups that go.
        together: Groups that go at once.

    Returns:
        Which inputs stay, bool [inputs], and the loss of each group when it went,
        infinite if it stays.
    """
    count, size = groups.shape
    inverse = inverse_of(_on(there, moment)[None])[0] * there * there[:, None]
    identity = jnp.eye(size)

    def step(i: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, inverse, left, known, last = state
        stays = left[groups[:, 0]]
        parts = found[:, groups]
        energy = jnp.einsum("ogi,ogj->gij", parts, parts)
        blocks = inverse[groups[:, :, None], groups[:, None, :]]
        blocks = jnp.where(stays[:, None, None], blocks, identity)
        losses = jnp.trace(jnp.linalg.solve(blocks, energy), axis1=1, axis2=2)
        ranked = jnp.argsort(jnp.where(stays, losses, jnp.inf))[:together]
        # The last step may take fewer.
        goes = jnp.arange(together) < number - i * together
        index = groups[ranked].reshape(-1)
        real = jnp.repeat(goes, size)
        columns = jnp.where(real, inverse[:, index], 0.0)
        block = jnp.where(real[:, None] & real, columns[index], jnp.eye(len(index)))
        solved = jnp.linalg.solve(block, columns.T)
        gone = jnp.where(real, found[:, index], 0.0)
        joint = jnp.sum(jnp.linalg.solve(block, gone.T) * gone.T)
        last = jnp.maximum(last, joint / jnp.sum(goes))
        known = known.at[ranked].set(jnp.where(goes, last, known[ranked]))
        found = found - matmul(gone, solved)
        inverse = inverse - matmul(columns, solved)
        left = left.at[index].set(left[index] & ~real)
        # Exactly, for what cancels leaves rounding.
        return found * left, inverse * left * left[:, None], left, known, last

    found = matmul(wanted, inverse)
    none = jnp.full(count, jnp.inf, found.dtype)
    state = (found, inverse, there, none, jnp.zeros((), found.dtype))
    state = jax.lax.fori_loop(0, -(-number // together), step, state)
    return state[2], state[3]
