"""Distillation: an optimizer moves a pruned network's outputs towards target outputs.

Each stage solves one linear system for the weights. The remaining distance of the
outputs is small and far from linear in the weights, and many short steps of an
optimizer reduce it further, without labels: knowledge distillation (Hinton, Vinyals &
Dean, arXiv:1503.02531, Section 2.1, in the limit of logits).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.masked import masked
from woodfisher_jax.trees.masks import Masks, apply_masks


def distil(
    model: Any,
    params: Any,
    batch_stats: Any,
    masks: Masks,
    batches: Iterable[dict[str, Any]],
    optimizer: optax.GradientTransformation,
    *,
    frozen: bool = False,
) -> tuple[Any, Any]:
    """Trains a masked network to reproduce target outputs, one step for each batch.

    ``minimize  E |z(w, x) - z*|² / 2``  with pruned weights at zero. All other
    parameters are trained, including batch-norm scales.

    Args:
        model: A Linen module, whose ``apply`` is called with ``train``.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        masks: From path to bool, False for pruned weights.
        batches: Dicts with ``image`` [m, ...] and the targets z* as ``wanted`` [m, k].
        optimizer: An optimizer of Optax.
        frozen: Whether z uses the running statistics and leaves them unchanged;
            default False: z is normalised by the batch, as in training.

    Returns:
        ``(params, batch_stats)``; unless frozen, the running averages of training.
        :func:`woodfisher_jax.batch_norm.reestimate` gives better statistics.

    Raises:
        ValueError: If there is no batch, or the shape of the outputs is not that of z*.

    Example:
        >>> from woodfisher_jax import models
        >>> model, x = models.build_model("mlp"), jnp.full((1, 28, 28, 1), 0.05)
        >>> dense = model.init(jax.random.key(0), x)
        >>> wanted = model.apply(dense, x)
        >>> params = jax.tree.map(lambda leaf: 0.9 * leaf, dense["params"])
        >>> masks = wf.init_masks(params)
        >>> batches = [{"image": x, "wanted": wanted}] * 50
        >>> params, _ = distil(model, params, {}, masks, batches, optax.adam(1e-3))
        >>> bool(jnp.allclose(model.apply({"params": params}, x), wanted, atol=0.02))
        True
    """
    tx = masked(optimizer, masks)
    params = apply_masks(params, masks)
    state, batch = tx.init(params), None
    step = jax.jit(functools.partial(_step, model, tx, not frozen))
    for batch in batches:
        params, batch_stats, state = step(params, batch_stats, state, batch)
    if batch is None:
        raise ValueError("batches is empty; expected at least one batch of images")
    return params, batch_stats


def _step(
    model: Any,
    tx: optax.GradientTransformation,
    train: bool,
    params: Any,
    batch_stats: Any,
    state: Any,
    batch: dict[str, jax.Array],
) -> tuple[Any, Any, Any]:
    def distance(params: Any) -> tuple[jax.Array, Any]:
        statistics = {"batch_stats": batch_stats} if batch_stats else {}
        variables = {"params": params, **statistics}
        outputs, new = model.apply(
            variables, batch["image"], train=train, mutable=["batch_stats"]
        )
        if outputs.shape != batch["wanted"].shape:
            raise ValueError(
                f"the outputs have shape {outputs.shape}; 'wanted' has "
                f"{batch['wanted'].shape}: expected one row of outputs for each image"
            )
        missed = outputs - batch["wanted"]
        squares = jnp.sum(missed * missed, axis=-1)
        return jnp.mean(squares) / 2, new.get("batch_stats", batch_stats)

    slope, new_stats = jax.grad(distance, has_aux=True)(params)
    change, state = tx.update(slope, state, params)
    return optax.apply_updates(params, change), new_stats, state
