"""Gradients laid out by block as they arrive, on the device, in memory or on disk."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.rows.disk import File
from woodfisher_jax.rows.gradients import Gradients
from woodfisher_jax.rows.sharding import AXIS, held, local_devices, num_devices, placed
from woodfisher_jax.rows.tiles import Panel, Part
from woodfisher_jax.trees import blocks


class Shelf(Protocol):
    """Where the rows of one device lie outside it: :class:`Memory` or a file."""

    def write(self, start: int, rows: np.ndarray) -> None:
        """Keeps the rows [n, columns] of the samples from ``start``."""
        ...

    def read(self, panel: Panel) -> np.ndarray:
        """The panel's columns of all rows [N, num_blocks * width], in a new array."""
        ...

    def finish(self) -> None:
        """Waits until everything is written."""
        ...

    def close(self) -> None:
        """Gives the room back."""
        ...


class Store(Protocol):
    """All rows of a part, over all devices."""

    def write(self, start: int, rows: jax.Array) -> None:
        """Keeps rows [n, num_devices, columns] of the samples from ``start``."""
        ...

    def panels(self, panels: Iterable[Panel]) -> Iterator[jax.Array]:
        """Gradients [num_devices * num_blocks, N, width] of one panel after another."""
        ...

    def finish(self) -> None:
        """Waits until everything is written."""
        ...

    def close(self) -> None:
        """Gives the room back."""
        ...


# ---------------------------------------------------------------------- on the device


@partial(jax.jit, static_argnames=("shape", "dtype", "mesh"))
def _empty(shape: tuple[int, ...], dtype: str, mesh: Mesh | None) -> jax.Array:
    return held(jnp.zeros(shape, dtype), mesh, None, AXIS)


