"""Gradients by block: kept on the device, in the host's memory or on disk."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.rows.disk import FileTier
from woodfisher_jax.rows.sharding import AXIS, held, num_devices, placed
from woodfisher_jax.rows.tiles import Pass, Tile
from woodfisher_jax.trees import blocks


class Store(Protocol):
    """All rows of a pass, over all devices."""

    def write(self, start: int, rows: jax.Array) -> None:
        """Keeps rows [n, num_devices, columns] of the samples from ``start``."""
        ...

    def tiles(self, tiles: Iterable[Tile]) -> Iterator[jax.Array]:
        """Gradients [num_devices * num_blocks, N, width] of one tile after another."""
        ...

    def finish(self) -> None:
        """Waits until everything is written."""
        ...

    def close(self) -> None:
        """Frees the space."""
        ...


# ---------------------------------------------------------------------- on the device


@partial(jax.jit, static_argnames=("shape", "dtype", "mesh"))
def _empty(shape: tuple[int, ...], dtype: str, mesh: Mesh | None) -> jax.Array:
    return held(jnp.zeros(shape, dtype), mesh, None, AXIS)


@partial(jax.jit, donate_argnames="kept")
def _written(kept: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(kept, rows, (start, zero, zero))


@partial(jax.jit, static_argnames=("num_blocks", "width", "mesh"))
def _blocks(
    rows: jax.Array, start: jax.Array, num_blocks: int, width: int, mesh: Mesh | None
) -> jax.Array:
    """Cuts rows [N, num_devices, columns] into blocks, from the column ``start``."""
    num_samples, devices = rows.shape[:2]
    columns = jax.lax.dynamic_slice_in_dim(rows, start, num_blocks * width, axis=2)
    split = columns.reshape(num_samples, devices, num_blocks, width)
    gradients = jnp.moveaxis(split, 0, 2).reshape(-1, num_samples, width)
    return held(gradients, mesh, AXIS)


class DeviceStore:
    """Rows in the memory of the devices themselves.

    Attributes:
        rows: [N, num_devices, columns].
    """

    def __init__(self, pass_: Pass, num_samples: int, dtype: str, mesh: Mesh | None):
        self._shape = (num_samples, num_devices(mesh), pass_.columns)
        self._dtype = dtype
        self._mesh = mesh
        self.rows: jax.Array | None = None

    def write(self, start: int, rows: jax.Array) -> None:
        """See :class:`Store`."""
        if rows.shape == self._shape:
            self.rows = rows  # all of them at once
            return
        if self.rows is None:
            self.rows = _empty(self._shape, self._dtype, self._mesh)
        self.rows = _written(self.rows, rows, np.int32(start))

    def tiles(self, tiles: Iterable[Tile]) -> Iterator[jax.Array]:
        """See :class:`Store`."""
        assert self.rows is not None, "nothing is written yet"
        for tile in tiles:
            start = np.int32(tile.start)
            yield _blocks(self.rows, start, tile.num_blocks, tile.width, self._mesh)

    def finish(self) -> None:
        """See :class:`Store`."""
        jax.block_until_ready(self.rows)

    def close(self) -> None:
        """See :class:`Store`."""
        if self.rows is not None:
            self.rows.delete()


# ------------------------------------------------------------------ outside the device


class HostTier:
    """Rows of one device in the host's memory."""

    def __init__(self, num_samples: int, pass_: Pass, dtype: str):
        self.rows = np.empty((num_samples, pass_.columns), jnp.dtype(dtype))

    def write(self, start: int, rows: np.ndarray) -> None:
        """Keeps the rows [n, columns] of the samples from ``start``."""
        self.rows[start : start + len(rows)] = rows

    def read(self, tile: Tile) -> np.ndarray:
        """The tile's columns of all rows [N, num_blocks * width], in a new array."""
        return self.rows[:, tile.start : tile.stop].copy()

    def close(self) -> None:
        """Frees the memory."""
        del self.rows


Tier = HostTier | FileTier
"""Where the rows of one device lie outside it."""


