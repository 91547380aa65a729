"""Panels: blocks spread over devices and cut into portions that fit in memory.

A row holds one sample's gradient, block after block, [num_devices, columns]: every
device has the same number of blocks of each group, filled up with blocks of padding.
A panel is a range of columns that is read and computed at once on all devices. All
panels of a group have one shape, so that one compiled function serves them.
"""

from typing import NamedTuple

import numpy as np

from woodfisher_jax.trees.blocks import FlatOrder, Layout

PANEL_BYTES = 64 * 2**20
"""Gradients of a panel on one device: long enough for disks, short beside memory."""


class Panel(NamedTuple):
    """Some blocks of one width on every device.

    Attributes:
        start: First column.
        num_blocks: Blocks on each device.
        width: c, weights a block.
    """

    start: int
    num_blocks: int
    width: int

    @property
    def stop(self) -> int:
        """Column after the last."""
        return self.start + self.num_blocks * self.width


class Part(NamedTuple):
    """Panels whose gradients are formed together, and the tensors they need.

    Attributes:
        order: The flat order of those tensors.
        indices: int32 [num_devices, columns] into their flat vector; its length means
            padding.
        panels: The panels, by columns of this part.
        first: The part's first column in the whole row.
    """

    order: FlatOrder
    indices: np.ndarray
    panels: tuple[Panel, ...]
    first: int

    @property
    def columns(self) -> int:
        """Length of a row on one device."""
        return self.indices.shape[1]


def whole(
    order: FlatOrder,
    layout: Layout,
    num_samples: int,
    num_devices: int = 1,
    panel_bytes: int = PANEL_BYTES,
) -> Part:
    """Spreads all blocks of a layout over devices and cuts them into panels.

    Args:
        order: The flat order of all prunable tensors.
        layout: Which weight sits in which block.
        num_samples: N.
        num_devices: Devices that share the blocks.
        panel_bytes: Most bytes of float32 gradients in a panel of one device, but for
            a single block that is larger.
    """
    rows, panels, start = [], [], 0
    for group in layout:
        width = group.shape[1]
        each = -(-len(group) // num_devices)
        most = max(1, panel_bytes // (4 * num_samples * width))
        number = -(-each // most)
        together = -(-each // number)
        filled = np.full((num_devices * number * together, width), order.size, np.int32)
        filled[: len(group)] = group
        rows.append(filled.reshape(num_devices, -1))
        for _ in range(number):
            panels.append(Panel(start, together, width))
            start = panels[-1].stop
    return Part(order, np.concatenate(rows, axis=1), tuple(panels), 0)


def split(part: Part, columns: int) -> tuple[Part, ...]:
    """Cuts a part into parts of at most so many columns, but at least one panel.

    Each names only the tensors that its panels read, so that gradients of the others
    need not be formed.
    """
    parts, taken = [], [part.panels[0]]
    for panel in part.panels[1:]:
        if panel.stop - taken[0].start > columns:
            parts.append(_sub(part, taken))
            taken = []
        taken.append(panel)
    return (*parts, _sub(part, taken))


def _sub(part: Part, taken: list[Panel]) -> Part:
    first, stop = taken[0].start, taken[-1].stop
    index = part.indices[:, first:stop]
    order, real = part.order, index < part.order.size
    tensor = np.searchsorted(order.offsets, index, side="right") - 1
    used = np.unique(tensor[real])
    sizes = np.diff(order.offsets)[used]
    offsets = (0, *np.cumsum(sizes).tolist())
    sub = FlatOrder(
        tuple(order.paths[i] for i in used),
        tuple(order.shapes[i] for i in used),
        tuple(order.axes[i] for i in used),
        offsets,
    )
    # What is to be added to an index in each tensor; padding has its own entry.
    shift = np.zeros(len(order.paths) + 1, np.int64)
    shift[used] = np.asarray(offsets[:-1]) - np.asarray(order.offsets)[used]
    shift[-1] = sub.size - order.size
    moved = index + shift[np.where(real, tensor, -1)]
    panels = tuple(panel._replace(start=panel.start - first) for panel in taken)
    return Part(sub, moved.astype(np.int32), panels, part.first + first)


def block_names(part: Part, panel: Panel) -> list[str]:
    """For each block of a panel, device after device, the tensor it starts in."""
    firsts = part.indices[:, panel.start : panel.stop : panel.width].reshape(-1)
    tensors = np.searchsorted(part.order.offsets, firsts, side="right") - 1
    return [(*part.order.paths, "padding")[i] for i in tensors]
