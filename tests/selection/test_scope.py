"""Masks that depend on what weights cost and on groups, against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from woodfisher_jax import METHODS, DiagonalFisher, patterns, prune
from woodfisher_jax.methods import applicable
from woodfisher_jax.selection.scope import choose_of_each, shared, sums_of_single
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.blocks import flat_order, flatten
from woodfisher_jax.trees.paths import leaves_by_path

RANDOM = np.random.default_rng(0)


class Net(nn.Module):
    """A convolution whose weights cost 16 MACs each, and a dense layer, 1 each."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="conv")(images))
        return nn.Dense(3, name="fc")(jnp.mean(x, axis=(1, 2)))


NET = Net()
IMAGES = RANDOM.standard_normal((20, 6, 6, 2)).astype(np.float32)
LABELS = RANDOM.integers(0, 3, 20)
PARAMS = jax.jit(NET.init)(jax.random.key(0), IMAGES)["params"]
PATHS = ("conv/kernel", "fc/kernel")
COSTS = {"conv/kernel": 16.0, "fc/kernel": 1.0}
DENSE_MACS = 72 * 16 + 12


def loss_fn(params, batch):
    logs = jax.nn.log_softmax(NET.apply({"params": params}, batch[0]))
    return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], 1))


def run(loss=loss_fn, **options):
    options = applicable(options["method"], {"damping": 1e-3}) | options
    return prune(loss, PARAMS, (IMAGES, LABELS), **options)


def scores_of(method: str) -> dict[str, np.ndarray]:
    """The statistic, from gradients in float64."""
    leaves = {p: np.float64(leaves_by_path(PARAMS)[p]) for p in PATHS}
    if method == "globalmagni":
        return {p: np.abs(w) for p, w in leaves.items()}
    one = lambda p, x, y: loss_fn(p, (x[None], y[None]))  # noqa: E731
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), PARAMS)
        rows = leaves_by_path(
            jax.vmap(jax.grad(one), (None, 0, 0))(wide, np.float64(IMAGES), LABELS)
        )
    found = {}
    for path, w in leaves.items():
        g = np.asarray(rows[path]).reshape(20, -1)
        inverse = np.linalg.inv(g.T @ g / 20 + 1e-3 * np.eye(w.size))
        found[path] = w**2 / (2 * np.diag(inverse).reshape(w.shape))
    return found


def highest(scores: dict[str, np.ndarray], kept: int) -> dict[str, np.ndarray]:
    joined = np.concatenate([scores[p].reshape(-1) for p in PATHS])
    least = np.sort(joined)[-kept]
    return {p: scores[p] >= least for p in PATHS}


def assert_masks(masks, expected) -> None:
    for path in PATHS:
        np.testing.assert_array_equal(masks[path], expected[path])


@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("globalmagni", {"flops_power": 0.5}, lambda cost, size: (cost * size) ** 0.5),
        pytest.param(
            "woodfisherblock_flops",
            {"flops_power": 0.5, "flops_per_parameter": True},
            lambda cost, size: cost**0.5,
            marks=pytest.mark.slow,
        ),
        (
            "globalmagni",
            {"flops_power": 0.5, "flops_per_parameter": True},
            lambda cost, size: cost**0.5,
        ),
        (
            "globalmagni",
            {"flops_power": 2.0, "flops_normalize": "log"},
            lambda cost, size: np.log2(cost * size) ** 2,
        ),
    ],
)
def test_scores_are_divided_by_a_power_of_what_layers_cost(
    method, options, factor
) -> None:
    _, masks, _ = run(sparsity=0.5, method=method, **options)
    scores = scores_of(method)
    for path in PATHS:
        scores[path] = scores[path] / factor(COSTS[path], scores[path].size)
    assert_masks(masks, highest(scores, 42))


