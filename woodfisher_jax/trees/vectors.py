"""Pytrees to flat vectors of prunable weights and back; checks that all is finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees import blocks
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves


@partial(jax.jit, static_argnames="order")
def to_vectors(
    params: Params, masks: Masks, order: blocks.FlatOrder
) -> tuple[Params, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Flattens the prunable weights of a pytree.

    Args:
        params: Any pytree.
        masks: From path to bool.
        order: The flat order of the masks.

    Returns:
        ``(params, weights, mask, finite)``: masked params, weights [d] in float32, mask
        [d], and for each path whether the leaf is finite (for :func:`check_weights`).
    """
    params = masks_.apply_masks(params, masks)
    leaves = leaves_by_path(params)
    weights = {path: leaves[path].astype(jnp.float32) for path in order.paths}
    finite = {path: all_finite(leaf) for path, leaf in leaves.items()}
    return params, blocks.flatten(order, weights), blocks.flatten(order, masks), finite


def all_finite(array: jax.Array) -> jax.Array:
    """Whether all entries of a floating-point array are finite, a bool scalar."""
    # XLA compiles three times as many loops for a reduction of bools on a CPU.
    return jnp.isfinite(jnp.max(jnp.abs(array), initial=0.0))


@partial(jax.jit, static_argnames="order")
def from_vectors(
    params: Params, weights: jax.Array, mask: jax.Array, order: blocks.FlatOrder
) -> tuple[Params, Masks]:
    """Writes flat weights back into a pytree: the inverse of :func:`to_vectors`.

    Args:
        params: Any pytree; a weight that is the same in float32 keeps its bits.
        weights: [d].
        mask: [d], bool; weights are zero where it is False.
        order: The flat order of the masks.

    Returns:
        ``(params, masks)``; the masks are sorted by path, because jit sorts dicts.
    """
    leaves = leaves_by_path(params)
    masks = blocks.unflatten(order, mask)
    new = {}
    for path, tensor in blocks.unflatten(order, weights).items():
        leaf = leaves[path]
        same = tensor == leaf.astype(jnp.float32)
        new[path] = jnp.where(same, leaf, tensor.astype(leaf.dtype))
    return masks_.apply_masks(replace_leaves(params, new), masks), masks


def check_weights(finite: dict[str, jax.Array]) -> None:
    """Raises unless all weights are finite.

    Args:
        finite: From path to whether the tensor is finite.

    Raises:
        ValueError: Naming the path of the first tensor that is not finite.
    """
    for path, sound in finite.items():
        if not sound:
            raise ValueError(
                f"params[{path!r}] holds nan or inf where it is not masked; expected "
                "finite weights"
            )


def check_finite(
    vector: jax.Array, order: blocks.FlatOrder, what: str, cause: str
) -> None:
    """Raises unless a flat vector is finite.

    Args:
        vector: [d].
        order: Its flat order, for the path in the message.
        what: Description of the vector in the message, which the path follows.
        cause: The quantity that may overflow, for the message.

    Raises:
        ValueError: Naming the path of the first tensor that is not finite.
    """
    finite = np.isfinite(np.asarray(vector))
    if not finite.all():
        entry = int(np.argmin(finite))
        tensor = int(np.searchsorted(order.offsets, entry, side="right")) - 1
        raise ValueError(
            f"{what} {order.paths[tensor]!r} is not finite: {cause} overflows float32 "
            "or is nan. Look for weights that are nan, raise damping or scale the loss"
        )
