"""Between pytrees and flat vectors of all prunable weights, and what must be finite."""

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
    """Masked params, prunable weights [d] in float32, mask [d], and what is finite.

    The last is for :func:`check_weights`.
    """
    params = masks_.apply_masks(params, masks)
    leaves = leaves_by_path(params)
    weights = {path: leaves[path].astype(jnp.float32) for path in order.paths}
    finite = {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in leaves.items()}
    return params, blocks.flatten(order, weights), blocks.flatten(order, masks), finite


@partial(jax.jit, static_argnames="order")
def from_vectors(
    params: Params, weights: jax.Array, mask: jax.Array, order: blocks.FlatOrder
) -> tuple[Params, Masks]:
    """Params with those weights, zero where the mask is False; and the masks.

    The masks come in any order: jit sorts dicts.
    """
    leaves = leaves_by_path(params)
    masks = blocks.unflatten(order, mask)
    new = {
        path: tensor.astype(leaves[path].dtype)
        for path, tensor in blocks.unflatten(order, weights).items()
    }
    return masks_.apply_masks(replace_leaves(params, new), masks), masks


def check_weights(finite: dict[str, jax.Array]) -> None:
    """Raises unless all weights are finite.

    Args:
        finite: From path to whether a tensor is.

    Raises:
        ValueError: With the path of the first tensor that is not.
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
        what: What the vector holds, up to the path.
        cause: What would overflow.

    Raises:
        ValueError: With the path of the first tensor that is not.
    """
    finite = np.isfinite(np.asarray(vector))
    if not finite.all():
        entry = int(np.argmin(finite))
        tensor = int(np.searchsorted(order.offsets, entry, side="right")) - 1
        raise ValueError(
            f"{what} {order.paths[tensor]!r} is not finite: {cause} overflows float32 "
            "or is nan. Look for weights that are nan, raise damping or scale the loss"
        )
