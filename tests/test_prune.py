"""A whole pruning step, against the same step written in float64 NumPy.

Most tests inject the gradients: the loss is the inner product of the parameters with
the example, so that the gradient at an example is the example itself.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax import (
    METHODS,
    CurvatureError,
    DiagonalFisher,
    Magnitude,
    PruneWarning,
    WoodFisher,
    prune,
)
from woodfisher_jax.equations.fisher import SOLVERS
from woodfisher_jax.methods import applicable
from woodfisher_jax.trees.blocks import full_matrix
from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves

SHAPES = {"fc1/kernel": (5, 4), "fc2/w": (3, 6), "out": (2, 2, 3)}
EXAMPLES = 30
DAMPING = 0.1
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    path: RANDOM.standard_normal(shape).astype(np.float32)
    for path, shape in SHAPES.items()
}
SAMPLES = {
    path: RANDOM.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    for path, shape in SHAPES.items()
}
OLD_MASKS = {path: RANDOM.random(shape) < 0.8 for path, shape in SHAPES.items()}
BIAS = RANDOM.standard_normal(6).astype(np.float32)
# Other kinds need layers or a Hessian, which the inner product does not have.
INJECTED = {
    name: row
    for name, row in METHODS.items()
    if isinstance(row, (WoodFisher, DiagonalFisher, Magnitude))
}
ROWS = [(name, scope) for name, row in INJECTED.items() for scope in row.scopes]
UPDATES = [name for name, row in INJECTED.items() if row.moves]
VARIANTS = ("woodtaylor", "woodfisherblock_flops")
FULL = [name for name in UPDATES if INJECTED[name].layout is full_matrix]
KINDS = [*{(type(row), row.first_order): n for n, row in INJECTED.items()}.values()]


class Head(NamedTuple):
    out: Any
    scale: Any


def params_of(weights=WEIGHTS) -> dict:
    return {
        "fc1": {
            "kernel": jnp.asarray(weights["fc1/kernel"]),
            "bias": jnp.asarray(BIAS),
        },
        "fc2": {"w": jnp.asarray(weights["fc2/w"])},
        "out": jnp.asarray(weights["out"]),
    }


def inner_product(params, batch):
    leaves = leaves_by_path(params)
    terms = (
        jnp.sum(leaves[path] * given, axis=tuple(range(1, given.ndim)))
        for path, given in batch.items()
    )
    return jnp.mean(sum(terms))


def run(params=None, samples=SAMPLES, loss_fn=inner_product, **options):
    method = options.get("method", "woodfisherblock")
    given = applicable(method, {"damping": DAMPING, "block_size": 7})
    if method in FULL:
        del given["block_size"]
    options = {"sparsity": 0.6, "method": method} | given | options
    return prune(loss_fn, params_of() if params is None else params, samples, **options)


@functools.cache
def done(method="woodfisherblock", scope=None, pruned=False):
    """A step that several tests look at, from dense or from pruned weights."""
    options = applicable(method, {"batch_size": 3}) if pruned else {}
    options |= {"masks": dict(OLD_MASKS)} if pruned else {}
    return run(method=method, scope=scope, **options)


# --------------------------------------------------------------------- the oracle


def flat(tensors: dict, lead: int = 0) -> np.ndarray:
    """Oracle: tensors one after another in PyTorch layout, row-major, float64."""
    parts = []
    for path, tensor in tensors.items():
        array = np.asarray(tensor)
        if path.split("/")[-1] == "kernel":  # (in, out) -> (out, in)
            array = np.moveaxis(array, -1, lead)
        parts.append(array.reshape(*array.shape[:lead], -1))
    return np.concatenate(parts, -1)


def exactly(scores: np.ndarray, active: np.ndarray, sparsity: float) -> np.ndarray:
    """Oracle: the mask that keeps the best floor(n (1 - s)) of the active."""
    kept = int(np.floor(round(len(scores) * (1 - sparsity), 9)))
    ranked = sorted(np.flatnonzero(active), key=lambda i: (-scores[i], i))
    if kept < len(ranked):
        first, last = scores[ranked[kept]], scores[ranked[kept - 1]]
        assert last - first > 1e-4 * last, "too close to call in float32: change seed"
    mask = np.zeros(len(scores), bool)
    mask[ranked[:kept]] = True
    return mask


def expected_step(
    method: str,
    scope: str,
    sparsity: float,
    *,
    weights=WEIGHTS,
    masks=None,
    batch_size: int = 1,
    block_size: int | None = 7,
    scale_update: float = 1.0,
    num_samples: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: flat new mask and flat new weights of one step, in float64."""
    w = flat(weights).astype(np.float64)
    active = np.ones(w.size, bool) if masks is None else flat(masks)
    w = w * active
    groups = num_samples or EXAMPLES // batch_size
    rows = flat(SAMPLES, lead=1).astype(np.float64)[: groups * batch_size]
    rows = rows.reshape(groups, batch_size, -1).mean(1) * active
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    bounds = list(itertools.pairwise(np.cumsum([0, *sizes])))

    fisher = np.zeros((w.size, w.size))
    members = [np.arange(start, stop) for start, stop in bounds]
    width = block_size or w.size
    if method in FULL:
        members, width = [np.arange(w.size)], w.size
    elif method == "woodfisherblockgroup":
        members = [np.arange(w.size)]
    elif method == "woodfisherblockdynamic":
        members = [found[active[found]] for found in members]
        width = min(width * w.size // active.sum(), active.sum())
    for found in members:
        for start in range(0, len(found), width):
            block = found[start : start + width]
            part = rows[:, block]
            fisher[np.ix_(block, block)] = part.T @ part / groups
    inverse = np.linalg.inv(fisher + DAMPING * np.eye(w.size))
    slope = rows.mean(0) * METHODS[method].first_order
    step = inverse @ slope

    if method in UPDATES:
        scores = (w - step) ** 2 / (2 * np.diag(inverse))
    elif method == "diagfisher":
        scores = 0.5 * (rows**2).mean(0) * w**2
    else:
        scores = np.abs(w)
    if scope == "global":
        mask = exactly(scores, active, sparsity)
    else:
        mask = np.concatenate(
            [exactly(scores[a:b], active[a:b], sparsity) for a, b in bounds]
        )
    if method in UPDATES:
        at = w - step
        w = w - scale_update * step
        for q in np.flatnonzero(active & ~mask):  # one OBS update after another
            w = w - scale_update * (at[q] * inverse[q] / inverse[q, q])
    return mask, w * mask


def weights_of(params) -> np.ndarray:
    leaves = leaves_by_path(params)
    return flat({path: leaves[path] for path in SHAPES})


def assert_step(found, expected, rtol=1e-4) -> None:
    new_params, new_masks, info = found
    mask, weights = expected
    np.testing.assert_array_equal(flat(new_masks), mask)
    got = weights_of(new_params)
    np.testing.assert_allclose(got, weights, rtol=rtol, atol=rtol)
    assert (got[~mask] == 0).all()
    assert info.nonzero == mask.sum()
    assert info.prunable == mask.size
    assert info.sparsity == pytest.approx(1 - mask.mean())


# ------------------------------------------------------------------- one whole step


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        # From a pruned network every method is among the quick ones.
        pytest.param(
            *row, marks=[pytest.mark.slow] * (row != ("woodfisherblock", "global"))
        )
        for row in ROWS
    ],
)
def test_a_step_from_dense(method, scope) -> None:
    assert_step(done(method, scope), expected_step(method, scope, 0.6))


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        # Every layout, statistic and order is quick in its first scope.
        pytest.param(
            *row,
            marks=[pytest.mark.slow]
            * (row[1] != METHODS[row[0]].scopes[0] or row[0] in VARIANTS),
        )
        for row in ROWS
    ],
)
def test_a_step_from_a_pruned_network(method, scope) -> None:
    found = done(method, scope, pruned=True)
    batch_size = 3 if INJECTED[method].needs_samples else 1
    assert_step(
        found,
        expected_step(method, scope, 0.6, masks=OLD_MASKS, batch_size=batch_size),
    )
    assert not (flat(found[1]) & ~flat(OLD_MASKS)).any()
    for path, leaf in leaves_by_path(found[0]).items():
        if path not in OLD_MASKS:
            np.testing.assert_array_equal(leaf, leaves_by_path(params_of())[path])


