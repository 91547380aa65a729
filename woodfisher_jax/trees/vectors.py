"""Pytrees to flat vectors of prunable weights and back; checks that all is finite."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path

Leaves = dict[str, jax.Array]
"""From path to array."""


@partial(jax.jit, static_argnames="order")
def to_vectors(
    leaves: Leaves, masks: Masks, order: blocks.FlatOrder
) -> tuple[Leaves, jax.Array, jax.Array]:
    """Flattens prunable weights.

    Args:
        leaves: Those that have masks.
        masks: From path to bool.
        order: The flat order of the masks.

    Returns:
        ``(leaves, weights, mask)``: masked leaves, weights [d] in float32, mask [d].
    """
    masked = {
        path: jnp.where(masks[path], leaves[path], jnp.zeros((), leaves[path].dtype))
        for path in order.paths
    }
    weights = {path: leaf.astype(jnp.float32) for path, leaf in masked.items()}
    return masked, blocks.flatten(order, weights), blocks.flatten(order, masks)


@partial(jax.jit, static_argnames="order")
def from_vectors(
    leaves: Leaves, weights: jax.Array, mask: jax.Array, order: blocks.FlatOrder
) -> tuple[Leaves, Masks]:
    """Writes flat weights back into their leaves: the inverse of :func:`to_vectors`.

    Args:
        leaves: Those that have masks; a weight that is the same in float32 keeps its
            bits.
        weights: [d].
        mask: [d], bool; weights are zero where it is False.
        order: The flat order of the masks.

    Returns:
        ``(leaves, masks)``, both sorted by path, because jit sorts dicts.
    """
    masks = blocks.unflatten(order, mask)
    new = {}
    for path, tensor in blocks.unflatten(order, weights).items():
        leaf = leaves[path]
        same = tensor == leaf.astype(jnp.float32)
        moved = jnp.where(same, leaf, tensor.astype(leaf.dtype))
        new[path] = jnp.where(masks[path], moved, jnp.zeros((), leaf.dtype))
    return new, masks


def all_finite(array: jax.Array) -> jax.Array:
    """Whether all entries of a floating-point array are finite, a bool scalar."""
    # A sum of zeros, or NaN. On a CPU XLA compiles three times as many loops for a
    # reduction of bools, and its maximum of a thousand numbers and more leaves out NaN.
    return jnp.isfinite(jnp.sum(array * 0))


def check_weights(params: Params) -> None:
    """Raises unless all weights are finite.

    Args:
        params: Masked.

    Raises:
        ValueError: Naming the path of the first tensor that is not finite.
    """
    for path in not_finite(params):
        raise ValueError(
            f"params[{path!r}] holds nan or inf where it is not masked; expected "
            "finite weights"
        )


def not_finite(params: Params) -> Iterator[str]:
    """Yields the paths of tensors that have NaN or infinity."""
    for path, leaf in leaves_by_path(params).items():
        # In NumPy: a program would have a loop for each leaf, which take seconds to
        # compile.
        if not np.isfinite(np.asarray(leaf)).all():
            yield path


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
