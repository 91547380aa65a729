"""F⁻¹ over all blocks is the same wherever the gradients wait, and whatever happens.

Gradients are injected: the loss is the inner product of the parameters with the
example, so that the gradient at an example is the example itself.
"""

import os
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from woodfisher_jax.settings import STORES, check_settings

import woodfisher_jax as wf
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.rows import disk
from woodfisher_jax.rows import memory_plan as resources
from woodfisher_jax.rows import tiles as panels
from woodfisher_jax.rows.memory_plan import Storage
from woodfisher_jax.trees.blocks import flat_order, full_matrix, within_tensors

SHAPES = {"a": (6, 7), "b/kernel": (3, 14), "c": (1, 1), "d": (40,)}
WEIGHT_COUNT = 125
EXAMPLES = 26
RANDOM = np.random.default_rng(5)
WEIGHTS = {
    path: RANDOM.standard_normal(shape).astype(np.float32)
    for path, shape in SHAPES.items()
}
SAMPLES = {
    path: RANDOM.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    for path, shape in SHAPES.items()
}
DAMPING = 1e-2


def inner_product(params, batch):
    terms = (
        jnp.sum(params[path] * given, axis=tuple(range(1, given.ndim)))
        for path, given in batch.items()
    )
    return jnp.mean(sum(terms))


def params_of() -> dict[str, jax.Array]:
    return {path: jnp.asarray(w) for path, w in WEIGHTS.items()}


# --------------------------------------------------------- the operator, against NumPy


class Case(NamedTuple):
    """How blocks and gradients are laid out."""

    block_size: int | None = 8
    num_samples: int = EXAMPLES
    panel_bytes: int = 2000
    full: bool = False


def gradient_chunks(order, num_samples: int, lengths=9):
    """The samples as gradients of the tensors that are asked for."""
    for start in range(0, num_samples, lengths):
        rows = slice(start, min(start + lengths, num_samples))
        yield {path: jnp.asarray(SAMPLES[path][rows]) for path in order.paths}


def operator(
    case: Case, store: str, *, keep: bool, columns: int = 30, **options
) -> InverseFisher:
    order = flat_order(WEIGHTS)
    layout = full_matrix(order) if case.full else within_tensors(order, case.block_size)
    part = panels.whole(order, layout, case.num_samples, panel_bytes=case.panel_bytes)
    parts = panels.split(part, columns) if store == "recompute" else (part,)
    settings, _ = check_settings(
        SAMPLES,
        sparsity=0.5,
        damping=DAMPING,
        num_samples=case.num_samples,
        **options,
    )
    forming = partial(gradient_chunks, num_samples=case.num_samples)
    return InverseFisher(forming, Storage(store, part, parts, keep), settings)


def expected_inverse(case: Case) -> np.ndarray:
    """Oracle: the dense inverse of the block-diagonal Fisher, in float64."""
    order = flat_order(WEIGHTS)
    rows = []
    for path, given in SAMPLES.items():
        if path.endswith("kernel"):
            given = np.swapaxes(given, 1, 2)
        rows.append(given[: case.num_samples].reshape(case.num_samples, -1))
    g = np.concatenate(rows, axis=1).astype(np.float64)
    fisher = g.T @ g / case.num_samples
    together = np.zeros_like(fisher)
    bounds = (0, order.size) if case.full else order.offsets
    for start, stop in pairwise(bounds):
        for i in range(start, stop, case.block_size or stop - start or 1):
            end = stop if case.full else min(stop, i + (case.block_size or stop))
            together[i:end, i:end] = 1
    return np.linalg.inv(fisher * together + DAMPING * np.eye(order.size))


CASES = {
    "several panels": Case(),
    "one panel": Case(panel_bytes=10**9),
    "a panel for every block": Case(panel_bytes=1),
    "whole tensors": Case(block_size=None),
    "one sample": Case(num_samples=1),
    "one weight a block": Case(block_size=1),
    "full matrix": Case(block_size=None, full=True),
}


