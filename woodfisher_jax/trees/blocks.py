"""Layouts: the assignment of weights to blocks, and its inverse.

The prunable weights form one flat vector of length d, tensor after tensor. A layout is
a tuple of groups; a group is an int32 array [num_blocks, width] of indices into the
flat vector, and all its blocks share one compiled function. The index d means padding:
a column of zeros, which decouples from the rest of its block.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.axes import Axes, WeightAxes, conventional

Layout = tuple[np.ndarray, ...]


class FlatOrder(NamedTuple):
    """The order of tensors and of their entries in the flat vector.

    Attributes:
        paths: Paths of the tensors, in order.
        shapes: Shapes of the tensors.
        axes: What the axes of each tensor are, and so the order of its entries.
        offsets: Start of each tensor in the vector; the last entry is its length d.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[WeightAxes, ...]
    offsets: tuple[int, ...]

    @property
    def size(self) -> int:
        """Length d of the flat vector."""
        return self.offsets[-1]

    @property
    def layers(self) -> tuple[int, ...]:
        """Start of each layer, as ``offsets``: a tensor may have several, stacked."""
        starts = [0]
        for axes, (start, stop) in zip(self.axes, pairwise(self.offsets), strict=True):
            number = axes.sizes[0] if stop > start else 1
            starts.extend(
                start + (stop - start) // number * i for i in range(1, number)
            )
            starts.append(stop)
        return tuple(starts)

    @property
    def layer_ranges(self) -> dict[str, tuple[int, int]]:
        """Where each layer starts and stops: by path, of stacked ones with a number."""
        names = [
            path if axes.sizes[0] == 1 else f"{path}[{number}]"
            for path, axes in zip(self.paths, self.axes, strict=True)
            for number in range(axes.sizes[0])
        ]
        return dict(zip(names, pairwise(self.layers), strict=True))


def flat_order(tensors: Mapping[str, jax.Array], axes: Axes | None = None) -> FlatOrder:
    """Fixes the flat order of the prunable tensors.

    Args:
        tensors: From path to array (or masks); their order is kept.
        axes: What the axes of each tensor are, as
            :func:`woodfisher_jax.find_axes` finds; of a tensor that is not in it, and
            by default, what Flax's convention says.

    Example:
        >>> order = wf.blocks.flat_order({"conv/kernel": jnp.ones((3, 3, 4, 8))})
        >>> order.axes[0].order
        (3, 2, 0, 1)
    """
    shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    known = {} if axes is None else axes
    return FlatOrder(
        paths=tuple(tensors),
        shapes=shapes,
        axes=tuple(
            known[path] if path in known else conventional(path, shape)
            for path, shape in zip(tensors, shapes, strict=True)
        ),
        offsets=(0, *np.cumsum(sizes).tolist()),
    )


