"""Gradients that arrive in chunks end up whole, each in its block, wherever kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from woodfisher_jax.rows.disk import File
from woodfisher_jax.rows.sharding import one_axis
from woodfisher_jax.rows.store import (
    Memory,
    ShelfStore,
    collect,
    mean_square,
    new_store,
)
from woodfisher_jax.rows.tiles import Part, whole
from woodfisher_jax.trees.blocks import flat_order, full_matrix, within_tensors

SHAPES = {"a": (3, 5), "b/kernel": (4, 2)}
LENGTHS = (4, 4, 2)
PLACES = ("device", "host", "disk")


@pytest.fixture
def gradients() -> dict[str, np.ndarray]:
    """Ten gradients of each tensor."""
    rng = np.random.default_rng(0)
    return {p: rng.standard_normal((10, *s)) for p, s in SHAPES.items()}


def chunks(gradients: dict[str, np.ndarray], lengths=LENGTHS):
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        yield {p: jnp.float32(g[rows]) for p, g in gradients.items()}
        start += length


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Written out: ``a`` in its own order, the kernel as (out, in)."""
    a = gradients["a"].reshape(10, -1)
    kernel = gradients["b/kernel"].transpose(0, 2, 1).reshape(10, -1)
    return np.concatenate([a, kernel], axis=1)


def stored(gradients: dict[str, np.ndarray], order, layout) -> np.ndarray:
    """The blocks of a layout of one group [num_blocks, N, width]."""
    part = whole(order, layout, 10)
    store = new_store("device", part, 10, "float32")
    collect(chunks(gradients), part, store, "float32")
    return np.concatenate(list(store.panels(part.panels)))


def test_mean_square_is_the_diagonal_of_the_undamped_fisher(gradients) -> None:
    found = mean_square(chunks(gradients), 10)
    for path, g in gradients.items():
        rows = g.reshape(10, -1)
        expected = np.diagonal(rows.T @ rows / 10).reshape(SHAPES[path])
        np.testing.assert_allclose(found[path], expected, rtol=2e-6)


def test_the_full_matrix_holds_all_tensors_in_order(gradients) -> None:
    order = flat_order({p: np.zeros(s) for p, s in SHAPES.items()})
    store = stored(gradients, order, full_matrix(order))
    np.testing.assert_array_equal(store, np.float32(flat(gradients))[None])


def test_chunks_of_a_tensor_are_padded_with_zeros(gradients) -> None:
    order = flat_order({p: np.zeros(s) for p, s in SHAPES.items()})
    layout = within_tensors(order, 6)
    store = stored(gradients, order, layout)
    g = np.float32(flat(gradients))
    bounds = [(0, 6), (6, 12), (12, 15), (15, 21), (21, 23)]
    assert store.shape == (5, 10, 6)
    for block, (start, stop) in zip(np.asarray(store), bounds, strict=True):
        np.testing.assert_array_equal(block[:, : stop - start], g[:, start:stop])
        assert (block[:, stop - start :] == 0).all()


# ------------------------------------------------------------------- the three places


def part_of(block_size: int | None = None, panel_bytes: int = 10 * 4 * 12) -> Part:
    """Two groups without a block size; several panels."""
    order = flat_order({p: np.zeros(s) for p, s in SHAPES.items()})
    return whole(order, within_tensors(order, block_size), 10, panel_bytes=panel_bytes)


def expected_panels(part: Part, rows: np.ndarray) -> list[np.ndarray]:
    """Oracle: [blocks, N, width] of each panel, gathered by NumPy."""
    padded = np.concatenate([rows, np.zeros((len(rows), 1), rows.dtype)], axis=1)
    every = padded[:, part.indices[0]]
    return [
        every[:, panel.start : panel.stop]
        .reshape(len(rows), panel.num_blocks, panel.width)
        .transpose(1, 0, 2)
        for panel in part.panels
    ]


def assert_same_bits(found, expected: list[np.ndarray]) -> None:
    for panel, one in zip(found, expected, strict=True):
        got = np.asarray(panel)
        assert got.dtype == one.dtype
        np.testing.assert_array_equal(got, one)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [None, 1, 4, 6, 100])