@pytest.mark.parametrize(
    "block_size",
    [1, *(pytest.param(b, marks=pytest.mark.slow) for b in (None, 12, 10**6))],
)
def test_block_sizes_that_divide_or_not(block_size) -> None:
    found = run(block_size=block_size)
    expected = expected_step("woodfisherblock", "global", 0.6, block_size=block_size)
    assert_step(found, expected)
    if block_size == 1:  # blocks of one weight move no other weight
        kept = flat(found[1])
        np.testing.assert_array_equal(weights_of(found[0])[kept], flat(WEIGHTS)[kept])


@pytest.mark.parametrize(
    ("method", "scale_update"),
    [
        pytest.param("woodfisherblock", 0.0, marks=pytest.mark.slow),
        pytest.param("woodfisherblock", 0.5, marks=pytest.mark.slow),
        pytest.param("woodtaylorblock", 0.0, marks=pytest.mark.slow),
        ("woodtaylorblock", 0.5),
    ],
)
def test_the_update_is_scaled(method, scale_update) -> None:
    found = run(method=method, scale_update=scale_update)
    expected = expected_step(method, "global", 0.6, scale_update=scale_update)
    assert_step(found, expected)
    if scale_update == 0:
        kept = flat(found[1])
        np.testing.assert_array_equal(weights_of(found[0])[kept], flat(WEIGHTS)[kept])


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=[pytest.mark.slow] * (s != "dense")) for s in SOLVERS],
)
def test_every_solver_does_the_same(solver) -> None:
    found = run(method="woodfisher", solver=solver)
    assert_step(found, expected_step("woodfisher", "global", 0.6))