def flatten(order: FlatOrder, tensors: Mapping[str, jax.Array]) -> jax.Array:
    """Concatenates tensors to flat vectors.

    Args:
        order: Their flat order.
        tensors: From path to array; additional leading axes (samples, for instance)
            are kept.

    Returns:
        Array [..., d].

    Example:
        >>> tensors = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0], [4.0]])}
        >>> wf.blocks.flatten(wf.blocks.flat_order(tensors), tensors).tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    parts = []
    for path, shape, axes in zip(order.paths, order.shapes, order.axes, strict=True):
        tensor = tensors[path]
        lead = tensor.ndim - len(shape)
        cut = tensor.reshape(*tensor.shape[:lead], *axes.shape)
        moved = jnp.transpose(cut, (*range(lead), *(lead + a for a in axes.order)))
        parts.append(moved.reshape(*tensor.shape[:lead], -1))
    return jnp.concatenate(parts, axis=-1)


def as_read(axes: WeightAxes, tensor: np.ndarray | jax.Array) -> np.ndarray:
    """The entries of one tensor in the order in which they are read, in NumPy."""
    return np.asarray(tensor).reshape(axes.shape).transpose(axes.order).reshape(-1)


def flat_mask(order: FlatOrder, masks: Mapping[str, jax.Array]) -> np.ndarray:
    """Masks as one flat vector [d], in NumPy: nothing is compiled for it."""
    parts = [
        as_read(axes, masks[path])
        for path, axes in zip(order.paths, order.axes, strict=True)
    ]
    return np.concatenate(parts)


def unflatten(order: FlatOrder, vector: jax.Array) -> dict[str, jax.Array]:
    """Splits a flat vector [d] into its tensors: the inverse of :func:`flatten`.

    Example:
        >>> order = wf.blocks.flat_order({"a": jnp.ones(2), "b": jnp.ones((2, 1))})
        >>> wf.blocks.unflatten(order, jnp.arange(4))["b"].tolist()
        [[2], [3]]
    """
    tensors = {}
    for i, (path, shape, axes) in enumerate(
        zip(order.paths, order.shapes, order.axes, strict=True)
    ):
        part = vector[order.offsets[i] : order.offsets[i + 1]]
        moved = part.reshape([axes.shape[a] for a in axes.order])
        cut = jnp.transpose(moved, np.argsort(axes.order).tolist())
        tensors[path] = cut.reshape(shape)
    return tensors


def _chunks(indices: np.ndarray, width: int, padding: int) -> np.ndarray:
    """Splits indices into rows [ceil(n / width), width], the last one padded."""
    rows = np.full((-(-len(indices) // width), width), padding, np.int32)
    rows.reshape(-1)[: len(indices)] = indices
    return rows


def _by_layer(
    order: FlatOrder, indices: Sequence[np.ndarray], width: int | None
) -> Layout:
    """Chunks of each layer's indices; without a width, each layer is one block."""
    longest = max(len(found) for found in indices)
    groups: dict[int, list[np.ndarray]] = {}
    for found in indices:
        if len(found):
            own = min(width, longest) if width else len(found)
            groups.setdefault(own, []).append(_chunks(found, own, order.size))
    return tuple(np.concatenate(chunks) for chunks in groups.values())


def within_tensors(
    order: FlatOrder, block_size: int | None, active: np.ndarray | None = None
) -> Layout:
    """Chunks of ``block_size`` consecutive weights; no block crosses a layer's border.

    Layers that are stacked in one tensor have blocks of their own.

    Args:
        order: The flat order.
        block_size: Width c of a block; None makes each layer one block.
        active: Not used; the blocks do not depend on the masks.

    Returns:
        With a block size one group whose last chunks are padded; without one, a group
        for each distinct size of a layer.

    Example:
        >>> order = wf.blocks.flat_order({"a": jnp.ones(3), "b": jnp.ones((2, 1))})
        >>> [group.tolist() for group in wf.blocks.within_tensors(order, 2)]
        [[[0, 1], [2, 5], [3, 4]]]
    """
    del active
    indices = [np.arange(*bounds) for bounds in pairwise(order.layers)]
    return _by_layer(order, indices, block_size)


def active_within_tensors(
    order: FlatOrder, block_size: int | None, active: np.ndarray | None = None
) -> Layout:
    """Chunks of the active weights, which grow while weights are pruned.

    Consecutive active weights of one layer share a block of ``c_t = floor(c d / n)``
    for d prunable and n active weights, so that a row of gradients shrinks with n while
    all inverses together would keep the size c d.

    Args:
        order: The flat order.
        block_size: c, the width before anything is pruned; None makes the active
            weights of each layer one block.
        active: Weights that are not pruned [d], bool; default all.

    Returns:
        As :func:`within_tensors`; pruned weights are in no block.
    """
    if active is None or active.all() or not active.any():
        return within_tensors(order, block_size)
    indices = [
        start + np.flatnonzero(active[start:stop])
        for start, stop in pairwise(order.layers)
    ]
    number = sum(len(found) for found in indices)
    grown = block_size * order.size // number if block_size else None
    return _by_layer(order, indices, grown)