@pytest.mark.parametrize(
    "method",
    ["globalmagni", pytest.param("woodfisherblock_flops", marks=pytest.mark.slow)],
)
def test_a_target_in_macs_keeps_the_highest_scores_that_fit(method) -> None:
    target = 600e-6
    params, masks, info = run(flops_target=target, method=method)
    scores = scores_of(method)
    counts = [
        sum(COSTS[p] * mask.sum() for p, mask in highest(scores, kept).items())
        for kept in range(1, 85)
    ]
    kept = int(np.searchsorted(counts, 600, side="right"))
    assert_masks(masks, highest(scores, kept))
    assert info.macs == counts[kept - 1]
    assert 600 - 16 < info.macs <= 600
    # One update, of a mask that a sparsity gives as well.
    same = run(sparsity=1 - kept / 84, method=method)
    for path in PATHS:
        one, other = (leaves_by_path(p)[path] for p in (params, same[0]))
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_layers_that_are_not_prunable_count() -> None:
    info = run(flops_target=1160e-6, method="globalmagni", prunable="fc/kernel")[2]
    assert info.macs == 72 * 16 + 8
    assert info.nonzero == 8


def test_masks_are_nested_over_targets_and_recomputations() -> None:
    params, masks = PARAMS, None
    for target in (900e-6, 500e-6):
        params, new, info = prune(
            loss_fn,
            params,
            (IMAGES, LABELS),
            flops_target=target,
            masks=masks,
            method="diagfisher",
            recompute=1,
            flops_power=0.3,
        )
        assert target * 1e6 - 16 < info.macs <= target * 1e6
        if masks is not None:
            assert not any((new[p] & ~masks[p]).any() for p in PATHS)
        masks = new


KINDS = {type(row): n for n, row in METHODS.items() if "global" in row.scopes}


@pytest.mark.filterwarnings("ignore:no weight is left")  # of so few
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (kind is not DiagonalFisher))
        for kind, name in KINDS.items()
    ],
)
def test_every_kind_of_method_that_ranks_globally_takes_a_target(method) -> None:
    info = run(flops_target=600e-6, method=method)[2]
    assert 600 - 16 < info.macs <= 600


def test_a_goal_in_macs_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_fn=None with flops_power"):
        run(loss=None, sparsity=0.5, method="globalmagni", flops_power=1.0)
    with pytest.raises(ValueError, match="samples is missing; expected at least one"):
        prune(loss_fn, PARAMS, sparsity=0.5, method="globalmagni", flops_power=1.0)
    with pytest.raises(ValueError, match="below the 1152 of layers that are not"):
        run(flops_target=1e-5, method="globalmagni", prunable="fc/kernel")
    _, masks, info = run(flops_target=600e-6, method="globalmagni")
    with pytest.raises(ValueError, match=f"above the {info.macs:g}"):
        run(flops_target=1.0, method="globalmagni", masks=masks)


def test_zeros_of_another_pruner_cost_nothing() -> None:
    params, masks, _ = run(sparsity=0.5, method="globalmagni", prunable="conv/kernel")
    left = 16 * int(masks["conv/kernel"].sum())
    info = prune(
        loss_fn,
        params,
        (IMAGES, LABELS),
        flops_target=(left + 5) * 1e-6,
        method="globalmagni",
        prunable="fc/kernel",
    )[2]
    assert info.macs == left + 5


# ------------------------------------------------------------------------------- groups

DENSE = {"a/kernel": np.ones((8, 3), bool), "b/kernel": np.ones((4, 6), bool)}