@pytest.mark.filterwarnings("ignore:no weight is left")  # of so few
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.96])
def test_every_sparsity_from_none_to_nearly_all(sparsity) -> None:
    found = run(sparsity=sparsity)
    assert_step(found, expected_step("woodfisherblock", "global", sparsity))


def test_the_gradients_are_those_at_the_masked_weights() -> None:
    # A quadratic loss, whose gradient depends on every weight it reads.
    x = RANDOM.standard_normal((20, 4)).astype(np.float32)
    y = RANDOM.standard_normal((20, 3)).astype(np.float32)

    def loss_fn(params, batch):
        return 0.5 * jnp.mean(jnp.sum((batch[0] @ params["w"] - batch[1]) ** 2, -1))

    weights = RANDOM.standard_normal((4, 3)).astype(np.float32)
    mask = np.ones((4, 3), bool)
    mask[1] = False
    step = lambda w: prune(  # noqa: E731
        loss_fn,
        {"w": jnp.asarray(w)},
        (x, y),
        sparsity=0.5,
        masks={"w": jnp.asarray(mask)},
        method="woodfisherblock",
        damping=DAMPING,
    )
    stale = np.where(mask, weights, 100.0).astype(np.float32)
    found, clean = step(stale), step(np.where(mask, weights, 0).astype(np.float32))
    np.testing.assert_array_equal(found[0]["w"], clean[0]["w"])
    # and against calculus
    w = np.where(mask, weights, 0).astype(np.float64)
    g = np.einsum("ni,no->nio", x, x @ w - y).reshape(20, -1) * mask.reshape(-1)
    inverse = np.linalg.inv(DAMPING * np.eye(12) + g.T @ g / 20)
    w = w.reshape(-1)
    new_mask = exactly(w**2 / np.diag(inverse), mask.reshape(-1), 0.5)
    newly = np.flatnonzero(mask.reshape(-1) & ~new_mask)
    moved = w - sum(w[q] * inverse[q] / inverse[q, q] for q in newly)
    np.testing.assert_array_equal(np.ravel(found[1]["w"]), new_mask)
    np.testing.assert_allclose(
        np.ravel(found[0]["w"]), moved * new_mask, rtol=1e-4, atol=1e-4
    )


