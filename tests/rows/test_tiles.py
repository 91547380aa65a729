"""Panels hold every weight once, on some device, and parts of them read the same."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.rows.tiles import Part, block_names, split, whole
from woodfisher_jax.trees.blocks import (
    FlatOrder,
    Layout,
    across_tensors,
    active_within_tensors,
    flat_order,
    full_matrix,
    within_tensors,
)

checked = settings(derandomize=True, deadline=None, max_examples=150)


class Case(NamedTuple):
    """A layout and how it is to be cut."""

    order: FlatOrder
    layout: Layout
    num_samples: int
    num_devices: int
    panel_bytes: int

    def part(self) -> Part:
        return whole(*self)


@st.composite
def cases(draw) -> Case:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
    tensors = {f"t{i}": np.zeros((size, 1)) for i, size in enumerate(sizes)}
    order = flat_order(tensors)
    block_size = draw(st.none() | st.integers(1, 50))
    flags = st.lists(st.booleans(), min_size=order.size, max_size=order.size)
    active = np.array(draw(flags))
    layout = draw(
        st.sampled_from(
            [
                lambda: full_matrix(order),
                lambda: within_tensors(order, block_size),
                lambda: across_tensors(order, block_size),
                lambda: active_within_tensors(order, block_size, active),
            ]
        )
    )()
    return Case(
        order,
        layout,
        num_samples=draw(st.integers(1, 20)),
        num_devices=draw(st.integers(1, 9)),
        panel_bytes=draw(st.integers(1, 4000)),
    )


def blocks_of(part: Part) -> dict[tuple[int, ...], int]:
    """How often each block, as a tuple of indices, lies on some device in a panel."""
    found: dict[tuple[int, ...], int] = {}
    for row, panel in itertools.product(part.indices, part.panels):
        for i in range(panel.num_blocks):
            start = panel.start + i * panel.width
            block = tuple(row[start : start + panel.width].tolist())
            found[block] = found.get(block, 0) + 1
    return found


# -------------------------------------------------------------------------- the whole


@checked
@given(cases())
def test_every_weight_lies_in_one_block_over_all_devices(case: Case) -> None:
    part = case.part()
    assert part.indices.dtype == np.int32
    assert len(part.indices) == case.num_devices
    real = part.indices[part.indices < case.order.size]
    laid_out = np.concatenate([group.reshape(-1) for group in case.layout])
    laid_out = laid_out[laid_out < case.order.size]
    assert len(set(laid_out.tolist())) == len(laid_out)
    np.testing.assert_array_equal(np.sort(real), np.sort(laid_out))
    assert (part.indices <= case.order.size).all()


@checked
@given(cases())
def test_blocks_are_those_of_the_layout_and_else_padding(case: Case) -> None:
    found = blocks_of(case.part())
    for block in (tuple(row.tolist()) for group in case.layout for row in group):
        assert found.pop(block) == 1
    for block in found:
        assert set(block) == {case.order.size}


@checked
@given(cases())
def test_panels_tile_the_columns_and_those_of_a_group_are_alike(case: Case) -> None:
    part = case.part()
    stops = [0, *(panel.stop for panel in part.panels)]
    assert [panel.start for panel in part.panels] == stops[:-1]
    assert stops[-1] == part.columns
    assert part.first == 0
    widths = [panel.width for panel in part.panels]
    for width, group in zip(dict.fromkeys(widths), case.layout, strict=True):
        assert width == group.shape[1]
        alike = {p._replace(start=0) for p in part.panels if p.width == width}
        assert len(alike) == 1


@checked
@given(cases())
def test_panels_are_as_small_as_asked_and_none_is_empty(case: Case) -> None:
    part = case.part()
    for panel in part.panels:
        columns = panel.stop - panel.start
        size = 4 * case.num_samples * columns
        assert size <= case.panel_bytes or panel.num_blocks == 1
        assert (part.indices[:, panel.start : panel.stop] < case.order.size).any()


@checked
@given(cases())
def test_little_is_padded(case: Case) -> None:
    part = case.part()
    for group in case.layout:
        width = group.shape[1]
        panels = [panel for panel in part.panels if panel.width == width]
        there = case.num_devices * sum(panel.num_blocks for panel in panels)
        # One short block a device, and one a panel of each.
        assert there - len(group) < case.num_devices * len(panels) + case.num_devices


def test_a_block_wider_than_a_panel_has_one_of_its_own() -> None:
    order = flat_order({"w": np.zeros(100)})
    part = whole(order, within_tensors(order, 30), 10, panel_bytes=8)
    assert [panel.num_blocks for panel in part.panels] == [1, 1, 1, 1]
    assert [panel.width for panel in part.panels] == [30] * 4


def test_more_devices_than_blocks_leave_some_with_padding_only() -> None:
    order = flat_order({"w": np.zeros(5)})
    part = whole(order, within_tensors(order, 3), 10, 4)
    expected = [[0, 1, 2], [3, 4, 5], [5, 5, 5], [5, 5, 5]]
    np.testing.assert_array_equal(part.indices, expected)
    assert block_names(part, part.panels[0]) == ["w", "w", "padding", "padding"]


def test_one_weight() -> None:
    order = flat_order({"w": np.zeros((1, 1))})
    part = whole(order, full_matrix(order), 1)
    np.testing.assert_array_equal(part.indices, [[0]])
    assert [tuple(panel) for panel in part.panels] == [(0, 1, 1)]


# ----------------------------------------------------------------------------- parts


def read(part: Part, flat: np.ndarray) -> np.ndarray:
    """The weights at a part's indices, zeros where padded."""
    return np.append(flat, 0)[part.indices]


