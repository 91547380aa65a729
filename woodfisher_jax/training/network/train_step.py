"""One optimizer step on a masked network, and the state that it changes."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.tracing.convolutions import fast_weight_gradients
from woodfisher_jax.training.network.objective import cross_entropy, variables_of
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.masks import Masks

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a checkpoint holds in arrays.

    Attributes:
        params: Linen parameters; pruned weights are exactly zero.
        batch_stats: Running statistics, or an empty dict.
        masks: From parameter path to bool, True = kept.
        opt_state: Of Optax; zero for pruned weights.
        dense: params, batch_stats and masks that the steps of a repeated one-shot start
            from, or empty.
        average: params and batch_stats averaged over the steps, or empty.
    """

    params: Any
    batch_stats: Any
    masks: Masks
    opt_state: Any
    dense: Any = ()
    average: Any = ()


class Metrics(NamedTuple):
    """Results of a step, the same on every device.

    Attributes:
        loss: Mean loss of the batch.
        stop: Above zero if some process has been asked to stop.
    """

    loss: jax.Array
    stop: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "tx",
        "label_smoothing",
        "accumulation_steps",
        "average_decay",
    ),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: Batch,
    stop: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    label_smoothing: float,
    accumulation_steps: int = 1,
    average_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One optimizer step; weights, gradients and momentum of pruned entries stay zero.

    Loss, gradient and batch-norm statistics are those of the whole batch, over however
    many devices its rows are spread: the compiler adds up what the devices have.

    With k accumulation steps, part i is examples i, i + k, i + 2k, ... of the batch.
    The gradient is the mean over the parts, which is that over the batch but for batch
    norm: each part is normalised by its own mean and variance, and the running
    statistics are updated k times.

    Args:
        state: Before the step; its arrays are given up, so none may be in it twice.
        batch: ``image`` [b, h, w, c] and ``label`` [b].
        stop: A number for each device, above zero where its process has been asked to
            stop; reduced within the step so that all processes stop after the same one.
        model: A Linen classifier.
        tx: The optimizer.
        label_smoothing: Share of the target that is spread over all classes, [0, 1).
        accumulation_steps: k, a divisor of b; default 1.
        average_decay: d of the average, ``a <- d · a + (1 - d) · w``; 0, the default,
            leaves ``state.average`` as it is.

    Returns:
        The new state and the step's metrics.
    """

    def loss(params: Any, stats: Any, part: Batch) -> tuple[jax.Array, Any]:
        with fast_weight_gradients():
            logits, updated = model.apply(
                variables_of(params, stats),
                part["image"],
                train=True,
                mutable=["batch_stats"],
            )
        losses = cross_entropy(logits, part["label"], label_smoothing)
        return jnp.mean(losses), updated.get("batch_stats", {})

    gradient = jax.value_and_grad(loss, has_aux=True)
    value, gradients, stats = _accumulated(gradient, state, batch, accumulation_steps)
    gradients = masks_.apply_masks(gradients, state.masks)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = masks_.apply_masks(params, state.masks)
    state = state._replace(params=params, batch_stats=stats, opt_state=opt_state)
    if average_decay:
        mean = optax.incremental_update(
            network(state), state.average, 1.0 - average_decay
        )
        state = state._replace(average=mean)
    return state, Metrics(value, jnp.max(stop))


def _accumulated(
    gradient: Any, state: TrainState, batch: Batch, num_parts: int
) -> tuple[jax.Array, Any, Any]:
    """Mean loss, mean gradient and last statistics over the parts of a batch."""
    if num_parts == 1:
        (value, stats), found = gradient(state.params, state.batch_stats, batch)
        return value, found, stats

    def add(carry: Any, number: jax.Array) -> tuple[Any, None]:
        stats, *sums = carry
        (value, stats), found = gradient(
            state.params, stats, jax.tree.map(lambda a: a[:, number], parts)
        )
        return (stats, *jax.tree.map(jnp.add, sums, [value, found])), None

    # Every k-th example: each device has as many of each part, and none moves.
    parts = jax.tree.map(lambda a: a.reshape(-1, num_parts, *a.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (stats, value, found), _ = jax.lax.scan(
        add, (state.batch_stats, jnp.zeros(()), zeros), jnp.arange(num_parts)
    )
    value, found = jax.tree.map(lambda leaf: leaf / num_parts, (value, found))
    return value, found, stats


def network(state: TrainState) -> dict[str, Any]:
    """The weights and statistics that the optimizer has reached."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def averaged(state: TrainState) -> TrainState:
    """The state with the averaged network in place of the last, where there is one."""
    return state._replace(**state.average) if state.average else state


def averaging(state: TrainState, average_decay: float) -> TrainState:
    """The state with an average that starts from its network; none at a decay of 0."""
    return state._replace(average=copied(network(state)) if average_decay else ())


def copied(tree: Any) -> Any:
    """The same values in arrays of their own, since a train step gives up its state."""
    return jax.tree.map(jnp.copy, tree)
