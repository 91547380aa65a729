"""SGD by Optax: learning-rate schedules, and optimizer state under masks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.pruning.masks import Masks
from woodfisher_jax.pruning.paths import Params, replace_leaves


def learning_rate(
    name: str,
    initial: float,
    *,
    steps_per_epoch: int,
    epochs: int,
    decay_rate: float,
    decay_start_epoch: int,
    decay_every_epochs: int,
) -> optax.Schedule:
    """A learning-rate schedule over optimizer steps.

    Args:
        name: constant, step, exponential or cosine.
        initial: Learning rate of the first step.
        steps_per_epoch: Optimizer steps an epoch.
        epochs: Length of the whole schedule; cosine reaches 0 there.
        decay_rate: Factor of step and exponential.
        decay_start_epoch: Step: the first epoch at a lower rate. Exponential: where the
            decay begins.
        decay_every_epochs: Epochs between two factors.

    Returns:
        Step number to learning rate.
    """
    if name == "step":
        drops = range(decay_start_epoch, epochs, decay_every_epochs)
        return optax.piecewise_constant_schedule(
            initial, {epoch * steps_per_epoch: decay_rate for epoch in drops}
        )
    if name == "exponential":
        return optax.exponential_decay(
            initial,
            decay_every_epochs * steps_per_epoch,
            decay_rate,
            transition_begin=decay_start_epoch * steps_per_epoch,
        )
    if name == "cosine":
        return optax.cosine_decay_schedule(initial, max(1, epochs * steps_per_epoch))
    if name == "constant":
        return optax.constant_schedule(initial)
    raise ValueError(
        f"schedule={name!r}; expected constant, step, exponential or cosine"
    )


def sgd(
    schedule: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, as in PyTorch."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum),
    )


def mask_state(
    tx: optax.GradientTransformation, state: Any, params: Params, masks: Masks
) -> Any:
    """Sets what the optimizer remembers of pruned weights to zero.

    Args:
        tx: The transformation the state belongs to.
        state: Its state.
        params: The parameters that it optimises.
        masks: From path to bool.
    """
    keep_all = jax.tree.map(lambda leaf: jnp.ones((), bool), params)
    return optax.tree_map_params(
        tx,
        lambda value, mask: jnp.where(mask, value, jnp.zeros((), value.dtype)),
        state,
        replace_leaves(keep_all, masks),
    )
