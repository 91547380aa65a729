"""Tiles hold every block once, on some device, and passes read the same weights."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.rows.tiles import Pass, Tile, block_names, split, whole
from woodfisher_jax.trees.blocks import (
    FlatOrder,
    Layout,
    across_tensors,
    active_within_tensors,
    flat_order,
    full_matrix,
    within_tensors,
)

checked = settings(derandomize=True, deadline=None, max_examples=60)


class Case(NamedTuple):
    """A layout and how it is cut."""

    order: FlatOrder
    layout: Layout
    num_samples: int
    num_devices: int
    tile_bytes: int

    def whole(self) -> Pass:
        return whole(*self)

    def owner_of(self) -> list[str]:
        """The tensor of each entry of the flat vector, and padding after the last."""
        return [*np.repeat(self.order.paths, np.diff(self.order.offsets)), "padding"]


@st.composite
def cases(draw) -> Case:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
    order = flat_order({f"t{i}": np.zeros((size, 1)) for i, size in enumerate(sizes)})
    block_size = draw(st.none() | st.integers(1, 50))
    flags = st.lists(st.booleans(), min_size=order.size, max_size=order.size)
    active = np.array(draw(flags))
    layouts = [
        lambda: full_matrix(order),
        lambda: within_tensors(order, block_size),
        lambda: across_tensors(order, block_size),
        lambda: active_within_tensors(order, block_size, active),
    ]
    return Case(
        order,
        draw(st.sampled_from(layouts))(),
        num_samples=draw(st.integers(1, 20)),
        num_devices=draw(st.integers(1, 9)),
        tile_bytes=draw(st.integers(1, 4000)),
    )


# -------------------------------------------------------------------------- the whole


@checked
@given(cases())
def test_every_block_lies_once_on_some_device_and_the_rest_is_padding(case) -> None:
    everything = case.whole()
    assert everything.indices.dtype == np.int32
    assert len(everything.indices) == case.num_devices
    blocks = [
        tuple(row[start : start + tile.width].tolist())
        for row, tile in itertools.product(everything.indices, everything.tiles)
        for start in range(tile.start, tile.stop, tile.width)
    ]
    for block in (tuple(row.tolist()) for group in case.layout for row in group):
        blocks.remove(block)
        assert block not in blocks
    assert all(set(block) == {case.order.size} for block in blocks)


@checked
@given(cases())
def test_tiles_cover_the_columns_and_those_of_a_group_have_one_shape(case) -> None:
    everything = case.whole()
    stops = [0, *(tile.stop for tile in everything.tiles)]
    assert [tile.start for tile in everything.tiles] == stops[:-1]
    assert stops[-1] == everything.columns
    assert everything.first == 0
    shapes = dict.fromkeys((t.num_blocks, t.width) for t in everything.tiles)
    assert [width for _, width in shapes] == [g.shape[1] for g in case.layout]


@checked
@given(cases())
def test_tiles_are_small_enough_and_waste_little(case) -> None:
    everything = case.whole()
    for tile in everything.tiles:
        size = 4 * case.num_samples * tile.columns
        assert size <= case.tile_bytes or tile.num_blocks == 1
        indices = everything.indices[:, tile.start : tile.stop]
        assert (indices < case.order.size).any()
    for group in case.layout:
        tiles = [t for t in everything.tiles if t.width == group.shape[1]]
        present = case.num_devices * sum(tile.num_blocks for tile in tiles)
        # One short block a device, and one a tile of each.
        assert present - len(group) < case.num_devices * (len(tiles) + 1)


def test_a_block_wider_than_a_tile_is_a_tile() -> None:
    order = flat_order({"w": np.zeros(100)})
    everything = whole(order, within_tensors(order, 30), 10, tile_bytes=8)
    assert everything.tiles == tuple(Tile(start, 1, 30) for start in (0, 30, 60, 90))


def test_more_devices_than_blocks_leave_some_with_padding_only() -> None:
    order = flat_order({"w": np.zeros(5)})
    everything = whole(order, within_tensors(order, 3), 10, 4)
    expected = [[0, 1, 2], [3, 4, 5], [5, 5, 5], [5, 5, 5]]
    np.testing.assert_array_equal(everything.indices, expected)
    names = block_names(everything, everything.tiles[0])
    assert names == ["w", "w", "padding", "padding"]


def test_a_row_is_the_flat_vector_only_where_nothing_moves() -> None:
    order = flat_order({"a": np.zeros(3), "b": np.zeros(3)})
    exact = within_tensors(order, 3)
    assert whole(order, exact, 10, tile_bytes=1).is_flat
    assert whole(order, full_matrix(order), 1).is_flat
    assert not whole(order, within_tensors(order, 2), 10).is_flat  # padding
    assert not whole(order, (exact[0][::-1],), 10).is_flat  # another order
    assert not whole(order, (exact[0][:1],), 10).is_flat  # not all of it
    assert not whole(order, exact, 10, num_devices=2).is_flat


# ----------------------------------------------------------------------------- passes


@checked
@given(cases(), st.integers(0, 300))
def test_passes_read_the_same_weights_tile_after_tile(case, columns) -> None:
    everything = case.whole()
    sizes = np.diff(case.order.offsets)
    tensors = {
        path: 1.0 + np.arange(size) + 1000 * i
        for i, (path, size) in enumerate(zip(case.order.paths, sizes, strict=True))
    }
    flat = np.append(np.concatenate(list(tensors.values())), 0)
    passes = split(everything, columns)
    tiles = [t._replace(start=t.start + p.first) for p in passes for t in p.tiles]
    assert tiles == list(everything.tiles)
    for one in passes:
        assert one.indices.dtype == np.int32
        own = np.append(np.concatenate([tensors[p] for p in one.order.paths]), 0)
        assert one.order.size == len(own) - 1
        expected = flat[everything.indices][:, one.first : one.first + one.columns]
        np.testing.assert_array_equal(own[one.indices], expected)


@checked
@given(cases(), st.integers(0, 300))
def test_passes_are_as_long_as_they_may_be(case, columns) -> None:
    passes = split(case.whole(), columns)
    for one, following in itertools.zip_longest(passes, passes[1:]):
        assert one.tiles[0].start == 0
        assert one.tiles[-1].stop == one.columns
        assert one.columns <= columns or len(one.tiles) == 1
        if following is not None:
            assert one.columns + following.tiles[0].columns > columns


@checked
@given(cases(), st.integers(0, 300))
def test_passes_name_the_tensors_they_read_and_no_others(case, columns) -> None:
    for one in split(case.whole(), columns):
        for start, stop in itertools.pairwise(one.order.offsets):
            assert ((one.indices >= start) & (one.indices < stop)).any()
        positions = [case.order.paths.index(path) for path in one.order.paths]
        assert positions == sorted(positions)
        assert one.order.shapes == tuple(case.order.shapes[i] for i in positions)


def test_a_pass_keeps_the_axes_of_its_tensors() -> None:
    tensors = {"a": np.zeros(4), "b/kernel": np.zeros((2, 3)), "c": np.zeros((2, 2))}
    order = flat_order(tensors)
    passes = split(whole(order, within_tensors(order, None), 1, tile_bytes=1), 0)
    assert [one.order.paths for one in passes] == [("a",), ("c",), ("b/kernel",)]
    assert passes[2].order.axes[0].order == (1, 0)
    assert [one.first for one in passes] == [0, 4, 8]


# ----------------------------------------------------------------------------- names


@checked
@given(cases(), st.none() | st.integers(0, 300))
def test_a_block_is_named_after_the_tensor_it_starts_in(case, columns) -> None:
    everything, owner = case.whole(), case.owner_of()
    for one in (everything,) if columns is None else split(everything, columns):
        for tile in one.tiles:
            start = one.first + tile.start
            firsts = everything.indices[:, start : start + tile.columns : tile.width]
            assert block_names(one, tile) == [owner[i] for i in firsts.reshape(-1)]


@pytest.mark.parametrize("tile_bytes", [1, 10**9])
def test_a_tensor_without_entries_names_no_block(tile_bytes) -> None:
    shapes = {"a": 0, "b": 3, "c": 0, "d": 2, "e": 0}
    order = flat_order({path: np.zeros(size) for path, size in shapes.items()})
    layout = within_tensors(order, 2)
    everything = whole(order, layout, 1, tile_bytes=tile_bytes)
    names = [n for tile in everything.tiles for n in block_names(everything, tile)]
    assert names == ["b", "b", "d"]
    assert {p for one in split(everything, 2) for p in one.order.paths} == {"b", "d"}