def test_every_place_gives_back_what_it_was_given(
    gradients, tmp_path: Path, place, dtype, block_size
) -> None:
    part = part_of(block_size)
    if block_size in (1, 4, 6):
        assert len(part.panels) > 1
    # Rounded once, from float32 to the nearest.
    rows = np.float32(flat(gradients)).astype(jnp.dtype(dtype))
    store = new_store(place, part, 10, dtype, folder=tmp_path)
    collect(chunks(gradients), part, store, dtype)
    expected = expected_panels(part, rows)
    for _ in range(2):  # for the statistic and for the update
        assert_same_bits(store.panels(part.panels), expected)
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lengths", [(10,), (1,) * 10, (9, 1), (3, 3, 3, 1)])
def test_the_lengths_of_chunks_do_not_matter(
    gradients, tmp_path: Path, place, lengths
) -> None:
    part = part_of(6)
    store = new_store(place, part, 10, "float32", folder=tmp_path)
    collect(chunks(gradients, lengths), part, store, "float32")
    expected = expected_panels(part, np.float32(flat(gradients)))
    assert_same_bits(store.panels(part.panels), expected)
    store.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_of_one_device_is_no_mesh(
    gradients, tmp_path: Path, place, dtype
) -> None:
    part, mesh = part_of(4), one_axis(Mesh(np.asarray(jax.devices()[:1]), ("x",)))
    store = new_store(place, part, 10, dtype, mesh, tmp_path)
    collect(chunks(gradients), part, store, dtype, mesh)
    rows = np.float32(flat(gradients)).astype(jnp.dtype(dtype))
    found = list(store.panels(part.panels))
    assert_same_bits(found, expected_panels(part, rows))
    store.close()


@pytest.mark.parametrize("place", PLACES)
def test_one_gradient_of_one_weight(tmp_path: Path, place) -> None:
    order = flat_order({"w": np.zeros(1)})
    part = whole(order, full_matrix(order), 1)
    store = new_store(place, part, 1, "bfloat16", folder=tmp_path)
    collect([{"w": jnp.float32([[1.00390625]])}], part, store, "bfloat16")
    (found,) = store.panels(part.panels)
    # Half way between two numbers of eight bits: to the even one.
    np.testing.assert_array_equal(np.asarray(found, np.float32), [[[1.0]]])
    store.close()


@pytest.mark.parametrize("place", PLACES)
def test_panels_can_be_read_in_any_order(gradients, tmp_path: Path, place) -> None:
    part = part_of(4)
    store = new_store(place, part, 10, "float32", folder=tmp_path)
    collect(chunks(gradients), part, store, "float32")
    expected = expected_panels(part, np.float32(flat(gradients)))
    assert_same_bits(store.panels(part.panels[::-1]), expected[::-1])
    assert_same_bits(store.panels(part.panels[2:3]), expected[2:3])
    assert_same_bits(store.panels(()), [])
    store.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_reader_may_stop_half_way(gradients, tmp_path: Path, place) -> None:
    part = part_of(1)
    store = new_store(place, part, 10, "float32", folder=tmp_path)
    collect(chunks(gradients), part, store, "float32")
    reader = store.panels(part.panels)
    next(reader)
    reader.close()
    store.close()
    assert not list(tmp_path.iterdir())


class _Counted(Memory):
    """Counts what is read."""

    reads = 0

    def read(self, panel):
        self.reads += 1
        return super().read(panel)


def test_panels_are_fetched_one_ahead_and_no_more(gradients) -> None:
    part = part_of(1, panel_bytes=200)
    shelf = _Counted(10, part, "float32")
    store = ShelfStore([shelf], None)
    collect(chunks(gradients), part, store, "float32")
    reader = store.panels(part.panels)
    for asked in range(1, 4):
        next(reader)
        assert asked <= shelf.reads <= asked + 1
    reader.close()


def test_a_shelf_that_fails_says_so_where_panels_are_read(gradients) -> None:
    class Failing(Memory):
        def read(self, panel):
            raise OSError("worn out")

    part = part_of(4)
    store = ShelfStore([Failing(10, part, "float32")], None)
    collect(chunks(gradients), part, store, "float32")
    with pytest.raises(OSError, match="worn out"):
        next(store.panels(part.panels))


def test_if_one_file_cannot_be_made_the_others_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, made = part_of(4), []

    class Second(File):
        def __init__(self, *args):
            if made:
                raise OSError("no more")
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("woodfisher_jax.rows.store.File", Second)
    monkeypatch.setattr("woodfisher_jax.rows.store.local_devices", lambda mesh: [1, 2])
    with pytest.raises(OSError, match="no more"):
        new_store("disk", part, 10, "float32", folder=tmp_path)
    assert made
    assert not list(tmp_path.iterdir())
