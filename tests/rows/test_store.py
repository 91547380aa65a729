"""Gradients that arrive in chunks come back complete, each in its block."""

import threading
import types
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from woodfisher_jax.rows.disk import FileTier
from woodfisher_jax.rows.sharding import one_axis
from woodfisher_jax.rows.store import HostTier, TierStore, collect, new_store
from woodfisher_jax.rows.tiles import Pass, whole
from woodfisher_jax.trees.blocks import flat_order, full_matrix, within_tensors

SAMPLES = 10
ORDER = flat_order({"a": np.zeros((3, 5)), "b/kernel": np.zeros((4, 2))})
ROWS = np.random.default_rng(0).standard_normal((SAMPLES, 23)).astype(np.float32)

everywhere = pytest.mark.parametrize("place", ["device", "host", "disk"])


def chunks(lengths=(5, 5)):
    bounds = np.cumsum((0, *lengths))
    return (jnp.asarray(ROWS[start:stop]) for start, stop in pairwise(bounds))


def pass_of(block_size: int | None = 4, tile_bytes: int = 4 * SAMPLES * 12) -> Pass:
    """Several tiles; without a block size two groups, and rows in the flat order."""
    return whole(ORDER, within_tensors(ORDER, block_size), 10, tile_bytes=tile_bytes)


def expected_tiles(pass_: Pass, dtype="float32") -> list[np.ndarray]:
    """Oracle: [blocks, N, width] of each tile, gathered by NumPy."""
    # Rounded once, from float32 to the nearest.
    padded = np.append(ROWS, np.zeros((SAMPLES, 1), np.float32), axis=1)
    blocked = padded.astype(jnp.dtype(dtype))[:, pass_.indices[0]]
    return [
        blocked[:, tile.start : tile.stop]
        .reshape(SAMPLES, tile.num_blocks, tile.width)
        .transpose(1, 0, 2)
        for tile in pass_.tiles
    ]


def assert_same_bits(tiles, expected: list[np.ndarray]) -> None:
    for tile, one in zip(tiles, expected, strict=True):
        assert tile.dtype == one.dtype
        np.testing.assert_array_equal(np.asarray(tile), one)


@everywhere
@pytest.mark.parametrize(
    ("block_size", "dtype", "meshed"),
    [
        (None, "float32", False),
        (None, "bfloat16", False),
        (None, "float32", True),
        (1, "float32", False),
        (6, "float32", False),
        (6, "bfloat16", False),
        (6, "bfloat16", True),
        (100, "float32", False),
    ],
)
def test_every_place_returns_what_it_was_given(
    tmp_path: Path, place, block_size, dtype, meshed
) -> None:
    # A mesh of one device is no mesh.
    mesh = one_axis(Mesh(np.asarray(jax.devices()[:1]), ("x",))) if meshed else None
    pass_ = pass_of(block_size)
    assert pass_.is_flat == (block_size is None)
    assert len(pass_.tiles) > 1 or block_size == 100
    store = new_store(place, pass_, SAMPLES, dtype, mesh, tmp_path)
    collect(chunks(), pass_, store, dtype, mesh)
    expected = expected_tiles(pass_, dtype)
    for _ in range(2):  # for the statistic and for the update
        assert_same_bits(store.tiles(pass_.tiles), expected)
    store.close()
    assert not list(tmp_path.iterdir())


@everywhere
@pytest.mark.parametrize("lengths", [(10,), (1,) * 10, (4, 4, 2)])
def test_the_lengths_of_chunks_do_not_matter(tmp_path: Path, place, lengths) -> None:
    pass_ = pass_of()
    store = new_store(place, pass_, SAMPLES, "float32", folder=tmp_path)
    collect(chunks(lengths), pass_, store, "float32")
    assert_same_bits(store.tiles(pass_.tiles), expected_tiles(pass_))
    store.close()