def some_groups(pattern: str, seed: int = 0):
    """Groups, random scores, and which weights are not pruned yet."""
    order = flat_order(DENSE)
    random = np.random.default_rng(seed)
    groups = patterns.groups_of(patterns.parse(pattern), order)
    active = random.random(order.size) < 0.7
    scores = np.where(active, random.random(order.size), 0.0).astype(np.float32)
    return groups, scores, active


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_of_each_group_the_cheapest_choice_is_pruned(pattern: str, seed: int) -> None:
    groups, scores, active = some_groups(pattern, seed)
    kept_of, size = (int(n) for n in pattern.split(":"))
    values = np.random.default_rng(seed).random((groups.number, len(groups.removals)))
    found = choose_of_each(values, scores, active, groups)
    kept, mixed = (np.asarray(array) for array in found)
    assert not np.any(kept & ~active)
    for number in range(groups.number):
        slots = {groups.slots[i]: i for i in np.flatnonzero(groups.of == number)}
        pruned = {s for s in range(size) if not active[slots[s]]}
        # Only choices with all that is pruned, or of nothing else, come into question.
        fits = [
            (value, choice)
            for value, choice in zip(values[number], groups.removals, strict=True)
            if pruned <= set(choice) or set(choice) <= pruned
        ]
        value, choice = min(fits, key=lambda fit: fit[0])
        expected = set(range(size)) - pruned - set(choice)
        assert {s for s, i in slots.items() if kept[i]} == expected
        assert len(expected) == min(kept_of, size - len(pruned))
        lost = [i for i in slots.values() if active[i] and not kept[i]]
        if lost:
            assert mixed[lost].sum() == pytest.approx(value)
    np.testing.assert_array_equal(mixed[kept], scores[kept])


def test_short_of_the_pattern_the_cheapest_groups_come_first() -> None:
    groups, scores, active = some_groups("2:4")
    values = sums_of_single(scores, groups)
    every, _ = choose_of_each(values, scores, active, groups)
    may_go = active & ~np.asarray(every)
    costs = np.bincount(groups.of, np.where(may_go, scores, 0), groups.number)
    number = np.bincount(groups.of, may_go, groups.number)
    ranks = np.argsort(costs / np.maximum(number, 1), kind="stable")
    for goal in range(int(np.sum(every)), int(active.sum()) + 1):
        kept, _ = choose_of_each(values, scores, active, groups, (goal,))
        left = active.copy()
        for rank in ranks:
            if left.sum() <= goal:
                break
            left &= ~(may_go & (groups.of == rank))
        np.testing.assert_array_equal(kept, left)
    kept, _ = choose_of_each(values, scores, active, groups, (14, 13))
    for tensor, most in enumerate((14, 13)):
        mine = (groups.layers == tensor)[groups.of]
        assert most - 2 < np.sum(np.asarray(kept) & mine) <= most


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_by_magnitude_the_largest_of_each_group_stay(pattern: str) -> None:
    kept_of, size = (int(n) for n in pattern.split(":"))
    weights = RANDOM.standard_normal((3, 8, 5)).astype(np.float32)
    params, masks, info = prune(
        None,
        {"kernel": weights},
        method="globalmagni",
        pattern=pattern,
        axes={"kernel": "kio"},
    )
    by_group = np.abs(weights).reshape(3, 8 // size, size, 5)
    least = np.sort(by_group, axis=2)[:, :, -kept_of][:, :, None]
    np.testing.assert_array_equal(
        masks["kernel"], (by_group >= least).reshape(weights.shape)
    )
    assert info.sparsity == 1 - kept_of / size
    axes = {"kernel": WeightAxes(weights.shape, "kio")}
    assert patterns.check(params, pattern, axes=axes) == weights.size // size


@pytest.mark.filterwarnings("ignore:no weight is left")  # of so few
@pytest.mark.parametrize(
    "method",
    [
        *("globalmagni", "diagfisher"),
        pytest.param("kfac", marks=pytest.mark.slow),
        pytest.param("woodfisherblock", marks=pytest.mark.slow),
    ],
)
def test_groups_of_one_are_single_weights(method: str) -> None:
    alone, in_groups = (
        run(sparsity=0.6, method=method, pattern=pattern) for pattern in (None, "1x1")
    )
    assert_masks(in_groups[1], alone[1])
    if method != "globalmagni":  # there groups are worth their squares
        assert in_groups[2].saliency_sum == pytest.approx(alone[2].saliency_sum)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    "pattern", [pytest.param("2x2", marks=pytest.mark.slow), "filters"]
)
def test_whole_groups_stay_as_long_as_they_fit(pattern: str, scope: str) -> None:
    """Down from the largest mean square; here by diag(F), to have both scopes."""
    _, masks, _ = run(sparsity=0.5, method="diagfisher", pattern=pattern, scope=scope)
    order = flat_order(masks)
    groups = patterns.groups_of(patterns.parse(pattern), order)
    scores = flatten(order, diagonal_scores())
    sizes = np.bincount(groups.of)
    means = np.bincount(groups.of, scores) / sizes
    expected = np.zeros(groups.number, bool)
    tensors = [(0, 1)] if scope == "global" else [(0,), (1,)]
    for mine in tensors:
        members = np.isin(groups.layers, mine)
        room = sizes[members].sum() // 2
        for number in sorted(np.flatnonzero(members), key=lambda n: -means[n]):
            if sizes[number] > room:
                break
            room -= sizes[number]
            expected[number] = True
    np.testing.assert_array_equal(flatten(order, masks), expected[groups.of])
    patterns.check(masks, pattern)


