"""Batch-norm statistics of a pruned network, estimated again in any framework."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.rows.gradients import as_partial
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import Batch, batch_length, is_batch

State = Any
"""Any pytree; its floating-point arrays are the statistics."""

MANY = 1_000_000
"""Updates after which no running average remembers where it began."""

TOLERANCE = 1e-2
"""Of a statistic that should not change; the rounding of momentum 0.999 is 1e-4."""


def reestimate(
    update_fn: Callable[[Params, State, Batch], State],
    params: Params,
    state: State,
    batches: Iterable[Batch],
) -> State:
    """Running statistics of a network as it is now, in place of what training left.

    The mean over batches of their statistics, each weighted with its number of
    examples: what PyTorch's ``momentum=None`` gives after one pass. The running average
    ``a · old + (1 - a) · batch`` of each layer is solved for the statistic of the
    batch, with a its slope in the old one; so neither the momentum nor the old values
    play a role.

    Note: the original goes through the whole training set with its running average,
    which starts from the old statistics and forgets all but some ten batches.

    Args:
        update_fn: (params, state, batch) -> state, the network applied in training mode
            to one batch. The same function, or a ``jax.tree_util.Partial`` of it,
            compiles once.
        params: Its parameters.
        state: Its statistics, any pytree. Counters of updates in it count a million
            more. A state without arrays comes back as it is.
        batches: An iterable of batches, or one batch (arrays in tuples or dicts with a
            leading axis of examples).

    Returns:
        A state with new statistics; one that training does not update is left as it is.

    Raises:
        ValueError: If there is no batch, the state changes its structure, or a
            statistic depends on others that were given.

    Example:
        >>> def update(params, state, x):
        ...     return {"mean": 0.9 * state["mean"] + 0.1 * x.mean(0)}
        >>> batches = [jnp.full((3, 1), 2.0), jnp.full((1, 1), 6.0)]
        >>> state = {"mean": jnp.array([50.0])}
        >>> found = wf.batch_norm.reestimate(update, {}, state, batches)
        >>> print(f"{found['mean'][0]:.2f}")
        3.00
    """
    if not jax.tree.leaves(state):
        return state
    if is_batch(batches):
        batches = [batches]
    update, old = as_partial(update_fn), _floats(state)
    start = mean = list(map(jnp.zeros_like, old))
    slopes, new, seen = None, state, 0
    for batch in batches:
        if slopes is None:
            with explained():
                slopes = _slopes(update, params, state, batch)
            start = [
                jnp.where(a == 1, own, 0) for a, own in zip(slopes, old, strict=True)
            ]
        part, new = _updated(update, params, state, start, batch)
        share = batch_length(batch) / (seen + batch_length(batch))
        seen += batch_length(batch)
        mean = [
            m + share * (_solved(p, a) - m)
            for m, p, a in zip(mean, part, slopes, strict=True)
        ]
    if slopes is None:
        raise ValueError("batches is empty; expected at least one batch of examples")
    mean = [
        jnp.where(a == 1, own, m) for a, own, m in zip(slopes, old, mean, strict=True)
    ]
    return _with_floats(jax.tree.map(_counted, state, new), mean)


@jax.jit
def _updated(
    update: Partial,
    params: Params,
    state: State,
    running: list[jax.Array],
    batch: Batch,
) -> tuple[list[jax.Array], State]:
    """Running statistics and the state after a batch.

    Args:
        update: As ``update_fn``.
        params: As given.
        state: For all of it that is not floating point.
        running: Statistics before the batch.
        batch: Examples.
    """
    new = update(params, _with_floats(state, running), batch)
    found: Any = jax.tree.structure(new)
    given: Any = jax.tree.structure(state)
    if found != given:
        raise ValueError(
            f"update_fn returned {found}; expected a state of the structure that it "
            f"was given, {given}"
        )
    return _floats(new), new


def _slopes(
    update: Partial, params: Params, state: State, batch: Batch
) -> list[jax.Array]:
    """The weight a of the old value in each running average; 1 where it stays.

    Args:
        update: As ``update_fn``.
        params: As given.
        state: As given.
        batch: Any of the batches.

    Raises:
        ValueError: If the state is no running average of statistics of the batch.
    """
    zeros = list(map(jnp.zeros_like, _floats(state)))
    part, _ = _updated(update, params, state, zeros, batch)
    # By differences, since Flax NNX stops derivatives; from afar, which is accurate.
    far = [jnp.full_like(p, 1024 * (jnp.max(jnp.abs(p)) or 1)) for p in part]
    after, _ = _updated(update, params, state, far, batch)
    slopes = [(q - p) / f for q, p, f in zip(after, part, far, strict=True)]
    found = [_solved(p, a) for p, a in zip(part, slopes, strict=True)]
    again, _ = _updated(update, params, state, found, batch)
    for one, other, a in zip(found, again, slopes, strict=True):
        # In NumPy, for the maximum of JAX on a CPU leaves out NaN.
        change = np.max(np.abs(np.asarray(_solved(other - a * one, a) - one)))
        if not change <= TOLERANCE * np.max(np.abs(np.asarray(one))):
            raise ValueError(
                "state: the statistics of a batch depend on the running statistics "
                "before it, or are not finite; expected batch norm that normalises "
                'with the batch in training. For eqx.nn.BatchNorm take mode="batch", '
                "or give the state of eqx.nn.make_with_state"
            )
    return slopes


def _solved(part: jax.Array, slope: jax.Array) -> jax.Array:
    """The statistic of a batch from its share of the average; 0 where there is none."""
    return jnp.where(slope == 1, 0, part / jnp.where(slope == 1, 1, 1 - slope))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _floats(state: State) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(state) if _is_float(leaf)]


def _with_floats(state: State, floats: list[jax.Array]) -> State:
    """The state with other floating-point arrays, in the order of its leaves."""
    others = iter(floats)
    return jax.tree.map(lambda leaf: next(others) if _is_float(leaf) else leaf, state)


def _counted(old: Any, new: Any) -> Any:
    """A leaf that is no statistic, after many batches."""
    kind = jnp.result_type(old)
    if jnp.issubdtype(kind, jnp.signedinteger):
        # Equinox divides its averages by 1 - momentum^count.
        return old + MANY * (new - old)
    return new if jnp.issubdtype(kind, jnp.bool_) else old