@pytest.mark.parametrize(("store", "keep"), [("host", True), ("recompute", False)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_diagonal_and_product_are_those_of_the_dense_inverse(case, store, keep) -> None:
    inverse = expected_inverse(case)
    vector = np.random.default_rng(0).standard_normal(len(inverse)).astype(np.float32)
    with operator(case, store, keep=keep) as found:
        diagonal = found.diagonal()
        product = found.product(jnp.asarray(vector))
    assert diagonal.dtype == product.dtype == jnp.float32
    np.testing.assert_allclose(diagonal, np.diag(inverse), rtol=2e-4)
    expected = inverse @ vector
    np.testing.assert_allclose(product, expected, atol=2e-4 * abs(expected).max())


@pytest.mark.parametrize("store", STORES)
def test_every_store_gives_the_same_bits(store, tmp_path: Path) -> None:
    case, vector = Case(), jnp.arange(WEIGHT_COUNT, dtype=jnp.float32)
    found = []
    for place in ("device", store):
        with operator(case, place, keep=False, store_dir=tmp_path) as inverse:
            found.append((inverse.diagonal(), inverse.product(vector)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["host", "recompute"])
def test_products_without_a_diagonal_before_and_twice(store, tmp_path: Path) -> None:
    vector = jnp.arange(WEIGHT_COUNT, dtype=jnp.float32)
    with operator(Case(), store, keep=True, store_dir=tmp_path) as inverse:
        first = inverse.product(vector)
        inverse.diagonal()
        second = inverse.product(vector)
    scale = float(jnp.abs(first).max())
    np.testing.assert_allclose(first, second, atol=1e-5 * scale)


def test_gradients_are_formed_once_and_for_recomputation_in_every_part() -> None:
    for store, times in (("host", 1), ("recompute", 2)):
        inverse = operator(Case(), store, keep=False)
        asked = []
        forming = inverse._gradients

        def counted(order, asked=asked, forming=forming):
            asked.append(order.paths)
            return forming(order)

        inverse._gradients = counted
        with inverse:
            inverse.diagonal()
            inverse.product(jnp.zeros(WEIGHT_COUNT))
        parts = inverse._storage.parts
        assert asked == [part.order.paths for part in parts] * times
        if store == "recompute":
            assert len(parts) > 2
            assert any(len(paths) < len(SHAPES) for paths in asked)
        assert inverse.seconds_gradients > 0


def test_factors_are_kept_only_if_asked_for() -> None:
    for keep in (True, False):
        with operator(Case(), "device", keep=keep) as inverse:
            inverse.diagonal()
            kept = list(inverse._factors.values())
        assert kept
        assert all((factors is not None) == keep for factors in kept)
        assert not inverse._factors


# ------------------------------------------------------------------ whole pruning steps


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels in every group, as in a network that is large."""
    small = partial(panels.whole, panel_bytes=4 * EXAMPLES * 20)
    monkeypatch.setattr(resources, "whole", small)


def run(params=None, samples=SAMPLES, loss_fn=inner_product, **options):
    options = {"sparsity": 0.6, "damping": DAMPING, "block_size": 8} | options
    options.setdefault("prunable", lambda path, leaf: True)
    return wf.prune(
        loss_fn, params_of() if params is None else params, samples, **options
    )


def in_parts(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Recomputation takes so many columns at a time, whatever memory there is."""
    cut = panels.split
    monkeypatch.setattr(resources, "split", lambda part, _: cut(part, columns))


def assert_same(found, expected, **tolerance) -> None:
    for path in SHAPES:
        np.testing.assert_array_equal(found[1][path], expected[1][path])
        if tolerance:
            scale = abs(np.asarray(expected[0][path])).max()
            np.testing.assert_allclose(
                found[0][path], expected[0][path], atol=tolerance["share"] * scale
            )
        else:
            np.testing.assert_array_equal(found[0][path], expected[0][path])


@pytest.mark.parametrize(
    ("method", "block_size"), [("woodfisherblock", 8), ("woodfisher", None)]
)
def test_all_stores_prune_alike_to_the_bit(
    tmp_path: Path, monkeypatch, method, block_size
) -> None:
    in_parts(monkeypatch, 40)
    options = {"method": method, "block_size": block_size, "store_dir": tmp_path}
    expected = run(store="device", **options)
    assert expected[2].needs.store == "device"
    for store in STORES[1:]:
        found = run(store=store, **options)
        assert found[2].needs.store == store
        assert_same(found, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [0, 45, 10**6])
def test_several_passes_equal_stored_gradients(monkeypatch, columns) -> None:
    in_parts(monkeypatch, columns)
    found = run(store="recompute")
    passes = found[2].needs.passes
    assert (passes == 1) == (columns == 10**6)
    assert_same(found, run(store="host"))


def test_half_precision_is_close_and_the_same_in_every_store(
    tmp_path: Path, monkeypatch
) -> None:
    in_parts(monkeypatch, 40)
    exact = run(store="device")
    rounded = {
        path: np.asarray(jnp.asarray(given, jnp.bfloat16), np.float32)
        for path, given in SAMPLES.items()
    }
    expected = run(samples=rounded)
    for store in STORES:
        options = {"store": store, "store_dir": tmp_path, "store_dtype": "bfloat16"}
        found = run(**options)
        assert_same(found, expected)
        changed = sum(
            int((np.asarray(found[1][p]) != np.asarray(exact[1][p])).sum())
            for p in SHAPES
        )
        assert changed <= 4
        assert found[2].needs.store_bytes * 2 == exact[2].needs.store_bytes


def test_factors_that_are_kept_change_nothing(monkeypatch) -> None:
    kept = run()
    assert kept[2].needs.keep_factors
    candidates = resources._candidates

    def without(*args):
        for storage in candidates(*args):
            if not storage.keep_factors:
                yield storage

    monkeypatch.setattr(resources, "_candidates", without)
    found = run()
    assert not found[2].needs.keep_factors
    assert_same(found, kept, share=1e-6)


def test_a_generator_of_samples_can_be_gone_through_again(monkeypatch) -> None:
    in_parts(monkeypatch, 20)
    pieces = [
        {path: given[i : i + 5] for path, given in SAMPLES.items()}
        for i in range(0, EXAMPLES, 5)
    ]
    options = {"store": "recompute", "num_samples": 20, "microbatch_size": 7}
    found = run(samples=(piece for piece in pieces), **options)
    assert found[2].needs.passes > 2
    assert_same(found, run(**options))


def test_means_over_batches_in_several_passes(monkeypatch) -> None:
    in_parts(monkeypatch, 20)
    options = {"batch_size": 4, "microbatch_size": 3}
    assert_same(run(store="recompute", **options), run(store="disk", **options))


@pytest.mark.parametrize("store", ["device", "recompute"])
def test_a_tensor_that_is_all_pruned_already(monkeypatch, store) -> None:
    in_parts(monkeypatch, 20)
    masks = {path: jnp.ones(shape, bool) for path, shape in SHAPES.items()}
    masks["b/kernel"] = jnp.zeros(SHAPES["b/kernel"], bool)
    found = run(store=store, masks=masks, prunable=None)
    assert not np.asarray(found[0]["b/kernel"]).any()
    assert found[2].nonzero == 50
    only = run(
        store=store,
        masks=masks,
        prunable=None,
        samples=SAMPLES | {"b/kernel": 100 * SAMPLES["b/kernel"]},
    )
    assert_same(found, only)


@pytest.mark.parametrize("store", ["host", "recompute"])
def test_one_weight_and_one_sample(store) -> None:
    params, samples = {"w": jnp.ones((1, 1))}, {"w": np.ones((1, 1, 1), np.float32)}
    found = run(params, samples, store=store, sparsity=0.0)
    np.testing.assert_array_equal(found[0]["w"], [[1.0]])
    found = run(params, samples, store=store, sparsity=0.5)
    np.testing.assert_array_equal(found[0]["w"], [[0.0]])


@pytest.mark.parametrize("store", ["device", "recompute"])
def test_blocks_that_need_float64_are_repeated_in_the_update_too(store) -> None:
    samples = SAMPLES | {"d": 300 * SAMPLES["d"]}
    found = run(samples=samples, damping=1e-3, store=store, block_size=None)
    assert found[2].needs.keep_factors
    g = samples["d"].astype(np.float64)
    w = WEIGHTS["d"].astype(np.float64)
    inverse = np.linalg.inv(g.T @ g / EXAMPLES + 1e-3 * np.eye(40))
    kept = np.asarray(found[1]["d"])
    gone = ~kept
    assert gone.any()
    expected = (w - inverse @ (gone * w / np.diag(inverse))) * kept
    scale = abs(expected).max()
    np.testing.assert_allclose(found[0]["d"], expected, atol=1e-3 * scale)


# ------------------------------------------------------------------ what can go wrong


def leftover(parent: Path) -> list[Path]:
    return [path for path in parent.rglob("*") if path.is_file()]


@pytest.mark.parametrize("phase", ["read", "write"])
@pytest.mark.parametrize("calls", [0, 9])
def test_a_store_that_fails_leaves_params_and_disk_as_they_were(
    tmp_path: Path, monkeypatch, phase, calls
) -> None:
    name = {"read": "preadv", "write": "pwrite"}[phase]
    real, made = getattr(os, name), []

    def failing(*args):
        made.append(args)
        if len(made) > calls:
            raise OSError(5, "Input/output error")
        return real(*args)

    params, masks = params_of(), {p: jnp.ones(s, bool) for p, s in SHAPES.items()}
    monkeypatch.setattr(os, name, failing)
    options = {"masks": masks, "prunable": None, "store_dir": tmp_path}
    with pytest.raises(wf.StoreError, match="Input/output error"):
        run(params, store="disk", microbatch_size=4, **options)
    monkeypatch.undo()
    for path, weights in WEIGHTS.items():
        np.testing.assert_array_equal(params[path], weights)
        assert np.asarray(masks[path]).all()
    if phase == "read":
        assert not list(tmp_path.iterdir())
    # And once more without the failure.
    found = run(params, store="disk", **options)
    assert_same(found, run())


LABELS = ("gradients", "curvature blocks", "update blocks")


@pytest.mark.parametrize("store", ["disk", "recompute"])
@pytest.mark.parametrize("when", LABELS)
def test_an_interruption_leaves_no_files(
    tmp_path: Path, monkeypatch, store, when
) -> None:
    in_parts(monkeypatch, 40)

    def progress(label: str, done: int, total: int) -> None:
        if label == when and done > 0:
            raise KeyboardInterrupt

    params = params_of()
    with pytest.raises(KeyboardInterrupt):
        run(params, store=store, store_dir=tmp_path, progress=progress)
    assert not leftover_gradients(tmp_path)
    for path, weights in WEIGHTS.items():
        np.testing.assert_array_equal(params[path], weights)
    if when != "gradients":
        assert not list(tmp_path.iterdir())


def leftover_gradients(parent: Path) -> list[Path]:
    return [path for path in leftover(parent) if path.name != disk.LOCK]


def test_an_interruption_of_the_gradients_leaves_no_folder(tmp_path: Path) -> None:
    def progress(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(store="disk", store_dir=tmp_path, progress=progress)
    assert not list(tmp_path.iterdir()), caught


@pytest.mark.parametrize("store", ["disk", "recompute"])
def test_curvature_that_is_refused_leaves_no_files(tmp_path: Path, store) -> None:
    with pytest.raises(wf.CurvatureError, match="raise damping"):
        run(damping=1e-30, num_samples=4, store=store, store_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["device", "recompute"])
def test_the_tensor_of_a_block_that_is_refused_is_named(monkeypatch, store) -> None:
    in_parts(monkeypatch, 20)
    bad = np.full((EXAMPLES, 40), 1e6, np.float32)
    bad[:, 3:] += np.arange(37)
    with pytest.raises(wf.CurvatureError, match="the first in 'd'"):
        run(samples=SAMPLES | {"d": bad}, damping=1e-9, store=store)


@pytest.mark.parametrize("store", STORES)
def test_a_loss_that_is_not_finite_leaves_no_store(tmp_path: Path, store) -> None:
    samples = SAMPLES | {"d": SAMPLES["d"].copy()}
    samples["d"][17] = np.nan
    with pytest.raises(ValueError, match="example 17 "):
        run(samples=samples, store=store, store_dir=tmp_path, microbatch_size=4)
    assert not leftover_gradients(tmp_path)


# ---------------------------------------------------------------------------- progress


@pytest.mark.parametrize("store", ["disk", "recompute"])
def test_progress_of_every_store_counts_to_its_end(monkeypatch, store) -> None:
    in_parts(monkeypatch, 40)
    seen: dict[str, list[tuple[int, int]]] = {}
    run(
        store=store,
        progress=lambda label, done, total: seen.setdefault(label, []).append(
            (done, total)
        ),
    )
    assert set(seen) == set(LABELS)
    for label in LABELS[1:]:
        done, totals = zip(*seen[label], strict=True)
        assert done[0] == 0
        assert list(done) == sorted(set(done))
        assert done[-1] == totals[0]
        assert len(set(totals)) == 1