# -------------------------------------------------------------- known special cases


def two_layers(params, batch):
    """Each tensor's gradient is zero where its own examples are."""
    a, b = (jnp.mean((batch[name] @ params[name] - 1) ** 2) for name in "ab")
    return a + b


def two_layers_pruned(a: float, b: float, **options):
    params = {"a": jnp.asarray(WEIGHTS["fc1/kernel"]), "b": jnp.ones((5, 3))}
    x = np.random.default_rng(6).standard_normal((6, 5)).astype(np.float32)
    options = {"sparsity": 0.2, "method": "woodfisherblock"} | options
    return prune(two_layers, params, {"a": a * x, "b": b * x}, **options)


SLOW = pytest.mark.slow
NO_GRADIENT = [
    {"method": "woodfisherblock"},
    pytest.param({"method": "woodfisher", "store": "recompute"}, marks=SLOW),
    pytest.param({"method": "diagfisher"}, marks=SLOW),
    pytest.param({"method": "kfac"}, marks=SLOW),
    pytest.param({"method": "naivehess"}, marks=SLOW),
]


@pytest.mark.parametrize("options", NO_GRADIENT)
def test_a_tensor_without_a_gradient_is_named(options) -> None:
    with pytest.warns(PruneWarning, match="no sample has a gradient for 'b'") as said:
        info = two_layers_pruned(1.0, 0.0, **options)[2]
    assert said[0].filename == __file__
    assert info.untouched == {"a": 0.0, "b": 1.0}
    assert "'b'" in info.warnings[0]


@pytest.mark.parametrize("options", NO_GRADIENT)
def test_no_gradient_at_all_is_refused(options) -> None:
    with pytest.raises(ValueError, match="no weight has a gradient"):
        two_layers_pruned(0.0, 0.0, **options)


def test_the_share_of_weights_that_no_sample_has_touched() -> None:
    samples = SAMPLES | {"out": SAMPLES["out"] * np.array([0, 1, 1])}
    info = run(samples=samples)[2]
    assert info.untouched == {
        "fc1/kernel": 0.0,
        "fc2/w": 0.0,
        "out": pytest.approx(1 / 3),
    }
    assert info.warnings == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "18 prunable weights of all tensors, 'a' and others.* at most 0.944,"),
        ({"prunable": "kernel"}, "6 prunable weights of 'kernel'; .* at most 0.83,"),
        ({"method": "magni"}, "12 prunable weights of 'a', the largest .* 0.916,"),
    ],
)
def test_a_sparsity_that_leaves_no_weight_at_all_is_refused(options, message) -> None:
    params = {"a": jnp.ones((4, 3)), "kernel": 1e-3 * jnp.ones((2, 3))}
    given = {"method": "globalmagni"} | options
    with pytest.raises(ValueError, match=rf"leaves none of the .*{message}"):
        prune(None, params, sparsity=0.9999, **given)
    with pytest.warns(PruneWarning, match="'kernel'; lower sparsity to 0.83, wh"):
        prune(None, params, sparsity=0.9, method="magni")


@pytest.mark.parametrize("method", ["magni", "globalmagni"])
def test_a_single_weight_cannot_lose_some(method: str) -> None:
    message = (
        r"sparsity=0\.5 leaves nothing, for 'a'.* a single .* expected sparsity=0, or"
    )
    with pytest.raises(ValueError, match=message):
        prune(None, {"a": jnp.ones((1, 1))}, sparsity=0.5, method=method)
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((1, 1))}
    with pytest.warns(PruneWarning, match="'b'; lower sparsity to 0, or leave them"):
        prune(None, params, sparsity=0.5, method="magni")


