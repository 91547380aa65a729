"""Tiles: blocks spread over devices, and cut into pieces that fit in memory.

A row holds one sample's gradient, block after block, [num_devices, columns]. Every
device has the same number of blocks of each group; blocks of padding make up the
difference. A tile is a range of columns that is read and computed at once on all
devices. All tiles of a group have one shape, so that one compiled function serves them.
"""

from typing import NamedTuple

import numpy as np

from woodfisher_jax.trees.blocks import FlatOrder, Layout

TILE_BYTES = 64 * 2**20
"""Gradients of a tile on one device: long reads from disk, yet small beside memory."""


class Tile(NamedTuple):
    """Blocks of one width that are computed together on every device.

    Attributes:
        start: First column.
        num_blocks: Blocks on each device.
        width: c, weights a block.
    """

    start: int
    num_blocks: int
    width: int

    @property
    def columns(self) -> int:
        """Columns on each device."""
        return self.num_blocks * self.width

    @property
    def stop(self) -> int:
        """Column after the last."""
        return self.start + self.columns


class Pass(NamedTuple):
    """Tiles whose gradients are formed in one pass over the samples.

    Attributes:
        order: The flat order of the tensors that the tiles read.
        indices: int32 [num_devices, columns] into their flat vector; its length means
            padding.
        tiles: The tiles, by columns of this pass.
        first: The first column of this pass in a row of all passes.
    """

    order: FlatOrder
    indices: np.ndarray
    tiles: tuple[Tile, ...]
    first: int

    @property
    def columns(self) -> int:
        """Length of a row on one device."""
        return self.indices.shape[1]

    @property
    def is_flat(self) -> bool:
        """Whether a row is the flat gradient as it is: one device, nothing moved."""
        return np.array_equal(self.indices, np.arange(self.order.size)[None])


def whole(
    order: FlatOrder,
    layout: Layout,
    num_samples: int,
    num_devices: int = 1,
    tile_bytes: int = TILE_BYTES,
) -> Pass:
    """Spreads all blocks of a layout over devices and cuts them into tiles.

    Args:
        order: The flat order of all prunable tensors.
        layout: Which weight sits in which block.
        num_samples: N.
        num_devices: Devices that share the blocks.
        tile_bytes: Most bytes of float32 gradients in a tile of one device; a single
            block may be larger.
    """
    rows, tiles, start = [], [], 0
    for group in layout:
        width = group.shape[1]
        each = -(-len(group) // num_devices)
        most = max(1, tile_bytes // (4 * num_samples * width))
        number = -(-each // most)
        # As even as possible: less padding than full tiles and a short last one.
        together = -(-each // number)
        padded = np.full((num_devices * number * together, width), order.size, np.int32)
        padded[: len(group)] = group
        rows.append(padded.reshape(num_devices, -1))
        for _ in range(number):
            tiles.append(Tile(start, together, width))
            start = tiles[-1].stop
    return Pass(order, np.concatenate(rows, axis=1), tuple(tiles), 0)


def split(everything: Pass, columns: int) -> tuple[Pass, ...]:
    """Cuts one pass into passes of at most ``columns`` columns, or one tile.

    Each names only the tensors that its tiles read, so that the gradients of the others
    need not be formed.
    """
    passes, taken = [], [everything.tiles[0]]
    for tile in everything.tiles[1:]:
        if tile.stop - taken[0].start > columns:
            passes.append(_restricted(everything, taken))
            taken = []
        taken.append(tile)
    return (*passes, _restricted(everything, taken))


def _restricted(everything: Pass, taken: list[Tile]) -> Pass:
    """A pass of some consecutive tiles alone, over the tensors that they read."""
    first, stop = taken[0].start, taken[-1].stop
    order, indices = everything.order, everything.indices[:, first:stop]
    real = indices < order.size
    tensor = np.searchsorted(order.offsets, indices, side="right") - 1
    used = np.unique(tensor[real])
    offsets = (0, *np.cumsum(np.diff(order.offsets)[used]).tolist())
    shorter = FlatOrder(
        paths=tuple(order.paths[i] for i in used),
        shapes=tuple(order.shapes[i] for i in used),
        axes=tuple(order.axes[i] for i in used),
        offsets=offsets,
    )
    # How far each tensor moves in the flat vector; the last entry is for padding.
    shift = np.zeros(len(order.paths) + 1, np.int64)
    shift[used] = np.asarray(offsets[:-1]) - np.asarray(order.offsets)[used]
    shift[-1] = shorter.size - order.size
    moved = indices + shift[np.where(real, tensor, -1)]
    tiles = tuple(tile._replace(start=tile.start - first) for tile in taken)
    return Pass(shorter, moved.astype(np.int32), tiles, everything.first + first)


def block_names(pass_: Pass, tile: Tile) -> list[str]:
    """For each block of a tile, device after device, the tensor it starts in."""
    firsts = pass_.indices[:, tile.start : tile.stop : tile.width].reshape(-1)
    tensors = np.searchsorted(pass_.order.offsets, firsts, side="right") - 1
    return [(*pass_.order.paths, "padding")[i] for i in tensors]