@partial(jax.jit, donate_argnames="kept")
def _write(kept: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(kept, rows, (start, zero, zero))


@partial(jax.jit, static_argnames=("panel", "mesh"))
def _read(
    kept: jax.Array, start: jax.Array, panel: Panel, mesh: Mesh | None
) -> jax.Array:
    width = panel.num_blocks * panel.width
    columns = jax.lax.dynamic_slice_in_dim(kept, start, width, axis=2)
    return _as_blocks(columns, panel, mesh)


@partial(jax.jit, static_argnames=("panel", "mesh"))
def _as_blocks(columns: jax.Array, panel: Panel, mesh: Mesh | None) -> jax.Array:
    """From [N, num_devices, num_blocks * width] to one block after another."""
    num_samples, devices = columns.shape[:2]
    split = columns.reshape(num_samples, devices, panel.num_blocks, panel.width)
    found = jnp.moveaxis(split, 0, 2).reshape(-1, num_samples, panel.width)
    return held(found, mesh, AXIS)


class DeviceStore:
    """Rows in the memory of the devices themselves."""

    def __init__(self, num_samples: int, part: Part, dtype: str, mesh: Mesh | None):
        shape = (num_samples, num_devices(mesh), part.columns)
        self._rows = _empty(shape, dtype, mesh)
        self._mesh = mesh

    def write(self, start: int, rows: jax.Array) -> None:
        """See :class:`Store`."""
        self._rows = _write(self._rows, rows, jnp.int32(start))

    def panels(self, panels: Iterable[Panel]) -> Iterator[jax.Array]:
        """See :class:`Store`."""
        for panel in panels:
            same = panel._replace(start=0)
            yield _read(self._rows, jnp.int32(panel.start), same, self._mesh)

    def finish(self) -> None:
        """See :class:`Store`."""
        jax.block_until_ready(self._rows)

    def close(self) -> None:
        """See :class:`Store`."""
        self._rows.delete()


# ------------------------------------------------------------------ outside the device


class Memory:
    """Rows of one device in the host's memory."""

    def __init__(self, num_samples: int, part: Part, dtype: str):
        self._rows = np.empty((num_samples, part.columns), jnp.dtype(dtype))

    def write(self, start: int, rows: np.ndarray) -> None:
        """See :class:`Shelf`."""
        self._rows[start : start + len(rows)] = rows

    def read(self, panel: Panel) -> np.ndarray:
        """See :class:`Shelf`."""
        return self._rows[:, panel.start : panel.stop].copy()

    def finish(self) -> None:
        """See :class:`Shelf`."""

    def close(self) -> None:
        """See :class:`Shelf`."""
        del self._rows


class ShelfStore:
    """Rows on shelves, one for each device of this process.

    Rows travel to the host while the next gradients are formed, and a panel is fetched
    while the one before it is computed.
    """

    def __init__(self, shelves: list[Shelf], mesh: Mesh | None):
        self._shelves = shelves
        self._mesh = mesh
        self._travelling: tuple[int, jax.Array] | None = None

    def write(self, start: int, rows: jax.Array) -> None:
        """See :class:`Store`."""
        rows.copy_to_host_async()
        self._put_down()
        self._travelling = (start, rows)
        if jax.default_backend() == "cpu":
            # Nothing travels there, and what waits takes memory.
            self._put_down()

    def _put_down(self) -> None:
        if self._travelling is None:
            return
        start, rows = self._travelling
        self._travelling = None
        for shelf, shard in zip(
            self._shelves, _by_device(rows, self._mesh), strict=True
        ):
            shelf.write(start, np.asarray(shard)[:, 0])

    def panels(self, panels: Iterable[Panel]) -> Iterator[jax.Array]:
        """See :class:`Store`."""
        waiting = iter(panels)
        with ThreadPoolExecutor(1, "panels") as ahead:
            panel = next(waiting, None)
            fetched = panel and ahead.submit(self._fetch, panel)
            while panel is not None:
                assert fetched is not None
                columns = self._on_devices(fetched.result())
                following = next(waiting, None)
                fetched = following and ahead.submit(self._fetch, following)
                yield _as_blocks(columns, panel._replace(start=0), self._mesh)
                panel = following

    def _fetch(self, panel: Panel) -> list[np.ndarray]:
        return [shelf.read(panel)[:, None] for shelf in self._shelves]

    def _on_devices(self, columns: list[np.ndarray]) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(columns[0])
        arrays = [
            jax.device_put(c, device)
            for c, device in zip(columns, local_devices(self._mesh), strict=True)
        ]
        spread = placed(self._mesh, None, AXIS)
        assert spread is not None
        num_samples, _, width = columns[0].shape
        return jax.make_array_from_single_device_arrays(
            (num_samples, self._mesh.size, width),
            spread,
            arrays,
        )

    def finish(self) -> None:
        """See :class:`Store`."""
        self._put_down()
        for shelf in self._shelves:
            shelf.finish()

    def close(self) -> None:
        """See :class:`Store`."""
        self._travelling = None
        for shelf in self._shelves:
            shelf.close()


def _by_device(rows: jax.Array, mesh: Mesh | None) -> list[jax.Array]:
    """This process's shards of rows [n, num_devices, columns], in order of devices."""
    if mesh is None:
        return [rows]
    shards = sorted(rows.addressable_shards, key=lambda shard: shard.index[1].start)
    return [shard.data for shard in shards]


# --------------------------------------------------------------------------- the table


def new_store(
    place: str,
    part: Part,
    num_samples: int,
    dtype: str,
    mesh: Mesh | None = None,
    folder: Path | None = None,
) -> Store:
    """Makes room for the gradients of a part.

    Args:
        place: "device", "host" or "disk".
        part: Which weight sits where.
        num_samples: N.
        dtype: "float32" or "bfloat16".
        mesh: The devices that share the blocks; default one.
        folder: For the files of "disk".

    Raises:
        StoreError: If the disk has not enough room.
    """
    if place == "device":
        return DeviceStore(num_samples, part, dtype, mesh)
    shelves: list[Shelf] = []
    try:
        for i in range(max(1, len(local_devices(mesh)))):
            if place == "host":
                shelves.append(Memory(num_samples, part, dtype))
            else:
                assert folder is not None
                path = folder / f"device{i}"
                shelves.append(File(path, num_samples, part, dtype))
    except BaseException:
        for shelf in shelves:
            shelf.close()
        raise
    return ShelfStore(shelves, mesh)


# ------------------------------------------------------------------------- collecting


@partial(jax.jit, static_argnames=("order", "dtype", "mesh"))
def _rows(
    chunk: Gradients,
    index: jax.Array,
    order: blocks.FlatOrder,
    dtype: str,
    mesh: Mesh | None,
) -> jax.Array:
    """Rows [n, num_devices, columns] of the gradients of n samples."""
    flat = blocks.flatten(order, chunk)
    return held(blocks.gather(flat, index).astype(dtype), mesh, None, AXIS)


def collect(
    chunks: Iterable[Gradients],
    part: Part,
    store: Store,
    dtype: str,
    mesh: Mesh | None = None,
) -> None:
    """Lays gradients out by block and stores them.

    Args:
        chunks: From path to gradients [n, ...] of the part's tensors.
        part: Which weight sits where.
        store: Where the rows go.
        dtype: "float32" or "bfloat16".
        mesh: The devices that share the blocks; default one.
    """
    index = jax.device_put(part.indices, placed(mesh))
    start = 0
    for chunk in chunks:
        rows = _rows(chunk, index, part.order, dtype, mesh)
        store.write(start, rows)
        start += len(rows)
    store.finish()


@jax.jit
def _add_squares(total: Gradients, chunk: Gradients) -> Gradients:
    return jax.tree.map(lambda t, g: t + jnp.sum(g * g, axis=0), total, chunk)


def mean_square(chunks: Iterable[Gradients], num_samples: int) -> Gradients:
    """Diagonal of the undamped empirical Fisher, without keeping any gradient.

    ``F_qq = (1/N) Σ_n g_nq²``

    Args:
        chunks: From path to gradients [n, ...]; the n add up to ``num_samples``.
        num_samples: N.

    Returns:
        From path to an array of the parameter's shape.
    """
    total: Gradients | None = None
    for chunk in chunks:
        if total is None:
            total = {path: jnp.zeros(g.shape[1:]) for path, g in chunk.items()}
        total = _add_squares(total, chunk)
    assert total is not None
    return jax.tree.map(lambda t: t / num_samples, total)