def test_layers_that_masks_leave_sparser_are_named_once() -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    params = dict(zip("abc", numbers, strict=True))
    some = jnp.arange(20).reshape(4, 5) < 5
    masks = {"a": some, "b": jnp.ones((4, 5), bool), "c": some}
    given = {"masks": masks, "method": "magni"}
    message = r"^masks leave fewer weights of 'a', 'c' than sparsity=0\.5 does"
    with pytest.warns(PruneWarning, match=message) as caught:
        *_, info = prune(None, params, sparsity=0.5, **given)
    assert [warning.filename for warning in caught] == [__file__]
    assert info.warnings == (str(caught[0].message),)
    assert info.sparsity_by_path == {"a": 0.75, "b": 0.5, "c": 0.75}
    # All reach the goal, or one threshold makes up for it.
    prune(None, params, sparsity=0.8, **given)
    given["method"] = "globalmagni"
    prune(None, params, sparsity=0.7, **given)


def test_a_tensor_of_which_nothing_is_left_is_named() -> None:
    params = {"a": jnp.ones((4, 3)), "kernel": 1e-3 * jnp.ones((2, 3))}
    message = "no weight is left of 'kernel'; lower sparsity"
    with pytest.warns(PruneWarning, match=message):
        _, masks, info = prune(None, params, sparsity=0.4, method="globalmagni")
    assert info.empty_outputs == {"kernel": 3}
    # What was empty before is said no more.
    again = prune(None, params, sparsity=0.5, method="globalmagni", masks=masks)[2]
    assert again.warnings == ()


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "layer"},
        pytest.param(
            {
                "pattern": "1x2",
                "scope": "layer",
                "axes": {"fc1/kernel": "io", "fc2/w": "oi", "out": "koi"},
            },
            marks=SLOW,
        ),
        pytest.param({"method": "woodtaylor"}, marks=SLOW),
    ],
)
def test_zeros_that_no_mask_names_may_come_back_and_are_counted(options) -> None:
    weights = WEIGHTS | {"out": np.where(OLD_MASKS["out"], WEIGHTS["out"], 0)}
    params, masks, info = run(params_of(weights), **options)
    came_back = (weights["out"] == 0) & (np.asarray(params["out"]) != 0)
    assert info.revived == came_back.sum()
    named = np.asarray(masks["out"]) & OLD_MASKS["out"]
    masks = {**masks, "out": jnp.asarray(named)}
    stays, _, info = run(params_of(weights), masks=masks, sparsity=0.75)
    assert info.revived == 0
    assert not np.asarray(stays["out"])[~named].any()


def test_blocks_over_the_same_weights_are_the_same_method() -> None:
    only = {"prunable": "fc2"}
    block = run(block_size=None, **only)
    full = run(method="woodfisher", **only)
    np.testing.assert_array_equal(block[0]["fc2"]["w"], full[0]["fc2"]["w"])
    full, block = run(method="woodfisher", block_size=7), done()
    np.testing.assert_array_equal(weights_of(full[0]), weights_of(block[0]))
    np.testing.assert_array_equal(flat(full[1]), flat(block[1]))


@pytest.mark.filterwarnings("ignore:no weight is left")  # of so few
@pytest.mark.parametrize("method", KINDS)
def test_masks_are_nested_and_the_same_sparsity_again_changes_nothing(method) -> None:
    once_params, once_masks, info = done(method)
    before = jax.tree.map(np.array, (once_params, once_masks))
    again, same, _ = run(once_params, masks=once_masks, method=method)
    np.testing.assert_array_equal(flat(same), flat(once_masks))
    if not INJECTED[method].first_order:  # whose Newton step goes on
        np.testing.assert_array_equal(weights_of(again), weights_of(once_params))
    _, fewer, later = run(once_params, masks=once_masks, method=method, sparsity=0.9)
    assert not (flat(fewer) & ~flat(once_masks)).any()
    assert later.nonzero < info.nonzero
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((once_params, once_masks)), strict=True
    ):
        np.testing.assert_array_equal(old, new)  # arguments never change


