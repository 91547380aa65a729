"""The programs of a step."""

import jax
import jax.numpy as jnp

from woodfisher_jax.compilation import quickly_compiled
from woodfisher_jax.step import resident_damping as _resident_damping
from woodfisher_jax.step import resident_step as _resident_step
from woodfisher_jax.step import resident_update as _resident_update
from woodfisher_jax.trees import vectors
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves

resident_damping = quickly_compiled("method")(_resident_damping)
resident_step = quickly_compiled("method", "bounds", "ranges")(_resident_step)
resident_update = quickly_compiled("method", "bounds")(_resident_update)
_to_vectors = quickly_compiled("order")(vectors.to_vectors)
_from_vectors = quickly_compiled("order")(vectors.from_vectors)


def to_vectors(
    params: Params, masks: Masks, order: FlatOrder
) -> tuple[Params, jax.Array, jax.Array]:
    """The prunable weights of a pytree as a flat vector.

    Only they pass through the program: each further leaf takes time to compile.

    Returns:
        ``(params, weights, mask)``: masked params, weights [d] in float32, mask [d].
    """
    params = jax.tree.map(jnp.asarray, params)
    leaves = _prunable(params, order)
    leaves, weights, mask = _to_vectors(leaves, masks, order)
    return replace_leaves(params, leaves), weights, mask


def from_vectors(
    params: Params, weights: jax.Array, mask: jax.Array, order: FlatOrder
) -> tuple[Params, Masks]:
    """Writes flat weights [d] back into a pytree, and a flat mask into masks."""
    leaves = _prunable(params, order)
    leaves, masks = _from_vectors(leaves, weights, mask, order)
    in_order = {path: masks[path] for path in order.paths}  # jit sorts dicts
    return replace_leaves(params, leaves), in_order


def _prunable(params: Params, order: FlatOrder) -> dict[str, jax.Array]:
    leaves = leaves_by_path(params)
    return {path: leaves[path] for path in order.paths}
