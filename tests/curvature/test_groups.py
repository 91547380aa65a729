"""Groups within blocks, and what a step with a pattern prunes, in float64."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.curvature.groups import parts_of
from woodfisher_jax.selection.named_patterns import parse
from woodfisher_jax.selection.patterns import Groups, groups_of
from woodfisher_jax.trees.axes import given_axes
from woodfisher_jax.trees.blocks import flat_order, flatten

DAMPING = 0.05


def groups_of_sizes(sizes, seed=0):
    """Groups of shuffled members over a flat vector."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(of)
    slots = np.empty(len(of), np.int32)
    for number in range(len(sizes)):
        slots[of == number] = np.arange(sizes[number])
    nothing = np.zeros(len(sizes), np.int32)
    return Groups(of.astype(np.int32), slots, len(sizes), nothing, None)


def test_parts_are_the_members_in_each_block():
    groups = groups_of_sizes([1, 2, 3, 5, 9, 17])
    size = len(groups.of)
    # Two blocks that leave some weights out, the second padded.
    chosen = np.random.default_rng(1).permutation(size)[: size - 4]
    index = np.full((2, 20), size)
    index.reshape(-1)[: len(chosen)] = chosen
    parts = parts_of(index, groups)
    found: dict[tuple[int, int], list] = {}
    for part in parts:
        for block, row in np.ndindex(part.groups.shape):
            columns = part.columns[block, row]
            columns = columns[columns < 20]
            number = int(part.groups[block, row])
            assert (number == groups.number) == (len(columns) == 0)
            if len(columns):
                assert (block, number) not in found
                found[block, number] = index[block, columns].tolist()
                assert 2 * len(columns) > part.columns.shape[2]
    for block in range(2):
        for number in range(groups.number):
            mine = index[block][index[block] < size]
            expected = sorted(mine[groups.of[mine] == number])
            assert sorted(found.get((block, number), [])) == expected


def test_parts_of_several_are_in_the_order_of_slots():
    of, slots = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    removals = np.array([[0, 1]])
    groups = Groups(of, slots, 3, np.zeros(3, int), removals)
    index = np.array([[11, 3, 0, 12], [5, 4, 7, 6]])
    (part,) = parts_of(index, groups)
    assert part.groups.tolist() == [[0, 2], [1, 3]]
    first, second = part.columns.tolist()
    assert first == [[2, 4, 4, 1], [4, 4, 4, 0]]
    assert second[0] == [1, 0, 3, 2]


# ------------------------------------------------------------------------- in a network

SHAPES = {"a/kernel": (8, 3), "b/kernel": (2, 4, 5)}
AXES = {"a/kernel": "io", "b/kernel": "kio"}
RANDOM = np.random.default_rng(3)
PARAMS = {p: RANDOM.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
SAMPLES = {p: RANDOM.normal(size=(9, *s)).astype(np.float32) for p, s in SHAPES.items()}


def inner_product(params, batch):
    """A loss whose gradient at an example is the example."""
    return sum(
        jnp.mean(jnp.sum(params[p] * x, axis=tuple(range(1, x.ndim))))
        for p, x in batch.items()
    )


def in_halves(path, shape):
    """Two groups that lie in both tensors, the second of odd outputs."""
    return np.arange(shape[-1]) % 2


CASES = {
    "cut by blocks": (
        "2:4",
        {"block_size": 7, "update": "joint", "store": "recompute"},
    ),
    "with a slope": ("filters", {"method": "woodtaylorblock", "block_size": 7}),
    "across tensors": (in_halves, {"method": "woodfisher"}),
}


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (name != "with a slope"))
        for name, case in CASES.items()
    ],
    ids=CASES,
)
def test_the_pruned_groups_raise_the_loss_least(pattern, options) -> None:
    options = {"damping": DAMPING, **options}
    several = pattern == "2:4"
    params, masks, info = wf.prune(
        inner_product,
        PARAMS,
        SAMPLES,
        pattern=pattern,
        sparsity=None if several else 0.375,
        axes=AXES,
        **options,
    )
    axes = given_axes(AXES, masks)
    order = flat_order(masks, axes)
    gradients, weights = (np.float64(flatten(order, a)) for a in (SAMPLES, PARAMS))
    inverse = inverse_of(order, gradients, options)
    if "method" in options and options["method"].startswith("woodtaylor"):
        weights = weights - inverse @ gradients.mean(axis=0)

    def saliency(group):
        part = weights[group]
        return part @ np.linalg.solve(inverse[np.ix_(group, group)], part) / 2

    groups = groups_of(parse(pattern), order)
    members = [np.flatnonzero(groups.of == n) for n in range(groups.number)]
    expected = np.ones(order.size, bool)
    total = 0.0
    if several:
        for group in members:
            lost = min(combinations(group, 2), key=lambda some: saliency([*some]))
            expected[[*lost]] = False
            total += saliency([*lost])
    else:
        each = [saliency(group) for group in members]
        room = order.size * 0.625
        ranked = sorted(range(len(members)), key=lambda n: -each[n] / len(members[n]))
        for number in ranked:
            room -= len(members[number])
            if room < 0:
                expected[members[number]] = False
                total += each[number]
    np.testing.assert_array_equal(flatten(order, masks), expected)
    wf.patterns.check(params, pattern, axes=axes)
    if "woodtaylor" not in options.get("method", ""):
        assert info.saliency_sum == pytest.approx(total, rel=1e-4)


def inverse_of(order, gradients, options):
    """F⁻¹, zero between the blocks of the method."""
    method = wf.METHODS[options.get("method", "woodfisherblock")]
    inverse = np.zeros((order.size, order.size))
    for group in method.layout(order, options.get("block_size"), None):
        for block in group:
            inside = block[block < order.size]
            part = gradients[:, inside]
            curvature = options["damping"] * np.eye(len(inside)) + part.T @ part / 9
            inverse[np.ix_(inside, inside)] = np.linalg.inv(curvature)
    return inverse