@pytest.mark.parametrize(
    "method",
    [
        "woodfisherblock",
        "diagfisher",
        *(
            pytest.param(method, marks=SLOW)
            for method in UPDATES
            if method != "woodfisherblock"
        ),
    ],
)
def test_neither_the_order_of_samples_nor_the_microbatch_matters(method) -> None:
    order = np.random.default_rng(5).permutation(EXAMPLES)
    shuffled = {path: given[order] for path, given in SAMPLES.items()}
    found = run(samples=shuffled, method=method, microbatch_size=7)
    assert_step(found, expected_step(method, "global", 0.6))


# ------------------------------------------------------------- what may be given, how


def pieces():
    cuts = [0, 1, 8, 8, 19, EXAMPLES]
    return [
        {k: v[a:b] for k, v in SAMPLES.items()} for a, b in itertools.pairwise(cuts)
    ]


FORMS = {
    "arrays": lambda: jax.tree.map(jnp.asarray, SAMPLES),
    "list": pieces,
    "generator": lambda: (piece for piece in pieces()),
}


@pytest.mark.parametrize("num_samples", [None, 11])
@pytest.mark.parametrize("form", FORMS)
def test_samples_come_in_any_form(form, num_samples) -> None:
    found = run(samples=FORMS[form](), num_samples=num_samples)
    expected = expected_step("woodfisherblock", "global", 0.6, num_samples=num_samples)
    assert_step(found, expected)
    assert found[2].num_samples == (num_samples or EXAMPLES)


def test_samples_may_be_a_tuple_an_array_or_endless() -> None:
    as_tuple = lambda params, batch: inner_product(  # noqa: E731
        params, dict(zip(SAMPLES, batch, strict=True))
    )
    expected = expected_step("woodfisherblock", "global", 0.6)
    assert_step(run(samples=tuple(SAMPLES.values()), loss_fn=as_tuple), expected)
    endless = itertools.cycle(pieces())
    assert_step(run(samples=endless, num_samples=EXAMPLES), expected)
    only = lambda params, batch: inner_product(params, {"out": batch})  # noqa: E731
    _, masks, info = run(samples=SAMPLES["out"], loss_fn=only, prunable="out")
    assert info.num_samples == EXAMPLES
    assert int(masks["out"].sum()) == 4


def test_params_may_be_any_pytree() -> None:
    params = (
        {"kernel": jnp.asarray(WEIGHTS["fc1/kernel"])},
        [np.asarray(WEIGHTS["fc2/w"])],
        Head(jnp.asarray(WEIGHTS["out"]), jnp.float32(1.5)),
    )
    renamed = {
        "0/kernel": SAMPLES["fc1/kernel"],
        "1/0": SAMPLES["fc2/w"],
        "2/out": SAMPLES["out"],
    }
    new_params, new_masks, info = run(params, renamed)
    assert jax.tree.structure(new_params) == jax.tree.structure(params)
    assert isinstance(new_params[2], Head)
    assert set(new_masks) == set(info.sparsity_by_path) == set(renamed)
    back = {
        "fc1": {"kernel": new_params[0]["kernel"]},
        "fc2": {"w": new_params[1][0]},
        "out": new_params[2].out,
    }
    named = dict(zip(SHAPES, new_masks.values(), strict=True))
    expected = expected_step("woodfisherblock", "global", 0.6)
    assert_step((back, named, info), expected)