def across_tensors(
    order: FlatOrder, block_size: int | None, active: np.ndarray | None = None
) -> Layout:
    """Chunks of ``block_size`` consecutive weights of the flat vector of all tensors.

    Args:
        order: The flat order.
        block_size: Width c of a block; None makes all tensors one block.
        active: Not used.

    Returns:
        One group, whose last chunk is padded.

    Example:
        >>> order = wf.blocks.flat_order({"a": jnp.ones(3), "b": jnp.ones((2, 1))})
        >>> [group.tolist() for group in wf.blocks.across_tensors(order, 2)]
        [[[0, 1], [2, 3], [4, 5]]]
    """
    del active
    width = min(block_size, order.size) if block_size else order.size
    return (_chunks(np.arange(order.size), width, order.size),)


def full_matrix(
    order: FlatOrder,
    block_size: int | None = None,
    active: np.ndarray | None = None,
    num_samples: int = 1000,
) -> Layout:
    """One block over all tensors, including the interactions between tensors.

    Pruned weights decouple from the others and may be omitted. Each width compiles
    again, so the width is only halved: d, d / 2, d / 4 and so on, while
    ``N c`` is at least :data:`WORTH_NARROWING`.

    Args:
        order: The flat order.
        block_size: If given, the layout is :func:`within_tensors`.
        active: Weights that are not pruned [d], bool; default all.
        num_samples: N; default 1000.

    Returns:
        One group of one block, or the chunks.
    """
    if block_size is not None:
        return within_tensors(order, block_size)
    if active is None or active.all() or not active.any():
        return across_tensors(order, None)
    indices = np.flatnonzero(active)
    width, narrowest = order.size, WORTH_NARROWING / num_samples
    while -(-width // 2) >= max(len(indices), narrowest):
        width = -(-width // 2)
    if width == order.size:
        return across_tensors(order, None)
    return (_chunks(indices, width, order.size),)


WORTH_NARROWING = 4_000_000
"""Least N c, entries of the gradients, of a narrower block; below it, compilation for
another width costs more than it saves."""


def gather(vectors: jax.Array, group: jax.Array | np.ndarray) -> jax.Array:
    """Reads blocks from flat vectors, with zeros for padding.

    Args:
        vectors: [..., d].
        group: Indices [num_blocks, width].

    Returns:
        Array [..., num_blocks, width].

    Example:
        >>> blocks = jnp.array([[2, 0], [1, 3]])  # 3 is padding
        >>> wf.blocks.gather(jnp.array([7.0, 8.0, 9.0]), blocks).tolist()
        [[9.0, 7.0], [8.0, 0.0]]
    """
    return jnp.take(vectors, group, axis=-1, mode="fill", fill_value=0)


def scatter(
    vector: jax.Array, group: jax.Array | np.ndarray, values: jax.Array
) -> jax.Array:
    """Writes blocks into a flat vector.

    Args:
        vector: [d].
        group: Indices [num_blocks, width].
        values: Values of the blocks [num_blocks, width].

    Returns:
        The vector with those entries replaced; padding is dropped.
    """
    return vector.at[group].set(values, mode="drop")


def columns_of(chosen: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Where the chosen weights stand within their blocks.

    Args:
        chosen: Of the flat vector, bool [d].
        group: Indices [num_blocks, width].

    Returns:
        Columns, int32 [num_blocks, length], in order, then padding, which is the width.
        The length is a power of two, so that few lengths compile.

    Example:
        >>> chosen = np.array([True, True, False, True])
        >>> wf.blocks.columns_of(chosen, np.array([[0, 1], [2, 3]])).tolist()
        [[0, 1], [1, 2]]
    """
    inside = (group < len(chosen)) & chosen[np.minimum(group, len(chosen) - 1)]
    numbers = np.count_nonzero(inside, axis=1)
    length = 1 << int(max(1, numbers.max(initial=0)) - 1).bit_length()
    columns = np.full((len(group), length), group.shape[1], np.int32)
    columns[np.arange(length) < numbers[:, None]] = np.nonzero(inside)[1]
    return columns
