"""Patterns: their groups against counting by hand, and the check of a network."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.selection.named_patterns import parse
from woodfisher_jax.selection.patterns import check, groups_of
from woodfisher_jax.selection.structures import structures
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.blocks import flat_order, unflatten
from woodfisher_jax.trees.masks import masks_tree

KERNELS = {
    "conv/kernel": jnp.ones((2, 3, 4, 5), bool),
    "fc/kernel": jnp.ones((8, 3), bool),
}
WIDTH, HEADS = 6, 3
ATTENTION = {
    f"{block}/attn/{part}/kernel": jnp.ones((WIDTH, outputs), bool)
    for block in ("blocks0", "blocks1")
    for part, outputs in (("qkv", 3 * WIDTH), ("proj", WIDTH))
}


HEAD_AXES = {
    path: WeightAxes((WIDTH, 3, HEADS, WIDTH // HEADS), "iooo", (2,), path[:7])
    if "qkv" in path
    else WeightAxes((HEADS, WIDTH // HEADS, WIDTH), "iio", (0,), path[:7])
    for path in ATTENTION
}


def groups(pattern, tensors=KERNELS, axes=None):
    """The groups, and their numbers in the shapes of the tensors."""
    order = flat_order(tensors, axes)
    found = groups_of(parse(pattern), order)
    return found, {
        path: np.asarray(tensor)
        for path, tensor in unflatten(order, jnp.asarray(found.of)).items()
    }


def members(numbers):
    """For each group the entries that it has, as (path, *position)."""
    found: dict[int, set] = {}
    for path, tensor in numbers.items():
        for position, number in np.ndenumerate(tensor):
            found.setdefault(int(number), set()).add((path, *position))
    return {frozenset(entries) for entries in found.values()}


def blocks(height, width):
    """Blocks of inputs by outputs, at each position of each kernel."""
    found: dict[tuple, set] = {}
    for path, tensor in KERNELS.items():
        for *where, i, o in np.ndindex(tensor.shape):
            key = (path, *where, i // height, o // width)
            found.setdefault(key, set()).add((path, *where, i, o))
    return {frozenset(entries) for entries in found.values()}


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (3, 2), (1, 1), (100, 100)])
def test_blocks_are_those_of_inputs_and_outputs(shape):
    found, numbers = groups("{}x{}".format(*shape))
    assert members(numbers) == blocks(*shape)
    assert found.number == len(blocks(*shape))
    assert found.removals is None


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
def test_several_of_so_many_inputs(pattern):
    kept, size = (int(number) for number in pattern.split(":"))
    found, numbers = groups(pattern)
    assert members(numbers) == blocks(size, 1)
    assert parse(pattern).sparsity == 1 - kept / size
    removed = {frozenset(row) for row in found.removals.tolist()}
    assert len(removed) == len(found.removals)
    assert {len(slots) for slots in removed} == {size - kept}
    slots = unflatten(flat_order(KERNELS), jnp.asarray(found.slots))
    for tensor in slots.values():  # in the order of the inputs
        expected = np.arange(tensor.shape[-2]) % size
        np.testing.assert_array_equal(
            tensor, np.broadcast_to(expected[:, None], tensor.shape)
        )


def test_a_filter_is_all_that_goes_into_an_output():
    _, numbers = groups("filters")
    for path, tensor in numbers.items():
        outputs = tensor.shape[-1]
        flat = tensor.reshape(-1, outputs)
        assert (flat == flat[0]).all(), path
        assert len(set(flat[0])) == outputs
    assert not set(numbers["conv/kernel"].flat) & set(numbers["fc/kernel"].flat)


def test_a_head_is_its_columns_and_rows_of_one_layer():
    found, numbers = groups(f"heads:{HEADS}", ATTENTION, HEAD_AXES)
    assert found.number == 2 * HEADS
    np.testing.assert_array_equal(groups("heads", ATTENTION, HEAD_AXES)[0].of, found.of)
    of_layer = []
    for block in ("blocks0", "blocks1"):
        qkv = numbers[f"{block}/attn/qkv/kernel"]
        proj = numbers[f"{block}/attn/proj/kernel"]
        # [width, (query, key, value), heads, head width] and [heads, head width, width]
        by_head = qkv.reshape(WIDTH, 3, HEADS, -1)
        rows = proj.reshape(HEADS, -1, WIDTH)
        for head in range(HEADS):
            (number,) = set(by_head[:, :, head].flat)
            assert set(rows[head].flat) == {number}
        of_layer.append(set(qkv.flat))
        assert len(of_layer[-1]) == HEADS
    assert not of_layer[0] & of_layer[1]


def test_heads_of_linen_have_an_axis_of_their_own():
    shapes = {"query": (5, 3, 2), "key": (5, 3, 2), "value": (5, 3, 2)}
    shapes["out"] = (3, 2, 5)
    tensors = {f"attn/{name}/kernel": np.ones(s) for name, s in shapes.items()}
    axes = {path: WeightAxes(t.shape, "ioo", (1,), "a") for path, t in tensors.items()}
    axes["attn/out/kernel"] = WeightAxes(shapes["out"], "iio", (0,), "a")
    found, numbers = groups("heads:3", tensors, axes)
    assert found.number == 3
    for head in range(3):
        (number,) = set(numbers["attn/out/kernel"][head].flat)
        for name in ("query", "key", "value"):
            assert set(numbers[f"attn/{name}/kernel"][:, head].flat) == {number}


def test_a_function_names_groups_across_tensors():
    found, numbers = groups(
        lambda path, shape: (
            np.array([-7] if path == "fc/kernel" else [[10**15], [-7]])
            if len(shape) == 2
            else np.where(np.arange(shape[-1]) < 2, -7, 10**15)
        )
    )
    assert found.number == 2
    conv, fc = numbers["conv/kernel"], numbers["fc/kernel"]
    assert set(conv[..., :2].flat) == set(fc.flat) != set(conv[..., 2:].flat)


def test_groups_are_numbered_by_their_first_weight():
    found, _ = groups("3x2")
    firsts = [int(np.argmax(found.of == number)) for number in range(found.number)]
    assert firsts == sorted(firsts)
    edge = flat_order(KERNELS).offsets[1]
    np.testing.assert_array_equal(found.layers, np.array(firsts) >= edge)
    for number in range(found.number):
        slots = found.slots[found.of == number]
        np.testing.assert_array_equal(slots, np.arange(len(slots)))


# --------------------------------------------------------------------------- the check


def pruned(size):
    """Weights of which the first of each group of inputs are zero."""
    return {
        path: jnp.where(jnp.arange(t.shape[-2])[:, None] % size < size // 2, 0.0, 1.5)
        * jnp.ones(t.shape)
        for path, t in KERNELS.items()
    }


def test_what_obeys_a_pattern_passes():
    weights = pruned(4)
    assert check(weights, "2:4") == 30 + 6
    assert check({path: w != 0 for path, w in weights.items()}, "2x1") == 60 + 12
    with_bias = {**weights, "bias": jnp.ones(7)}
    assert check(with_bias, "2:4") == 36
    assert check(with_bias, "2:4", "fc") == 6
    assert check({"a": {"kernel": jnp.zeros((4, 2))}}, "filters") == 2


def test_a_group_may_have_fewer_of_several_but_no_part_of_a_whole():
    weights = pruned(4)
    fewer = {**weights, "fc/kernel": weights["fc/kernel"].at[2, 0].set(0.0)}
    check(fewer, "2:4")
    with pytest.raises(ValueError, match=r"broken by 1 of 72.*fc/kernel.*\(2, 0\)"):
        check(fewer, "2x1")


def test_what_breaks_a_pattern_is_counted_and_placed():
    weights = pruned(4)
    conv = weights["conv/kernel"].at[1, 2, 0, 3].set(1e-30).at[0, 1, 1, 4].set(-1.0)
    message = (
        r"'2:4' is broken by 2 of 36 groups; the first, from 'conv/kernel' "
        r"\(1, 2, 0, 3\) on, has 3 nonzero of 4 weights, expected at most 2"
    )
    with pytest.raises(ValueError, match=message):
        check({**weights, "conv/kernel": conv}, "2:4")


def attended(params, tokens):
    return jnp.tanh(params["table"][tokens] @ params["first"]) @ params["last"]


def test_axes_of_all_weights_go_with_masks_of_some():
    params = {
        "table": jnp.ones((5, 8)),
        "first": jnp.ones((8, 4)),
        "last": jnp.ones((4, 8)),
    }
    axes = find_axes(attended, params, jnp.zeros(3, int))
    masks = {"first": jnp.arange(8)[:, None] % 4 < jnp.full(4, 2)}
    assert check(masks, "2:4", axes=axes) == 8
    assert check(masks_tree(params, masks), "2:4", axes=axes) == 8
    assert check({**masks, "last": None, "table": True}, "2:4", axes=axes) == 8
    narrow = {"first": masks["first"][:, :3]}
    with pytest.raises(ValueError, match="axes\\['first'\\] are of shape"):
        check(narrow, "2:4", axes=axes)
    with pytest.raises(ValueError, match=r"'first', which is none of .* 'frist'"):
        check({"frist": masks["first"]}, "2:4", axes=axes)


def test_nothing_to_check_is_said():
    with pytest.raises(ValueError, match="tensors hold no arrays; expected masks"):
        check({"fc": None}, "2:4")


# -------------------------------------------------------------- layouts and structures


@pytest.mark.parametrize("pattern", ["2:4", "3x2", "filters"])
def test_the_layout_of_a_tensor_does_not_change_the_groups(pattern):
    """Kernels as PyTorch has them, (outputs, inputs, ...), have the same groups."""
    moved = {path: jnp.moveaxis(t, (-1, -2), (0, 1)) for path, t in KERNELS.items()}
    letters = {"conv/kernel": "oikk", "fc/kernel": "oi"}
    axes = {path: WeightAxes(t.shape, letters[path]) for path, t in moved.items()}
    usual, turned = groups(pattern)[1], groups(pattern, moved, axes)[1]
    back = {path: np.moveaxis(t, (0, 1), (-1, -2)) for path, t in turned.items()}
    assert members(back) == members(usual)


@pytest.mark.parametrize("pattern", ["2:4", "3x2", "filters", "heads"])
def test_stacked_layers_have_groups_of_their_own(pattern):
    """Two layers in one tensor have the groups of two tensors."""
    alone = {"a": np.ones((4, 3, 2)), "b": np.ones((4, 3, 2))}
    one = WeightAxes((4, 3, 2), "ioo", (1,), "attention")
    axes = {"a": one, "b": one._replace(attention="another")}
    stack = {"s": np.ones((4, 2, 3, 2))}
    together = {"s": WeightAxes((4, 2, 3, 2), "isoo", (2,), "attention")}
    apart, numbers = (
        groups(pattern, alone, axes)[1],
        groups(pattern, stack, together)[1],
    )
    unstacked = {"a": numbers["s"][:, 0], "b": numbers["s"][:, 1]}
    assert members(unstacked) == members(apart)


def two_layers(params, x):
    h = jnp.tanh(x @ params["a"])
    return jnp.tanh(h @ params["b"]) @ params["c"]


TWO_LAYERS = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5)), "c": jnp.ones((5, 2))}


def test_a_structure_is_worth_the_weights_that_read_it():
    found = structures(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    axes = find_axes(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    order = flat_order(TWO_LAYERS, axes)
    numbers = groups_of(parse(found), order)
    own = unflatten(order, jnp.asarray(numbers.of))
    # Rows of b and c are structures; weights of a, which only make some, are alone.
    for path in ("b", "c"):
        assert (own[path] == own[path][:, :1]).all()
        assert set(np.asarray(own[path][:, 0]).tolist()) <= {*numbers.units.values()}
    assert len(numbers.units) == 9
    assert not {*numbers.units.values()} & {*np.asarray(own["a"]).flat}