@everywhere
def test_bfloat16_rounds_to_the_nearest_even(tmp_path: Path, place) -> None:
    order = flat_order({"w": np.zeros(1)})
    pass_ = whole(order, full_matrix(order), 1)
    store = new_store(place, pass_, 1, "bfloat16", folder=tmp_path)
    # Half way between two numbers of eight bits.
    collect([jnp.float32([[1.00390625]])], pass_, store, "bfloat16")
    (tile,) = store.tiles(pass_.tiles)
    np.testing.assert_array_equal(np.asarray(tile, np.float32), [[[1.0]]])
    store.close()


@everywhere
def test_tiles_are_read_in_any_order_and_readers_may_stop(
    tmp_path: Path, place
) -> None:
    pass_ = pass_of()
    store = new_store(place, pass_, SAMPLES, "float32", folder=tmp_path)
    collect(chunks(), pass_, store, "float32")
    expected = expected_tiles(pass_)
    stopped = store.tiles(pass_.tiles)
    next(stopped)
    assert_same_bits(store.tiles(pass_.tiles[::-1]), expected[::-1])
    assert_same_bits(store.tiles(pass_.tiles[2:3]), expected[2:3])
    assert_same_bits(store.tiles(()), [])
    stopped.close()
    store.close()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ tiers


def test_tiles_are_read_one_ahead_and_no_more() -> None:
    pass_, reads = pass_of(1, tile_bytes=200), threading.Semaphore(0)

    class Counted(HostTier):
        def read(self, tile):
            reads.release()
            return super().read(tile)

    store = TierStore({0: Counted(SAMPLES, pass_, "float32")}, None)
    collect(chunks(), pass_, store, "float32")
    reader = store.tiles(pass_.tiles)
    next(reader)
    assert reads.acquire(timeout=60)
    for _ in range(3):
        assert reads.acquire(timeout=60)
        assert not reads.acquire(blocking=False)
        next(reader)
    store.close()


def test_chunks_are_written_one_behind_and_no_more() -> None:
    pass_, written, released = pass_of(), [], threading.Semaphore(0)

    class Slow(HostTier):
        def write(self, start, rows):
            assert released.acquire(timeout=60)
            super().write(start, rows)
            written.append(start)

    def observed():
        for i, chunk in enumerate(chunks((4, 4, 2))):
            # The chunk before this one waits, those before it are written.
            assert written == [0, 4][: max(0, i - 1)]
            if i:
                released.release()
            yield chunk
        released.release()

    store = TierStore({0: Slow(SAMPLES, pass_, "float32")}, None)
    collect(observed(), pass_, store, "float32")
    assert written == [0, 4, 8]
    assert_same_bits(store.tiles(pass_.tiles), expected_tiles(pass_))
    store.close()


def test_a_tier_that_cannot_write_raises_at_the_next_chunk_or_at_the_end() -> None:
    class Failing(HostTier):
        def write(self, start, rows):
            raise OSError(f"failed at {start}")

    for lengths in ((4, 4, 2), (10,)):
        store = TierStore({0: Failing(SAMPLES, pass_of(), "float32")}, None)
        formed = []
        passing = (formed.append(1) or chunk for chunk in chunks(lengths))
        with pytest.raises(OSError, match="failed at 0"):
            collect(passing, pass_of(), store, "float32")
        assert len(formed) <= 2
        store.close()


def test_a_tier_that_cannot_read_raises_where_its_tile_is_read() -> None:
    class Failing(HostTier):
        def read(self, tile):
            if tile.start > 0:
                raise OSError("worn out")
            return super().read(tile)

    pass_ = pass_of()
    store = TierStore({0: Failing(SAMPLES, pass_, "float32")}, None)
    collect(chunks(), pass_, store, "float32")
    reader = store.tiles(pass_.tiles)
    next(reader)
    with pytest.raises(OSError, match="worn out"):
        next(reader)
    store.close()


def test_if_one_file_cannot_be_made_the_others_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Second(FileTier):
        def __init__(self, *args):
            if made:
                raise OSError("no more")
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("woodfisher_jax.rows.store.FileTier", Second)
    device = types.SimpleNamespace(process_index=0)
    mesh = types.SimpleNamespace(devices=np.array([device, device]))
    with pytest.raises(OSError, match="no more"):
        new_store("disk", pass_of(), SAMPLES, "float32", mesh, tmp_path)
    assert made
    assert not list(tmp_path.iterdir())
