"""Gradients of all samples by blocks: in one array, in a store, or formed again.

A :class:`Source` gives tiles of blocks to whoever sweeps over them. :class:`InMemory`
holds all gradients in arrays and works inside ``jit``; :class:`Stored` reads them from
the device, the host's memory or a disk, or forms them for each sweep.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.gradients import row_chunks
from woodfisher_jax.rows.memory_plan import Storage
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.store import DeviceStore, Store, collect, new_store
from woodfisher_jax.rows.tiles import Pass, Tile, block_names
from woodfisher_jax.trees import blocks

MOST_RESIDENT = 2**28
"""Bytes of gradients up to which a step is one program; a larger one is not faster so,
and takes copies of them."""

MOST_TILES = 16
"""The same for tiles, each of which is compiled by itself into the program."""

Index = Any
"""Weights of each block in the flat vector [num_blocks, c]; its length d is padding."""


class Blocks(NamedTuple):
    """Some blocks of one width.

    Attributes:
        gradients: G of each, [num_blocks, N, c].
        index: Where their weights stand in the flat vector.
        names: For each block the tensor that it starts in, for errors.
        key: Tells the tile from the others of a sweep.
    """

    gradients: jax.Array
    index: Index
    names: list[str]
    key: int


class Source(Protocol):
    """Where the gradients of all blocks come from."""

    @property
    def size(self) -> int:
        """d, the length of the flat vector."""
        ...

    @property
    def num_samples(self) -> int:
        """N."""
        ...

    @property
    def compute(self) -> Compute:
        """Solver and devices."""
        ...

    @property
    def keep_factors(self) -> bool:
        """Whether factors of the diagonal are kept for the update."""
        ...

    @property
    def is_checked(self) -> bool:
        """Whether results are checked on the host, tile by tile."""
        ...

    def sweep(self, label: str, reverse: bool = False) -> Iterator[Blocks]:
        """All blocks, tile after tile.

        Args:
            label: Of the work, for progress.
            reverse: From the last tile to the first.
        """
        ...

    def resident(self) -> "InMemory | None":
        """The same gradients as one array, where they are few and on one device."""
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "index"),
    meta_fields=("tiles", "size", "compute", "keep_factors", "is_checked"),
)
@dataclasses.dataclass(frozen=True)
class InMemory:
    """All gradients in one array, laid out by block, on one device; pure.

    Attributes:
        rows: Gradients, block after block, [N, columns].
        index: Where each column's weight stands in the flat vector, [columns].
        tiles: Ranges of the columns with blocks of one width.
        size: d.
        compute: Of which the solver counts.
    """

    rows: jax.Array
    index: Index
    tiles: tuple[Tile, ...]
    size: int
    compute: Compute = Compute()
    keep_factors: bool = True
    is_checked: bool = False

    @property
    def num_samples(self) -> int:
        """N."""
        return self.rows.shape[0]

    def sweep(self, label: str, reverse: bool = False) -> Iterator[Blocks]:
        """See :class:`Source`."""
        del label
        rows = self.rows.reshape(self.num_samples, -1)
        for tile in reversed(self.tiles) if reverse else self.tiles:
            columns = rows[:, tile.start : tile.stop]
            split = columns.reshape(self.num_samples, tile.num_blocks, tile.width)
            found = jnp.moveaxis(split, 1, 0)
            index = self.index[tile.start : tile.stop].reshape(-1, tile.width)
            # Fused with the layout of the blocks, a formula rounds differently, up to a
            # hundred times worse (MLP, N = 100, whole layers).
            yield Blocks(jax.lax.optimization_barrier(found), index, [], tile.start)

    def resident(self) -> "InMemory":
        """See :class:`Source`."""
        return self


def laid_out(
    gradients: jax.Array, layout: blocks.Layout | None
) -> tuple[jax.Array, Index, tuple[Tile, ...]]:
    """Rows, index and tiles of :class:`InMemory` for gradients in the flat order.

    Args:
        gradients: G, [N, d].
        layout: Which weight sits in which block; default one block of all weights.
    """
    size = gradients.shape[1]
    if layout is None:
        return gradients, jnp.arange(size, dtype=jnp.int32), (Tile(0, 1, size),)
    tiles, start = [], 0
    for group in layout:
        tiles.append(Tile(start, *group.shape))
        start = tiles[-1].stop
    index = jnp.concatenate([jnp.ravel(jnp.asarray(group)) for group in layout])
    return blocks.gather(gradients, index), index, tuple(tiles)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Gradients in a store, or formed again for every sweep, tile by tile.

    Attributes:
        problem: Whose gradients these are.
        storage: How the blocks are laid out and where their gradients wait.
        microbatch_size: Examples whose gradients a device forms at once.
        store: All of them, or None where they are formed for every sweep.
    """

    problem: Problem
    storage: Storage
    microbatch_size: int
    store: Store | None = None
    is_checked: bool = True

    @property
    def size(self) -> int:
        """D."""
        return self.problem.order.size

    @property
    def num_samples(self) -> int:
        """N."""
        return self.problem.num_samples

    @property
    def compute(self) -> Compute:
        """Of the problem."""
        return self.problem.compute

    @property
    def keep_factors(self) -> bool:
        """As planned."""
        return self.storage.keep_factors

    def sweep(self, label: str, reverse: bool = False) -> Iterator[Blocks]:
        """See :class:`Source`."""
        step = -1 if reverse else 1
        sizes = [
            tile.num_blocks * len(one.indices)
            for one in self.storage.passes
            for tile in one.tiles
        ]
        done, total = 0, sum(sizes)
        self.compute.report(label, done, total)
        for one in self.storage.passes:
            store, tiles = self.store or self.collected(one), one.tiles[::step]
            try:
                for tile, found in zip(tiles, store.tiles(tiles), strict=True):
                    index, names = self._index(one, tile), block_names(one, tile)
                    yield Blocks(found, index, names, one.first + tile.start)
                    done += tile.num_blocks * len(one.indices)
                    self.compute.report(label, done, total)
            finally:
                if store is not self.store:
                    store.close()

    def resident(self) -> InMemory | None:
        """See :class:`Source`."""
        if not isinstance(self.store, DeviceStore) or self.compute.mesh is not None:
            return None
        (only,) = self.storage.passes
        rows = self.store.rows  # [N, 1, columns]
        assert rows is not None
        if rows.nbytes > MOST_RESIDENT or len(only.tiles) > MOST_TILES:
            return None
        if rows.dtype != jnp.float32:
            return None
        return InMemory(
            rows,
            only.indices[0],
            only.tiles,
            self.size,
            Compute(solver=self.compute.solver),
            self.keep_factors,
        )

    def collected(self, one: Pass, place: str = "device", folder: Any = None) -> Store:
        """The gradients of one pass over the samples, in a store of their own."""
        compute = self.compute
        store = new_store(
            place, one, self.num_samples, compute.store_dtype, compute.mesh, folder
        )
        try:
            chunks = row_chunks(self.problem, self.microbatch_size, one.order)
            collect(chunks, one, store, compute.store_dtype, compute.mesh)
        except BaseException:
            store.close()
            raise
        return store

    def _index(self, one: Pass, tile: Tile) -> np.ndarray:
        columns = slice(one.first + tile.start, one.first + tile.stop)
        return self.storage.whole.indices[:, columns].reshape(-1, tile.width)
