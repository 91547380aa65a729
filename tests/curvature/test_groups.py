"""The statistic of groups against explicit inverses in float64."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from woodfisher_jax.curvature.joint import joint_update

import woodfisher_jax as wf
from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.curvature.groups import parts_of
from woodfisher_jax.equations.obs import obs_saliency
from woodfisher_jax.selection.patterns import Groups, groups_of, parse
from woodfisher_jax.trees.blocks import flat_order, flatten

# Otherwise every operation is compiled on its own.
forms = jax.jit(group_forms, static_argnames="solver")

WIDTH = 40
DAMPING = 0.05


def problem(num_samples, seed=0, scale=1.0):
    """Gradients of weights that explain one another, and weights, in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(num_samples, WIDTH)) * scale
    gradients[:, WIDTH // 2 :] += gradients[:, : WIDTH // 2]
    return gradients, rng.normal(size=WIDTH)


def fisher(gradients, damping=DAMPING):
    return damping * np.eye(WIDTH) + gradients.T @ gradients / len(gradients)


def oracle(gradients, weights, group, damping=DAMPING):
    inverse = np.linalg.inv(fisher(gradients, damping))
    part = weights[group]
    return part @ np.linalg.solve(inverse[np.ix_(group, group)], part) / 2


def tables(sizes):
    """Groups of consecutive columns, and one of nothing but padding, for each size."""
    found = []
    for size in sizes:
        table = np.arange(WIDTH, dtype=np.int32).reshape(-1, size)
        found.append(np.pad(table, [(0, 1), (0, 0)], constant_values=WIDTH))
    return found


def single(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize(
    ("solver", "num_samples", "sizes"),
    [
        # By elimination, by Cholesky, and with more weights than samples.
        ("sample_space", 18, (1, 4, 20, 40)),
        ("dense", 50, (20,)),
        ("recursion", 6, (4,)),
    ],
)
def test_groups_are_worth_what_the_explicit_inverse_says(solver, num_samples, sizes):
    gradients, weights = problem(num_samples)
    values, error = forms(
        *single(gradients, weights), tables(sizes), np.float32(DAMPING), solver=solver
    )
    for table, found in zip(tables(sizes), values, strict=True):
        expected = [oracle(gradients, weights, group) for group in table[:-1]]
        np.testing.assert_allclose(found[:-1, 0], expected, rtol=1e-4)
        assert found[-1] == 0
    assert error < 1e-4


def test_one_weight_and_all_weights_are_known_cases():
    gradients, weights = problem(18)
    arrays = (*single(gradients, weights), tables((1, 4, 20, 40)), np.float32(DAMPING))
    (alone, *_, everything), _ = forms(*arrays, solver="sample_space")
    diagonal = np.diag(np.linalg.inv(fisher(gradients)))
    expected = obs_saliency(weights, diagonal)
    np.testing.assert_allclose(alone[:-1, 0], expected, rtol=1e-4)
    # Nothing is left that could adjust.
    loss = weights @ fisher(gradients) @ weights / 2
    np.testing.assert_allclose(everything[0, 0], loss, rtol=1e-4)


def test_it_is_the_model_loss_of_the_joint_update():
    """So that scores and updates of groups speak of the same thing."""
    gradients, weights = problem(6)
    for group in (np.arange(4), np.arange(0, WIDTH, 3)):
        kept = ~np.isin(np.arange(WIDTH), group)
        delta, _ = joint_update(
            *single(gradients, weights), kept, np.zeros(6, np.float32), DAMPING
        )
        delta = np.float64(delta)
        loss = delta @ fisher(gradients) @ delta / 2
        np.testing.assert_allclose(oracle(gradients, weights, group), loss, rtol=1e-4)


def test_every_choice_of_several_is_compared():
    kept, size = 4, 8
    gradients, weights = problem(6)
    weights[:3] = 0.0  # pruned already: no gradient either
    gradients[:, :3] = 0.0
    removals = np.array(list(combinations(range(size), size - kept)), np.int32)
    table = np.arange(WIDTH, dtype=np.int32).reshape(-1, size)
    (values,), error = forms(
        *single(gradients, weights), [table], np.float32(DAMPING), removals=removals
    )
    expected = [
        [oracle(gradients, weights, group[gone]) for gone in removals]
        for group in table
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)
    assert error < 1e-4


# -------------------------------------------------------------------------- many blocks


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


def blocks_of(scale):
    """Three blocks of gradients and weights, and groups of four; float32."""
    problems = [problem(30, seed, scale * 30.0**seed) for seed in range(3)]
    gradients, weights = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    of, slots = np.divmod(np.arange(3 * WIDTH), 4)
    groups = Groups(of, slots, 30, np.zeros(30), None)
    parts = parts_of(np.arange(3 * WIDTH).reshape(3, WIDTH), groups)
    return (*single(gradients, weights), parts)


@pytest.mark.parametrize("damping", [1e-7, 1e-3])
def test_many_blocks_are_good_to_a_thousandth(damping):
    """Whatever float32 makes of them: what is not is computed again."""
    gradients, weights, parts = blocks_of(1e-3)
    found = group_saliencies(
        gradients, weights, parts, None, damping, "sample_space", ["a", "b", "c"]
    )
    expected = [
        [oracle(*one, group, damping) for group in np.arange(WIDTH).reshape(-1, 4)]
        for one in zip(np.float64(gradients), np.float64(weights), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_what_cannot_be_inverted_is_refused():
    gradients, weights, parts = blocks_of(1e8)
    with pytest.raises(CurvatureError, match=r"'a/kernel'.*raise damping"):
        group_saliencies(
            gradients, weights, parts, None, 1e-12, "sample_space", ["a/kernel"] * 3
        )


# ------------------------------------------------------------------------- in a network

SHAPES = {"a/kernel": (8, 3), "b/kernel": (2, 4, 5)}
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
    "cut by blocks": ("2:4", {"block_size": 7, "update": "joint"}),
    "with a slope": (
        "filters",
        {"method": "woodtaylorblock", "block_size": 7, "store": "recompute"},
    ),
    "across tensors": (in_halves, {"method": "woodfisher"}),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "with a slope" else [])
        for name in CASES
    ],
)
def test_what_goes_raises_the_loss_least(case):
    pattern, options = CASES[case]
    options = {"damping": DAMPING, **options}
    several = pattern == "2:4"
    params, masks, info = wf.prune(
        inner_product,
        PARAMS,
        SAMPLES,
        pattern=pattern,
        sparsity=None if several else 0.4,
        **options,
    )
    order = flat_order(masks)
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
        room = order.size * 0.6
        ranked = sorted(range(len(members)), key=lambda n: -each[n] / len(members[n]))
        for number in ranked:
            room -= len(members[number])
            if room < 0:
                expected[members[number]] = False
                total += each[number]
    np.testing.assert_array_equal(flatten(order, masks), expected)
    wf.patterns.check(params, pattern)
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