class TierStore:
    """Rows outside the devices, in one tier for each device of this process.

    A thread of its own moves them: a chunk is written while the next gradients are
    formed, and a tile is read while the one before it is computed.
    """

    def __init__(self, tiers: Mapping[int, Tier], mesh: Mesh | None):
        """Takes the tiers.

        Args:
            tiers: By the position of their device in the mesh.
            mesh: All devices, those of other processes too; None for one device.
        """
        self._tiers = tiers
        self._mesh = mesh
        self._mover = ThreadPoolExecutor(1, "gradients")
        self._writing: Future[None] | None = None

    def write(self, start: int, rows: jax.Array) -> None:
        """See :class:`Store`; raises what the write before this one has raised."""
        rows.copy_to_host_async()
        # At most one chunk waits, because it takes memory until it is written.
        self.finish()
        self._writing = self._mover.submit(self._write, start, rows)

    def _write(self, start: int, rows: jax.Array) -> None:
        for shard in rows.addressable_shards:
            tier = self._tiers[_position(shard.index)]
            tier.write(start, np.asarray(shard.data)[:, 0])

    def tiles(self, tiles: Iterable[Tile]) -> Iterator[jax.Array]:
        """See :class:`Store`."""
        reading: deque[tuple[Tile, Future[dict[int, np.ndarray]]]] = deque()
        for tile in tiles:
            reading.append((tile, self._mover.submit(self._read, tile)))
            if len(reading) > 1:
                yield self._on_devices(*reading.popleft())
        for tile, columns in reading:
            yield self._on_devices(tile, columns)

    def _read(self, tile: Tile) -> dict[int, np.ndarray]:
        return {i: tier.read(tile)[:, None] for i, tier in self._tiers.items()}

    def _on_devices(
        self, tile: Tile, columns: Future[dict[int, np.ndarray]]
    ) -> jax.Array:
        own = columns.result()
        sharding = placed(self._mesh, None, AXIS)
        if sharding is None:
            rows = jnp.asarray(own[0])
        else:
            num_samples = len(next(iter(own.values())))
            rows = jax.make_array_from_callback(
                (num_samples, num_devices(self._mesh), tile.columns),
                sharding,
                lambda index: own[_position(index)],
            )
        return _blocks(rows, np.int32(0), tile.num_blocks, tile.width, self._mesh)

    def finish(self) -> None:
        """See :class:`Store`."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """See :class:`Store`; a write that has not started is dropped."""
        self._mover.shutdown(wait=True, cancel_futures=True)
        for tier in self._tiers.values():
            tier.close()


def _position(index: tuple[slice, ...] | None) -> int:
    """Which device a shard of rows [n, num_devices, columns] lies on."""
    assert index is not None
    # A single device has slice(None).
    return index[1].start or 0


# ---------------------------------------------------------------- making and filling


def new_store(
    place: str,
    pass_: Pass,
    num_samples: int,
    dtype: str,
    mesh: Mesh | None = None,
    folder: Path | None = None,
) -> Store:
    """Reserves the space for the gradients of a pass.

    Args:
        place: "device", "host" or "disk".
        pass_: Which weight sits where.
        num_samples: N.
        dtype: "float32" or "bfloat16".
        mesh: The devices that share the blocks; default one.
        folder: For the files of "disk".

    Raises:
        StoreError: If the disk has not enough space.
    """
    if place == "device":
        return DeviceStore(pass_, num_samples, dtype, mesh)
    here = jax.process_index()
    devices = [] if mesh is None else list(mesh.devices.flat)
    own = [i for i, device in enumerate(devices) if device.process_index == here]
    tiers: dict[int, Tier] = {}
    with ExitStack() as stack:
        for i in own or [0]:
            if place == "host":
                tiers[i] = HostTier(num_samples, pass_, dtype)
            else:
                assert folder is not None
                tiers[i] = FileTier(folder / f"device{i}", num_samples, pass_, dtype)
            stack.callback(tiers[i].close)
        # All are there: from here on the store closes them.
        stack.pop_all()
    return TierStore(tiers, mesh)


@partial(jax.jit, static_argnames=("dtype", "mesh"))
def _rows(
    chunk: jax.Array, indices: jax.Array | None, dtype: str, mesh: Mesh | None
) -> jax.Array:
    """Rows [n, num_devices, columns] of flat gradients [n, d]."""
    rows = chunk[:, None] if indices is None else blocks.gather(chunk, indices)
    return held(rows.astype(dtype), mesh, None, AXIS)


def collect(
    chunks: Iterable[jax.Array],
    pass_: Pass,
    store: Store,
    dtype: str,
    mesh: Mesh | None = None,
) -> None:
    """Lays gradients out by block and stores them.

    Args:
        chunks: Flat gradients [n, d] of the pass's tensors, d being
            ``pass_.order.size``; the n add up to the store's N.
        pass_: Which weight sits where.
        store: Where the rows go.
        dtype: "float32" or "bfloat16".
        mesh: The devices that share the blocks; default one.
    """
    indices = None
    if not pass_.is_flat:
        indices = jax.device_put(pass_.indices, placed(mesh))
    start = 0
    for chunk in chunks:
        rows = _rows(chunk, indices, dtype, mesh)
        store.write(start, rows)
        start += len(rows)
    store.finish()
