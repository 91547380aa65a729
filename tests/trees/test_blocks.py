"""Layouts: every weight sits in one block, and comes back to its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.trees.axes import WeightAxes, conventional
from woodfisher_jax.trees.blocks import (
    across_tensors,
    active_within_tensors,
    as_read,
    columns_of,
    flat_order,
    flatten,
    full_matrix,
    gather,
    scatter,
    unflatten,
    within_tensors,
)

shapes = st.lists(
    st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple),
    min_size=1,
    max_size=4,
)
last_names = st.sampled_from(["kernel", "w", "bias"])


@st.composite
def tensors(draw):
    """A dict of arrays with distinct numbers, some of them Flax kernels."""
    found = {}
    for i, shape in enumerate(draw(shapes)):
        size = int(np.prod(shape, dtype=int))
        values = np.arange(size, dtype=np.float32) + 1000 * i
        found[f"layer{i}/{draw(last_names)}"] = values.reshape(shape)
    return found


def in_pytorch_order(path: str, array: np.ndarray) -> np.ndarray:
    """Oracle: (in, out) -> (out, in) and HWIO -> OIHW for kernels, then row-major."""
    if path.endswith("kernel") and array.ndim >= 2:
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return array.reshape(-1)


# ------------------------------------------------------------------- flat order


ARRAYS = {
    "conv/kernel": np.arange(96.0).reshape(2, 3, 4, 4),
    "conv/bias": 100 + np.arange(4.0),
    "deep/kernel": 200 + np.arange(24.0).reshape(2, 3, 4),
    "fc/w": 300 + np.arange(6.0).reshape(2, 3),
    "scale": np.array(400.0),
}


def test_flatten_is_row_major_in_pytorch_layout_and_unflatten_its_inverse() -> None:
    order = flat_order(ARRAYS)
    flat = flatten(order, {p: jnp.asarray(a) for p, a in ARRAYS.items()})
    expected = [in_pytorch_order(p, a) for p, a in ARRAYS.items()]
    np.testing.assert_array_equal(flat, np.concatenate(expected))
    assert order.offsets == (0, 96, 100, 124, 130, 131)
    back = unflatten(order, flat)
    assert list(back) == list(ARRAYS)
    for path, array in ARRAYS.items():
        np.testing.assert_array_equal(back[path], array)


def test_leading_axes_stay_in_front() -> None:
    arrays = {"fc/kernel": np.arange(6).reshape(2, 3), "w": np.arange(4).reshape(2, 2)}
    order = flat_order(arrays)
    stacked = {p: jnp.stack([a, 10 * a, 100 * a]) for p, a in arrays.items()}
    rows = flatten(order, stacked)
    assert rows.shape == (3, 10)
    one = flatten(order, {p: jnp.asarray(a) for p, a in arrays.items()})
    np.testing.assert_array_equal(rows, np.outer([1, 10, 100], one))


@pytest.mark.parametrize(
    ("path", "ndim", "axes"),
    [
        ("fc/kernel", 2, (1, 0)),
        ("kernel", 4, (3, 2, 0, 1)),
        ("conv/kernel", 3, (2, 1, 0)),
        ("a/kernel", 1, (0,)),
        ("a/weight", 4, (0, 1, 2, 3)),
        ("kernel/scale", 2, (0, 1)),
        ("a/my_kernel", 2, (0, 1)),
    ],
)
def test_only_flax_kernels_are_read_output_first(path, ndim, axes) -> None:
    assert conventional(path, tuple(range(2, 2 + ndim))).order == axes


def test_other_axes_can_be_given() -> None:
    array = jnp.arange(6).reshape(2, 3)
    order = flat_order({"fc/kernel": array}, {"fc/kernel": WeightAxes((2, 3), "oi")})
    np.testing.assert_array_equal(flatten(order, {"fc/kernel": array}), np.arange(6))
    np.testing.assert_array_equal(
        unflatten(order, jnp.arange(6))["fc/kernel"], np.arange(6).reshape(2, 3)
    )


def test_an_axis_is_cut_where_parts_of_it_have_roles() -> None:
    """Outputs of two heads, each with its query and key: [inputs, head x part]."""
    array = np.arange(24).reshape(3, 8)
    axes = {"qk": WeightAxes((3, 2, 2, 2), "ioso")}
    order = flat_order({"qk": array}, axes)
    read = array.reshape(3, 2, 2, 2).transpose(2, 1, 3, 0).reshape(-1)
    np.testing.assert_array_equal(flatten(order, {"qk": array}), read)
    np.testing.assert_array_equal(as_read(axes["qk"], array), read)
    np.testing.assert_array_equal(unflatten(order, jnp.asarray(read))["qk"], array)
    assert order.layers == (0, 12, 24)


def test_blocks_do_not_cross_stacked_layers() -> None:
    arrays = {"w": np.zeros((3, 5)), "v": np.zeros((2, 2))}
    order = flat_order(arrays, {"w": WeightAxes((3, 5), "so")})
    assert order.layers == (0, 5, 10, 15, 19)
    found = {tuple(b) for b in blocks_of(within_tensors(order, 4), order.size)}
    firsts = {block[0]: len(block) for block in found}
    assert firsts == {0: 4, 4: 1, 5: 4, 9: 1, 10: 4, 14: 1, 15: 4}
    whole = {len(b) for b in blocks_of(within_tensors(order, None), order.size)}
    assert whole == {5, 4}


# --------------------------------------------------------------------- layouts


def blocks_of(layout, size: int) -> list[np.ndarray]:
    """The blocks without their padding."""
    return [row[row != size] for group in layout for row in group]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(tensors(), st.one_of(st.none(), st.integers(1, 300)))
def test_blocks_are_the_chunks_of_each_tensor(arrays, block_size) -> None:
    order = flat_order(arrays)
    found = blocks_of(within_tensors(order, block_size), order.size)
    expected = []
    for start, array in zip(order.offsets, arrays.values(), strict=False):
        width = block_size or array.size
        indices = start + np.arange(array.size)
        expected += [indices[i : i + width] for i in range(0, array.size, width)]
    key = lambda block: int(block[0])  # noqa: E731
    found, expected = sorted(found, key=key), sorted(expected, key=key)
    assert [b.tolist() for b in found] == [b.tolist() for b in expected]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(tensors(), st.one_of(st.none(), st.integers(1, 300)))
def test_padding_is_last_and_never_a_whole_block(arrays, block_size) -> None:
    order = flat_order(arrays)
    for group in within_tensors(order, block_size):
        assert group.dtype == np.int32
        padded = group == order.size
        assert not padded[:, 0].any()
        assert (np.diff(padded.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("block_size", [None, 1, 7, 40])
def test_scatter_of_gather_is_the_identity(block_size) -> None:
    order = flat_order(ARRAYS)

    @jax.jit
    def there_and_back(vector):
        found = jnp.zeros(order.size)
        for group in within_tensors(order, block_size):
            found = scatter(found, group, gather(vector, group))
        return found

    vector = np.arange(order.size, dtype=np.float32) + 1
    np.testing.assert_array_equal(there_and_back(vector), vector)


def test_gather_reads_zeros_where_a_block_is_padded() -> None:
    group = np.asarray([[0, 1, 2], [3, 4, 5]], np.int32)  # 5 is the padding
    vectors = jnp.asarray([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, np.inf]])
    np.testing.assert_array_equal(
        gather(vectors, group),
        [[[1, 2, 3], [4, 5, 0]], [[6, 7, 8], [9, np.inf, 0]]],
    )


@pytest.mark.parametrize(("share", "length"), [(0.0, 1), (0.4, 4), (1.0, 8)])
def test_columns_are_where_the_chosen_weights_stand(share, length) -> None:
    group = np.random.default_rng(0).permutation(24)[:21].reshape(3, 7)
    group[2, 5:] = 24  # padding
    chosen = np.random.default_rng(1).random(24) < share
    columns = columns_of(chosen, group)
    assert columns.shape == (3, length)
    for row, found in zip(group, columns, strict=True):
        inside = [c for c in range(7) if row[c] < 24 and chosen[row[c]]]
        assert found.tolist() == inside + [7] * (length - len(inside))


def test_what_lies_in_padding_falls_off_and_weights_in_no_block_stay() -> None:
    group = np.asarray([[1, 2, 4]], np.int32)
    vector = scatter(jnp.asarray([1.0, 2.0, 3.0, 4.0]), group, jnp.ones((1, 3)) * 9)
    np.testing.assert_array_equal(vector, [1, 9, 9, 4])


def test_whole_tensors_of_one_size_share_a_group() -> None:
    order = flat_order({"a": jnp.ones(6), "b": jnp.ones(4), "c": jnp.ones((2, 3))})
    assert sorted(group.shape for group in within_tensors(order, None)) == [
        (1, 4),
        (2, 6),
    ]


def test_the_full_matrix_is_one_block_over_all_tensors() -> None:
    order = flat_order({"a": jnp.ones(6), "b": jnp.ones(4)})
    (group,) = full_matrix(order)
    np.testing.assert_array_equal(group, np.arange(10)[None])


def test_the_full_matrix_narrows_as_weights_go() -> None:
    order = flat_order({"a": np.zeros((300, 200)), "b": np.zeros((50, 400))})
    active = np.random.default_rng(0).random(order.size) < 0.3
    (group,) = full_matrix(order, None, active)
    # 80,000 weights: the half of it still holds the 24,000, a quarter does not.
    assert group.shape == (1, 40_000)
    real = group[group < order.size]
    np.testing.assert_array_equal(real, np.flatnonzero(active))
    few = np.zeros(order.size, bool)
    few[7] = True
    # Halved four times; once more would be too narrow for what it saves.
    assert full_matrix(order, None, few)[0].shape == (1, 5_000)
    # Fewer samples, for which compiling a narrower block takes longer than it saves.
    assert full_matrix(order, None, few, num_samples=50)[0].shape == (1, order.size)


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_the_full_matrix_with_a_block_size_is_cut_within_tensors(block_size) -> None:
    order = flat_order({"a": jnp.ones(6), "b": jnp.ones(4)})
    found, expected = full_matrix(order, block_size), within_tensors(order, block_size)
    assert [g.tolist() for g in found] == [g.tolist() for g in expected]


# ------------------------------------------------------------ other ways to cut


def members(layout, size: int) -> list[list[int]]:
    """Indices of each block, padding left out, in order."""
    blocks = [row[row < size].tolist() for group in layout for row in group]
    return sorted(blocks)


PAIR = flat_order({"a": np.ones((2, 5)), "b": np.ones(7)})


@pytest.mark.parametrize("width", [1, 4, 17, 100])
def test_chunks_across_tensors_pay_no_heed_to_borders(width) -> None:
    found = members(across_tensors(PAIR, width), 17)
    assert found == [list(range(i, min(i + width, 17))) for i in range(0, 17, width)]


def test_active_chunks_grow_as_weights_go() -> None:
    active = np.ones(17, bool)
    active[[0, 3, 4, 5, 6, 12, 13, 14]] = False  # 9 of 17 stay
    layout = active_within_tensors(PAIR, 3, active)
    assert {group.shape[1] for group in layout} == {5}  # floor(3 * 17 / 9)
    assert members(layout, 17) == [[1, 2, 7, 8, 9], [10, 11, 15, 16]]
    layout = active_within_tensors(PAIR, 2, active)
    assert members(layout, 17) == [[1, 2, 7], [8, 9], [10, 11, 15], [16]]


@pytest.mark.parametrize("active", [None, np.ones(17, bool), np.zeros(17, bool)])
@pytest.mark.parametrize("width", [None, 4])
def test_with_all_or_nothing_active_they_are_those_within_tensors(
    active, width
) -> None:
    found = active_within_tensors(PAIR, width, active)
    assert members(found, 17) == members(within_tensors(PAIR, width), 17)


def test_whole_tensors_keep_their_active_weights_together() -> None:
    active = np.ones(17, bool)
    active[[0, 12, 13]] = False
    found = active_within_tensors(PAIR, None, active)
    assert members(found, 17) == [list(range(1, 10)), [10, 11, 14, 15, 16]]
    active[10:] = False  # a tensor without any
    assert members(active_within_tensors(PAIR, None, active), 17) == [
        list(range(1, 10))
    ]