@pytest.mark.parametrize(
    "method", [KINDS[0], *(pytest.param(k, marks=SLOW) for k in KINDS[1:])]
)
def test_half_precision_parameters_keep_their_dtype(method, monkeypatch) -> None:
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of())

    def loss_fn(params, batch):
        leaves = leaves_by_path(params)
        wide = {path: leaves[path].astype(jnp.float32) for path in batch}
        return inner_product(replace_leaves(params, wide), batch)

    new_params, new_masks, _ = run(params, loss_fn=loss_fn, method=method)
    assert {leaf.dtype for leaf in jax.tree.leaves(new_params)} == {
        jnp.dtype(jnp.bfloat16)
    }
    # The gradients are rounded to bfloat16 as well.
    half = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)  # noqa: E731
    for path, given in SAMPLES.items():
        monkeypatch.setitem(SAMPLES, path, half(given))
    rounded = {path: half(w) for path, w in WEIGHTS.items()}
    scope = METHODS[method].scopes[0]
    mask, weights = expected_step(method, scope, 0.6, weights=rounded)
    np.testing.assert_array_equal(flat(new_masks), mask)
    found = weights_of(jax.tree.map(lambda a: np.asarray(a, np.float64), new_params))
    np.testing.assert_allclose(found, weights, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("method", ["woodfisherblock", "diagfisher"])
def test_it_runs_where_float64_is_enabled(method) -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params_of())
        found = run(jax.tree.map(jnp.asarray, params), method=method)
        assert found[0]["out"].dtype == jnp.float64
    assert_step(found, expected_step(method, METHODS[method].scopes[0], 0.6))


def test_magnitude_needs_neither_samples_nor_loss() -> None:
    found = prune(None, params_of(), sparsity=0.6, method="globalmagni")
    assert_step(found, expected_step("globalmagni", "global", 0.6))


def test_a_parameter_without_entries_is_passed_over() -> None:
    params = params_of() | {"empty": jnp.zeros((0, 3))}
    for method in KINDS:
        found = run(params, method=method)
        assert found[2].prunable == 50
        assert found[0]["empty"].shape == (0, 3)


@pytest.mark.parametrize("method", KINDS)
def test_weights_that_are_not_finite_are_harmless_where_pruned(method) -> None:
    broken = np.where(OLD_MASKS["fc2/w"], WEIGHTS["fc2/w"], np.nan)
    params = params_of(WEIGHTS | {"fc2/w": broken})
    found = run(params, masks=OLD_MASKS, method=method)
    assert np.isfinite(weights_of(found[0])).all()
    refused(ValueError, "'fc2/w'", "finite", params=params, method=method)


# --------------------------------------------------------------------------- reports


def test_info_says_what_was_done() -> None:
    _, masks, info = done()
    assert info.sparsity == pytest.approx(0.6)
    assert (info.nonzero, info.prunable, info.num_samples) == (20, 50, EXAMPLES)
    assert list(info.sparsity_by_path) == list(SHAPES)
    for path, share in info.sparsity_by_path.items():
        assert share == pytest.approx(1 - float(masks[path].mean()))
    for seconds in info[5:8]:
        assert 0 <= seconds < 600
    assert done("magni")[2].num_samples == 0


def test_progress_counts_every_phase_to_its_end() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(label: str, done: int, total: int) -> None:
        seen.setdefault(label, []).append((done, total))

    run(progress=progress, microbatch_size=8)
    assert {label: calls[-1] for label, calls in seen.items()} == {
        "gradients": (EXAMPLES, EXAMPLES),
        "pruning step": (1, 1),
    }


# ----------------------------------------------------------------------------- errors


def refused(error: type[Exception], *parts: str, **options) -> None:
    """Asserts that the call fails and that its message holds every part."""
    with pytest.raises(error) as caught:
        run(**options)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in: {caught.value}"


NAN = float("nan")


def nan_at(example: int) -> dict:
    samples = jax.tree.map(np.array, SAMPLES)
    samples["out"][example] = NAN
    return samples


def few(path: str) -> np.ndarray:
    """A mask with two weights left."""
    mask = np.zeros(SHAPES[path], bool)
    mask.flat[:2] = True
    return mask


