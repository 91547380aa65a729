"""Repair of a pruned network by an optimizer: its outputs towards those wanted.

After a mask is found and the weights have made up for it by one linear system a stage,
what is left of the distance of the outputs is small and far from linear in the weights.
Many short steps of an optimizer go on from there, with no label: knowledge distillation
(Hinton, Vinyals & Dean, arXiv:1503.02531, Section 2.1, in the limit of logits).
"""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.masked import masked
from woodfisher_jax.training.objective import variables_of
from woodfisher_jax.trees.masks import Masks, apply_masks


def distil(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    masks: Masks,
    batches: Iterable[dict[str, Any]],
    optimizer: optax.GradientTransformation,
    *,
    frozen: bool = False,
) -> tuple[Any, Any]:
    """Brings the outputs of a masked network near those wanted, a step a batch.

    ``minimize  E |z(w, x) - z*|² / 2``  with pruned weights at zero. All other
    parameters move, batch-norm scales included.

    Args:
        model: A Linen module, called with ``train``.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        masks: What is pruned.
        batches: Each ``image`` [m, ...] and ``wanted`` z* [m, k].
        optimizer: Of Optax.
        frozen: Whether z takes the running statistics, which then stay; default False:
            it normalises by the batch, as in training.

    Returns:
        ``(params, batch_stats)``: unless frozen, the statistics are those that training
        leaves; :func:`woodfisher_jax.training.batch_norm.reestimate` gives better ones.

    Raises:
        ValueError: If there is no batch, or the outputs have another shape than z*.

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
    model: nn.Module,
    tx: optax.GradientTransformation,
    train: bool,
    params: Any,
    batch_stats: Any,
    state: Any,
    batch: dict[str, jax.Array],
) -> tuple[Any, Any, Any]:
    def distance(params: Any) -> tuple[jax.Array, Any]:
        variables = variables_of(params, batch_stats)
        outputs, new = model.apply(
            variables, batch["image"], train=train, mutable=["batch_stats"]
        )
        if outputs.shape != batch["wanted"].shape:
            raise ValueError(
                f"the outputs have shape {outputs.shape}; 'wanted' has "
                f"{batch['wanted'].shape}: expected one row of outputs an image"
            )
        missed = outputs - batch["wanted"]
        squares = jnp.sum(missed * missed, axis=-1)
        return jnp.mean(squares) / 2, new.get("batch_stats", batch_stats)

    slope, new_stats = jax.grad(distance, has_aux=True)(params)
    change, state = tx.update(slope, state, params)
    return optax.apply_updates(params, change), new_stats, state