def diagonal_scores() -> dict[str, np.ndarray]:
    """F_qq w_q² / 2, from gradients of single examples."""
    one = lambda p, x, y: loss_fn(p, (x[None], y[None]))  # noqa: E731
    rows = leaves_by_path(jax.vmap(jax.grad(one), (None, 0, 0))(PARAMS, IMAGES, LABELS))
    leaves = leaves_by_path(PARAMS)
    return {p: np.mean(rows[p] ** 2, axis=0) * leaves[p] ** 2 / 2 for p in PATHS}


def test_groups_of_costly_layers_go_first() -> None:
    _, masks, _ = run(
        sparsity=0.5, method="globalmagni", pattern="filters", flops_power=0.5
    )
    leaves = leaves_by_path(PARAMS)
    means = {}
    for path in PATHS:
        macs = COSTS[path] * leaves[path].size
        squares = np.float64(leaves[path]) ** 2 / macs**0.5
        for output in range(leaves[path].shape[-1]):
            means[path, output] = squares[..., output].mean()
    room, kept = 42, set()
    for path, output in sorted(means, key=means.get, reverse=True):
        room -= leaves[path][..., output].size
        if room < 0:
            break
        kept.add((path, output))
    for (path, output), _ in means.items():
        assert np.all(masks[path][..., output] == ((path, output) in kept))


def test_groups_compete_by_what_is_left_of_them() -> None:
    groups, _, active = some_groups("4x1")
    saliencies = np.arange(groups.number, dtype=float)[:, None] + 1
    found = np.asarray(shared(saliencies, active, groups))
    for number in range(groups.number):
        mine = active & (groups.of == number)
        np.testing.assert_allclose(found[mine].sum(), number + 1 if mine.any() else 0)
    assert not found[~active].any()


def test_masks_of_patterns_are_nested() -> None:
    params, masks = PARAMS, None
    for sparsity in (0.3, 0.5, 0.7):
        old = masks
        params, masks, info = prune(
            None,
            params,
            method="globalmagni",
            pattern="2x1",
            sparsity=sparsity,
            masks=masks,
        )
        assert info.sparsity >= sparsity
        patterns.check(masks, "2x1")
        assert old is None or not any((masks[p] & ~old[p]).any() for p in PATHS)
    # Of N:M on the way some groups obey, in the end all.
    masks = {"fc/kernel": np.ones((4, 3), bool)}
    for sparsity, expected in ((0.2, 0.33), (0.5, 0.5), (None, 0.5)):
        params, masks, info = prune(
            None,
            params,
            method="globalmagni",
            pattern="2:4",
            sparsity=sparsity,
            masks=masks,
        )
        assert info.sparsity == pytest.approx(expected, abs=0.01)
    patterns.check(masks, "2:4")


def test_a_tensor_that_a_pattern_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"'conv/kernel'.*2 inputs, no multiple of 4"):
        run(pattern="2:4", method="diagfisher")
