"""One optimizer step on a masked network, and the state that it changes."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.objective import cross_entropy, variables_of
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.masks import Masks


class TrainState(NamedTuple):
    """What a checkpoint holds in arrays.

    Attributes:
        params: Linen parameters; pruned weights are exactly zero.
        batch_stats: Running statistics, or an empty dict.
        masks: From parameter path to bool, True = kept.
        opt_state: Of Optax; zero for pruned weights.
        dense: params, batch_stats and masks that the steps of a repeated one-shot start
            from, or empty.
    """

    params: Any
    batch_stats: Any
    masks: Masks
    opt_state: Any
    dense: Any = ()


@functools.partial(jax.jit, static_argnames=("model", "tx", "label_smoothing"))
def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    label_smoothing: float,
) -> tuple[TrainState, jax.Array]:
    """One optimizer step; weights, gradients and momentum of pruned entries stay zero.

    Returns:
        The new state and the mean loss of the batch.
    """

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            variables_of(params, state.batch_stats),
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, batch["label"], label_smoothing)
        return jnp.mean(losses), updated.get("batch_stats", {})

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    gradients = masks_.apply_masks(gradients, state.masks)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = masks_.apply_masks(params, state.masks)
    return (
        state._replace(params=params, batch_stats=stats, opt_state=opt_state),
        value,
    )
