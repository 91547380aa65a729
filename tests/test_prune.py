"""A whole pruning step, against the same step written in float64 NumPy.

Most tests inject the gradients: the loss is the inner product of the parameters with
the example, so that the gradient at an example is the example itself.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax import METHODS, CurvatureError, init_masks, prune
from woodfisher_jax.equations.fisher import SOLVERS
from woodfisher_jax.options import fields_of
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
# kfac needs layers and naivehess curvature, which the inner product does not have.
INJECTED = [name for name in METHODS if name not in ("kfac", "naivehess")]
ROWS = [(name, scope) for name in INJECTED for scope in METHODS[name].scopes]
UPDATES = [name for name in INJECTED if METHODS[name].moves]
FULL = ("woodfisher", "woodtaylor")


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
    given = {"sparsity": 0.6}
    if "damping" in fields_of(type(METHODS[method])):
        given["damping"] = DAMPING
    options = given | options
    if method in UPDATES and method not in FULL:
        options.setdefault("block_size", 7)
    return prune(loss_fn, params_of() if params is None else params, samples, **options)


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
    slope = rows.mean(0) * (method in ("woodtaylor", "woodtaylorblock"))
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


def assert_step(found, expected, rtol=1e-4) -> None:
    new_params, new_masks, info = found
    mask, weights = expected
    leaves = leaves_by_path(new_params)
    np.testing.assert_array_equal(flat(new_masks), mask)
    got = flat({path: leaves[path] for path in SHAPES})
    np.testing.assert_allclose(got, weights, rtol=rtol, atol=rtol)
    assert (got[~mask] == 0).all()
    assert info.nonzero == mask.sum()
    assert info.prunable == mask.size
    assert info.sparsity == pytest.approx(1 - mask.mean())


# ------------------------------------------------------------------- one whole step


@pytest.mark.parametrize(("method", "scope"), ROWS)
def test_a_step_from_dense(method, scope) -> None:
    found = run(method=method, scope=scope)
    assert_step(found, expected_step(method, scope, 0.6))


@pytest.mark.parametrize(("method", "scope"), ROWS)
def test_a_step_from_a_pruned_network(method, scope) -> None:
    masks = {path: jnp.asarray(mask) for path, mask in OLD_MASKS.items()}
    found = run(method=method, scope=scope, masks=masks, batch_size=3)
    expected = expected_step(method, scope, 0.6, masks=OLD_MASKS, batch_size=3)
    assert_step(found, expected)
    assert not (flat(found[1]) & ~flat(OLD_MASKS)).any()


@pytest.mark.parametrize("block_size", [None, 1, 12, 10**6])
def test_block_sizes_that_divide_or_not(block_size) -> None:
    found = run(block_size=block_size)
    expected = expected_step("woodfisherblock", "global", 0.6, block_size=block_size)
    assert_step(found, expected)


@pytest.mark.parametrize("scale_update", [0.0, 0.5])
@pytest.mark.parametrize("method", UPDATES)
def test_the_update_is_scaled(method, scale_update) -> None:
    found = run(method=method, scale_update=scale_update)
    expected = expected_step(method, "global", 0.6, scale_update=scale_update)
    assert_step(found, expected)
    if scale_update == 0:
        kept = flat(found[1])
        got = flat({p: leaves_by_path(found[0])[p] for p in SHAPES})
        np.testing.assert_array_equal(got[kept], flat(WEIGHTS)[kept])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("method", ["woodfisher", "woodfisherblock"])
def test_every_solver_does_the_same(method, solver) -> None:
    assert_step(run(method=method, solver=solver), expected_step(method, "global", 0.6))


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
    gone = np.flatnonzero(mask.reshape(-1) & ~new_mask)
    moved = w - sum(w[q] * inverse[q] / inverse[q, q] for q in gone)
    np.testing.assert_array_equal(np.ravel(found[1]["w"]), new_mask)
    np.testing.assert_allclose(
        np.ravel(found[0]["w"]), moved * new_mask, rtol=1e-4, atol=1e-4
    )


# -------------------------------------------------------------- known special cases


@pytest.mark.parametrize("method", ["woodfisher", "woodfisherblock"])
def test_without_gradients_it_is_magnitude_pruning(method) -> None:
    zeros = {path: 0 * given for path, given in SAMPLES.items()}
    found = run(samples=zeros, method=method)
    assert_step(found, expected_step("globalmagni", "global", 0.6), rtol=0)


def test_one_block_over_a_single_tensor_is_the_full_matrix() -> None:
    only = {"prunable": "fc2"}
    block = run(method="woodfisherblock", block_size=None, **only)
    full = run(method="woodfisher", **only)
    np.testing.assert_array_equal(block[0]["fc2"]["w"], full[0]["fc2"]["w"])


def test_the_full_matrix_with_a_block_size_is_woodfisherblock() -> None:
    full, block = run(method="woodfisher", block_size=7), run(block_size=7)
    np.testing.assert_array_equal(full[0]["out"], block[0]["out"])
    np.testing.assert_array_equal(flat(full[1]), flat(block[1]))


def test_blocks_of_one_weight_move_no_other_weight() -> None:
    new_params, new_masks, _ = run(block_size=1)
    kept = flat(new_masks)
    got = flat({p: leaves_by_path(new_params)[p] for p in SHAPES})
    np.testing.assert_array_equal(got[kept], flat(WEIGHTS)[kept])


def test_pruning_again_to_the_same_sparsity_changes_nothing() -> None:
    once_params, once_masks, _ = run()
    twice_params, twice_masks, _ = run(once_params, masks=once_masks)
    for a, b in zip(
        jax.tree.leaves((once_params, once_masks)),
        jax.tree.leaves((twice_params, twice_masks)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("method", "scope"), ROWS)
def test_masks_are_nested_over_a_gradual_schedule(method, scope) -> None:
    params, masks = params_of(), None
    for sparsity in (0.3, 0.6, 0.9):
        new_params, new_masks, info = run(
            params, masks=masks, sparsity=sparsity, method=method, scope=scope
        )
        if masks is not None:
            assert not (flat(new_masks) & ~flat(masks)).any()
        total = sum(
            int(np.floor(round(size * (1 - sparsity), 9)))
            for size in (
                [50]
                if scope == "global"
                else [int(np.prod(s)) for s in SHAPES.values()]
            )
        )
        assert info.nonzero == total
        params, masks = new_params, new_masks


# ------------------------------------------------------------------------ invariants


@pytest.mark.parametrize(("method", "scope"), ROWS)
def test_only_masked_parameters_change_and_arguments_never_do(method, scope) -> None:
    params = params_of()
    masks = {"fc2/w": jnp.asarray(OLD_MASKS["fc2/w"])}
    before = jax.tree.map(np.array, (params, masks))
    new_params, new_masks, _ = run(params, masks=masks, method=method, scope=scope)
    assert set(masks) == set(new_masks) == {"fc2/w"}
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves((params, masks)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for path, leaf in leaves_by_path(new_params).items():
        if path != "fc2/w":
            np.testing.assert_array_equal(leaf, leaves_by_path(params)[path])
    assert (np.asarray(new_params["fc2"]["w"]) != WEIGHTS["fc2/w"]).any()


@pytest.mark.parametrize("method", [*UPDATES, "diagfisher"])
def test_the_order_of_samples_does_not_matter(method) -> None:
    order = np.random.default_rng(5).permutation(EXAMPLES)
    shuffled = {path: given[order] for path, given in SAMPLES.items()}
    found = run(samples=shuffled, method=method)
    assert_step(found, expected_step(method, "global", 0.6))


@pytest.mark.parametrize("microbatch_size", [1, 4, 64])
def test_the_microbatch_size_does_not_matter(microbatch_size) -> None:
    found = run(batch_size=3, microbatch_size=microbatch_size)
    expected = expected_step("woodfisherblock", "global", 0.6, batch_size=3)
    assert_step(found, expected)
    assert found[2].num_samples == 10


def pieces():
    cuts = [0, 1, 8, 8, 19, EXAMPLES]
    return [
        {k: v[a:b] for k, v in SAMPLES.items()} for a, b in itertools.pairwise(cuts)
    ]


@pytest.mark.parametrize("num_samples", [None, 11])
@pytest.mark.parametrize(
    "samples",
    [
        lambda: SAMPLES,
        lambda: jax.tree.map(jnp.asarray, SAMPLES),
        pieces,
        lambda: iter(pieces()),
        lambda: (piece for piece in pieces()),
        lambda: map(dict, pieces()),
    ],
)
def test_samples_come_in_any_form(samples, num_samples) -> None:
    found = run(samples=samples(), num_samples=num_samples)
    expected = expected_step("woodfisherblock", "global", 0.6, num_samples=num_samples)
    assert_step(found, expected)
    assert found[2].num_samples == (num_samples or EXAMPLES)


def test_samples_may_be_a_tuple_or_an_array() -> None:
    arrays = tuple(SAMPLES.values())
    as_tuple = lambda params, batch: inner_product(  # noqa: E731
        params, dict(zip(SAMPLES, batch, strict=True))
    )
    found = run(samples=arrays, loss_fn=as_tuple)
    assert_step(found, expected_step("woodfisherblock", "global", 0.6))
    only = lambda params, batch: inner_product(params, {"out": batch})  # noqa: E731
    _, masks, info = run(samples=SAMPLES["out"], loss_fn=only, prunable="out")
    assert info.num_samples == EXAMPLES
    assert int(masks["out"].sum()) == 4


def test_an_endless_stream_will_do_where_the_number_is_given() -> None:
    found = run(samples=itertools.cycle(pieces()), num_samples=EXAMPLES)
    assert_step(found, expected_step("woodfisherblock", "global", 0.6))


def test_params_may_be_any_pytree() -> None:
    params = (
        {"kernel": jnp.asarray(WEIGHTS["fc1/kernel"])},
        [jnp.asarray(WEIGHTS["fc2/w"])],
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


def test_numpy_params_and_masks_will_do() -> None:
    params = jax.tree.map(np.asarray, params_of())
    found = run(params, masks=dict(OLD_MASKS))
    expected = expected_step("woodfisherblock", "global", 0.6, masks=OLD_MASKS)
    assert_step(found, expected)


@pytest.mark.parametrize("method", INJECTED)
def test_half_precision_parameters_keep_their_dtype(method) -> None:
    rounded = {p: np.asarray(jnp.asarray(w, jnp.bfloat16)) for p, w in WEIGHTS.items()}
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of())

    def loss_fn(params, batch):
        leaves = leaves_by_path(params)
        wide = {path: leaves[path].astype(jnp.float32) for path in batch}
        return inner_product(replace_leaves(params, wide), batch)

    new_params, new_masks, _ = run(params, loss_fn=loss_fn, method=method)
    assert {leaf.dtype for leaf in jax.tree.leaves(new_params)} == {
        jnp.dtype(jnp.bfloat16)
    }
    as_float = {p: np.asarray(w, np.float32) for p, w in rounded.items()}
    scope = METHODS[method].scopes[0]
    found = {p: np.asarray(leaves_by_path(new_params)[p], np.float64) for p in SHAPES}
    kept = flat(new_masks)
    assert kept.sum() == (19 if scope == "layer" else 20)
    assert (flat(found)[~kept] == 0).all()
    if method in ("globalmagni", "magni"):
        mask = np.abs(flat(as_float)) * kept
        np.testing.assert_array_equal(np.abs(flat(found)), mask)
    else:
        # The gradients are rounded to bfloat16 as well.
        rounded_samples = expected_in_bfloat16(method, scope, as_float)
        mask, weights = rounded_samples
        np.testing.assert_array_equal(kept, mask)
        np.testing.assert_allclose(flat(found), weights, rtol=0.01, atol=0.01)


def expected_in_bfloat16(method, scope, weights):
    exact = dict(SAMPLES)
    try:
        for path, given in exact.items():
            SAMPLES[path] = np.asarray(jnp.asarray(given, jnp.bfloat16), np.float32)
        return expected_step(method, scope, 0.6, weights=weights)
    finally:
        SAMPLES.update(exact)


def test_it_runs_where_float64_is_enabled() -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params_of())
        found = run(jax.tree.map(jnp.asarray, params))
        assert found[0]["out"].dtype == jnp.float64
    assert_step(found, expected_step("woodfisherblock", "global", 0.6))


def test_info_says_what_was_done() -> None:
    _, masks, info = run()
    assert info.sparsity == pytest.approx(0.6)
    assert (info.nonzero, info.prunable, info.num_samples) == (20, 50, EXAMPLES)
    assert list(info.sparsity_by_path) == list(SHAPES)
    for path, share in info.sparsity_by_path.items():
        assert share == pytest.approx(1 - float(masks[path].mean()))
    for seconds in info[5:8]:
        assert 0 <= seconds < 60
    assert run(method="magni")[2].num_samples == 0


def test_progress_counts_every_phase_to_its_end() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    run(
        progress=lambda label, done, total: seen.setdefault(label, []).append(
            (done, total)
        ),
        microbatch_size=8,
        block_size=7,
        store="host",
    )
    assert list(seen) == ["gradients", "curvature blocks", "update blocks"]
    totals = {"gradients": EXAMPLES, "curvature blocks": 8, "update blocks": 8}
    for label, calls in seen.items():
        done = [count for count, _ in calls]
        assert done == sorted(set(done))
        assert calls[-1] == (totals[label], totals[label])
        assert {total for _, total in calls} == {totals[label]}


def test_magnitude_needs_neither_samples_nor_loss() -> None:
    found = prune(None, params_of(), sparsity=0.6, method="globalmagni")
    assert_step(found, expected_step("globalmagni", "global", 0.6))


# ----------------------------------------------------------------------------- errors


def refused(error: type[Exception], *parts: str, **options) -> None:
    """Asserts that the call fails and that its message holds every part."""
    with pytest.raises(error) as caught:
        run(**options)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in: {caught.value}"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, 1.5, -0.1, NAN])
def test_sparsity_out_of_range(value) -> None:
    refused(ValueError, f"sparsity={value}", "from 0 and below 1", sparsity=value)


@pytest.mark.parametrize("value", [0, -1e-5, NAN, INF])
def test_damping_out_of_range(value) -> None:
    refused(ValueError, f"damping={value}", "from 1e-30 to 1e+30", damping=value)


@pytest.mark.parametrize("value", [1e-46, 1e39])
def test_damping_beyond_float32_is_refused_and_not_taken_for_zero(value) -> None:
    refused(ValueError, f"damping={value}", damping=value)


@pytest.mark.parametrize("value", [0, -3, 2.5, 4.0, NAN, INF, "4"])
@pytest.mark.parametrize(
    "name", ["num_samples", "batch_size", "microbatch_size", "block_size"]
)
def test_numbers_that_must_be_whole_and_positive(name, value) -> None:
    refused(ValueError, f"{name}={value!r}", "whole number", **{name: value})


@pytest.mark.parametrize("value", [NAN, INF])
def test_scale_update_must_be_finite(value) -> None:
    refused(ValueError, "scale_update", scale_update=value)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_below_what_masks_have(scope) -> None:
    masks = {path: np.zeros(shape, bool) for path, shape in SHAPES.items()}
    for mask in masks.values():
        mask.flat[:2] = True
    parts = ["sparsity=0.5", "masks"] + ["0.88"] * (scope == "global")
    refused(ValueError, *parts, masks=masks, sparsity=0.5, scope=scope)


@pytest.mark.parametrize("samples", [lambda: SAMPLES, pieces, lambda: iter(pieces())])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(31, 1), (8, 4), (1, 31)])
def test_more_samples_wanted_than_there_are(samples, num_samples, batch_size) -> None:
    refused(
        ValueError,
        "samples hold 30 examples",
        f"num_samples={num_samples}",
        f"batch_size={batch_size}",
        f"need {num_samples * batch_size}",
        samples=samples(),
        num_samples=num_samples,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("samples", [lambda: SAMPLES, lambda: iter(pieces())])
def test_a_batch_beyond_all_samples(samples) -> None:
    refused(
        ValueError,
        "samples hold 30 examples",
        "batch_size=31",
        samples=samples(),
        batch_size=31,
    )


@pytest.mark.parametrize("samples", [[], iter(())])
def test_no_samples_at_all(samples) -> None:
    refused(ValueError, "samples hold 0 examples", samples=samples)


@pytest.mark.parametrize("method", ["woodfisher", "woodfisherblock", "diagfisher"])
def test_missing_samples(method) -> None:
    refused(ValueError, "samples is missing", samples=None, method=method)


def test_samples_that_are_none() -> None:
    refused(TypeError, "samples", "int", samples=3)
    refused(TypeError, "samples", "int", samples=3, num_samples=2)


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: [b], lambda b: iter([b])])
def test_arrays_of_a_batch_that_disagree_in_length(wrap) -> None:
    uneven = SAMPLES | {"out": SAMPLES["out"][:7]}
    refused(ValueError, "samples", "agree", "(7, 2, 2, 3)", samples=wrap(uneven))


def test_an_unknown_method() -> None:
    refused(
        ValueError,
        "method='woodfisherblok'",
        "Did you mean 'woodfisherblock'",
        *METHODS,
        method="woodfisherblok",
    )


@pytest.mark.parametrize(
    ("method", "scope"),
    [("magni", "global"), ("globalmagni", "layer"), ("woodfisher", "tensor")],
)
def test_a_scope_the_method_does_not_have(method, scope) -> None:
    refused(
        ValueError,
        f"scope={scope!r}",
        f"method={method!r}",
        str(list(METHODS[method].scopes)),
        method=method,
        scope=scope,
    )


def test_an_unknown_solver() -> None:
    refused(ValueError, "solver='lu'", "'auto'", *SOLVERS, solver="lu")


@pytest.mark.parametrize("prunable", ["^conv", lambda path, leaf: False])
def test_a_predicate_or_expression_that_selects_nothing(prunable) -> None:
    refused(ValueError, "prunable", "selects none", "fc1/kernel", prunable=prunable)


def test_an_invalid_expression() -> None:
    refused(ValueError, "prunable='fc['", "regular expression", prunable="fc[")


@pytest.mark.parametrize(
    ("masks", "error", "parts"),
    [
        ({}, ValueError, ["masks is empty"]),
        ({"fc9": jnp.ones((3, 6), bool)}, ValueError, ["masks", "'fc9'", "fc2/w"]),
        ({"fc2/w": jnp.ones((6, 3), bool)}, ValueError, ["fc2/w", "(6, 3)", "(3, 6)"]),
        ({"fc2/w": jnp.ones((3, 6))}, TypeError, ["fc2/w", "float32", "bool"]),
        ({"fc2": {"w": jnp.ones((3, 6), bool)}}, ValueError, ["masks", "fc2"]),
    ],
)
def test_masks_that_do_not_fit(masks, error, parts) -> None:
    refused(error, *parts, masks=masks)


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


@pytest.mark.parametrize("method", ["woodfisherblock", "diagfisher"])
def test_a_loss_not_finite_at_one_example(method) -> None:
    samples = jax.tree.map(np.array, SAMPLES)
    samples["out"][17] = NAN
    refused(ValueError, "loss_fn", "nan", "example 17 ", samples=samples, method=method)


def test_a_gradient_not_finite_though_the_loss_is() -> None:
    def loss_fn(params, batch):
        return inner_product(params, batch) + jnp.sqrt(jnp.sum(0 * params["fc2"]["w"]))

    refused(ValueError, "gradient of 'fc2/w'", "not finite", loss_fn=loss_fn)


@pytest.mark.parametrize("leaf", [np.arange(3), 1.5, "name"])
def test_params_that_are_not_floating_point_arrays(leaf) -> None:
    refused(
        TypeError,
        "params['step']",
        str(getattr(leaf, "dtype", type(leaf).__name__)),
        "floating-point",
        params=params_of() | {"step": leaf},
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_not_finite_are_named(method, value) -> None:
    weights = WEIGHTS | {"fc2/w": np.where(OLD_MASKS["fc2/w"], WEIGHTS["fc2/w"], value)}
    refused(ValueError, "'fc2/w'", "finite", params=params_of(weights), method=method)


@pytest.mark.parametrize("method", INJECTED)
def test_weights_that_are_not_finite_but_pruned_already_are_harmless(method) -> None:
    weights = WEIGHTS | {"fc2/w": np.where(OLD_MASKS["fc2/w"], WEIGHTS["fc2/w"], NAN)}
    found = run(params_of(weights), masks=OLD_MASKS, method=method)
    assert np.isfinite(flat({p: leaves_by_path(found[0])[p] for p in SHAPES})).all()


def test_a_fisher_that_cannot_be_inverted_says_so_and_names_the_tensor() -> None:
    refused(CurvatureError, "raise damping", "fc1/kernel", damping=1e-30, num_samples=4)


def test_a_parameter_without_entries_is_passed_over() -> None:
    params = params_of() | {"empty": jnp.zeros((0, 3))}
    masks = init_masks(params, lambda path, leaf: path in SHAPES)
    expected = run(params, masks=masks)
    for method, scope in ROWS:
        found = run(params, method=method, scope=scope)
        assert found[2].prunable == 50
    found = run(params)
    np.testing.assert_array_equal(found[0]["out"], expected[0]["out"])