@checked
@given(cases(), st.integers(0, 300))
def test_parts_read_the_same_weights_as_the_whole(case: Case, columns: int) -> None:
    part = case.part()
    sizes = np.diff(case.order.offsets)
    tensors = {
        path: 1.0 + np.arange(size) + 1000 * i
        for i, (path, size) in enumerate(zip(case.order.paths, sizes, strict=True))
    }
    expected = read(part, np.concatenate(list(tensors.values())))
    for sub in split(part, columns):
        assert sub.indices.dtype == np.int32
        assert sub.order.size == sum(tensors[path].size for path in sub.order.paths)
        flat = np.concatenate([tensors[path] for path in sub.order.paths])
        found = read(sub, flat)
        columns_of_part = slice(sub.first, sub.first + sub.columns)
        np.testing.assert_array_equal(found, expected[:, columns_of_part])


@checked
@given(cases(), st.integers(0, 300))
def test_parts_cover_all_panels_in_order_and_are_as_long_as_may_be(
    case: Case, columns: int
) -> None:
    part = case.part()
    parts = split(part, columns)
    again = [
        panel._replace(start=panel.start + sub.first)
        for sub in parts
        for panel in sub.panels
    ]
    assert again == list(part.panels)
    for sub, following in itertools.zip_longest(parts, parts[1:]):
        assert sub.panels[0].start == 0
        assert sub.panels[-1].stop == sub.columns
        assert sub.columns <= columns or len(sub.panels) == 1
        if following is not None:
            first = following.panels[0]
            assert sub.columns + first.stop - first.start > columns


@checked
@given(cases(), st.integers(0, 300))
def test_parts_name_the_tensors_they_read_and_no_others(
    case: Case, columns: int
) -> None:
    for sub in split(case.part(), columns):
        bounds = sub.order.offsets
        for start, stop in itertools.pairwise(bounds):
            assert ((sub.indices >= start) & (sub.indices < stop)).any()
        positions = [case.order.paths.index(path) for path in sub.order.paths]
        assert positions == sorted(positions)
        for i, path in zip(positions, sub.order.paths, strict=True):
            j = sub.order.paths.index(path)
            assert sub.order.shapes[j] == case.order.shapes[i]
            assert sub.order.axes[j] == case.order.axes[i]


def test_a_part_keeps_the_axes_of_its_tensors() -> None:
    tensors = {"a": np.zeros(4), "b/kernel": np.zeros((2, 3)), "c": np.zeros((2, 2))}
    order = flat_order(tensors)
    part = whole(order, within_tensors(order, None), 1, panel_bytes=1)
    parts = split(part, 0)
    assert [sub.order.paths for sub in parts] == [("a",), ("c",), ("b/kernel",)]
    assert parts[2].order.axes == ((1, 0),)
    assert parts[2].order.shapes == ((2, 3),)
    assert [sub.first for sub in parts] == [0, 4, 8]


# ----------------------------------------------------------------------------- names


@checked
@given(cases(), st.none() | st.integers(0, 300))
def test_a_block_is_named_after_the_tensor_it_starts_in(
    case: Case, columns: int | None
) -> None:
    part = case.part()
    owner = np.repeat(case.order.paths, np.diff(case.order.offsets))
    owner = [*owner.tolist(), "padding"]
    for sub in (part,) if columns is None else split(part, columns):
        for panel in sub.panels:
            start = sub.first + panel.start
            expected = [
                owner[part.indices[device, start + i * panel.width]]
                for device in range(case.num_devices)
                for i in range(panel.num_blocks)
            ]
            assert block_names(sub, panel) == expected


@pytest.mark.parametrize("panel_bytes", [1, 10**9])
def test_a_tensor_without_entries_gives_its_name_to_no_block(panel_bytes) -> None:
    shapes = {"a": 0, "b": 3, "c": 0, "d": 2, "e": 0}
    order = flat_order({path: np.zeros(size) for path, size in shapes.items()})
    part = whole(order, within_tensors(order, 2), 1, panel_bytes=panel_bytes)
    names = [name for panel in part.panels for name in block_names(part, panel)]
    assert names == ["b", "b", "d"]
    for sub in split(part, 2):
        assert set(sub.order.paths) <= {"b", "d"}