FEW = {path: few(path) for path in SHAPES}
ONE_EXAMPLE = {path: np.repeat(a[:1], EXAMPLES, 0) for path, a in SAMPLES.items()}


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        (ValueError, ["sparsity=1;", "from 0 and below 1"], {"sparsity": 1}),
        (ValueError, ["sparsity=0.5", "0.88"], {"masks": FEW, "sparsity": 0.5}),
        (
            ValueError,
            ["sparsity=0.5", "masks"],
            {"masks": FEW, "sparsity": 0.5, "scope": "layer"},
        ),
        (
            ValueError,
            ["hold 30 examples", "num_samples=8", "batch_size=4 need 32"],
            {"num_samples": 8, "batch_size": 4},
        ),
        (ValueError, ["hold 30 examples", "batch_size=31"], {"batch_size": 31}),
        (ValueError, ["samples hold 0 examples"], {"samples": iter(())}),
        (ValueError, ["samples is missing"], {"samples": None}),
        (TypeError, ["samples", "int"], {"samples": 3}),
        (
            ValueError,
            ["prunable='fc'", "together with masks"],
            {"prunable": "fc", "masks": OLD_MASKS},
        ),
        (
            TypeError,
            ["fc2/w", "float64", "bool"],
            {"masks": {"fc2/w": np.ones((3, 6))}},
        ),
        (ValueError, ["example 17 ", "nan"], {"samples": nan_at(17)}),
        (
            ValueError,
            ["example 17 ", "nan"],
            {"samples": nan_at(17), "method": "diagfisher"},
        ),
        (
            CurvatureError,
            ["raise damping", "fc1/kernel"],
            {"damping": 1e-30, "samples": ONE_EXAMPLE},
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(error, parts, options) -> None:
    refused(error, *parts, **options)


@pytest.mark.parametrize(
    ("loss_fn", "shown"),
    [
        (lambda params, batch: jnp.sum(params["out"]) * jnp.ones(3), "(3,)"),
        (lambda params, batch: (jnp.sum(params["out"]), {}), "shape=()"),
        (lambda params, batch: None, "None"),
        (lambda params, batch: jnp.int32(1), "int32"),
    ],
)
def test_a_loss_that_is_no_scalar(loss_fn, shown) -> None:
    refused(TypeError, "loss_fn", "scalar", shown, loss_fn=loss_fn)


def test_shapes_are_no_params() -> None:
    shapes = jax.eval_shape(params_of)
    refused(TypeError, "jax.ShapeDtypeStruct", "expected arrays", params=shapes)


@pytest.mark.parametrize("leaf", [np.arange(3), 1.5, "name"])
def test_params_that_are_not_floating_point_arrays(leaf) -> None:
    refused(
        TypeError,
        "params['step']",
        str(getattr(leaf, "dtype", type(leaf).__name__)),
        "floating-point",
        params=params_of() | {"step": leaf},
    )


@pytest.mark.filterwarnings("ignore::woodfisher_jax.PruneWarning")
def test_a_norm_that_cannot_be_zero_is_named() -> None:
    """Weight normalisation without an epsilon: 0 / 0 where an output is taken out."""

    def loss_fn(params, x):
        v, w = params["v"], params["w"]
        h = jnp.tanh(x @ (v / jnp.sqrt(jnp.sum(v * v, axis=0))))
        return jnp.mean(jnp.square(h @ w - 1.0))

    rng = np.random.default_rng(0)
    params = {
        "v": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32),
    }
    x = rng.standard_normal((6, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"^loss_fn is not finite after .*\['v'\]"):
        prune(
            loss_fn,
            params,
            x,
            method="diagfisher",
            pattern="filters",
            prunable="v",
            sparsity=0.5,
        )


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_saliencies_follow_the_scale_of_the_loss(scale: float) -> None:
    """Also where unit, scale and curvature multiplied would leave float32."""

    def loss_fn(scale, params, x):
        return scale * jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) - 0.5))

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)}
    x = rng.standard_normal((8, 5)).astype(np.float32)
    found = []
    for factor in (1.0, scale):
        loss = jax.tree_util.Partial(loss_fn, jnp.float32(factor))
        damping = 1e-2 * factor**2
        found.append(
            prune(loss, params, x, method="woodfisher", sparsity=0.5, damping=damping)
        )
    (_, masks, one), (_, same, other) = found
    np.testing.assert_array_equal(masks["w"], same["w"])
    np.testing.assert_allclose(other.saliency_sum, one.saliency_sum * scale**2, 1e-4)
