"""F⁻¹ over all blocks is the same wherever gradients wait, and whatever fails.

Gradients are injected: the loss is the inner product of the parameters with the
example, so that the gradient at an example is the example itself.
"""

import functools
import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.curvature import inverse
from woodfisher_jax.curvature.fisher import _stored
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.sources import InMemory, Stored, laid_out
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows import disk, memory_plan, tiles
from woodfisher_jax.rows.compute import STORES, Compute
from woodfisher_jax.rows.gradients import as_partial
from woodfisher_jax.rows.memory_plan import Storage
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees.blocks import (
    flat_order,
    flatten,
    full_matrix,
    within_tensors,
)

SHAPES = {"a": (6, 7), "b/kernel": (3, 14), "c": (1, 1), "d": (40,)}
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
MASKS = {path: jnp.ones(shape, bool) for path, shape in SHAPES.items()}
ORDER = flat_order(MASKS)
VECTOR = np.random.default_rng(0).standard_normal(ORDER.size).astype(np.float32)
KEPT = np.random.default_rng(1).random(ORDER.size) < 0.6
TARGETS = np.linspace(-1, 1, EXAMPLES).astype(np.float32)
DAMPING = 1e-2
IN_MEMORY_OR_IN_PASSES = "device", pytest.param("recompute", marks=pytest.mark.slow)


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
    tile_bytes: int = 2000
    full: bool = False

    @property
    def layout(self):
        return (
            full_matrix(ORDER) if self.full else within_tensors(ORDER, self.block_size)
        )

    @property
    def gradients(self) -> np.ndarray:
        return np.asarray(flatten(ORDER, SAMPLES))[: self.num_samples]

    def fisher(self) -> np.ndarray:
        """Oracle: the damped Fisher, zero between blocks, in float64."""
        g = self.gradients.astype(np.float64)
        together = np.zeros((ORDER.size, ORDER.size))
        bounds = (0, ORDER.size) if self.full else ORDER.offsets
        for start, stop in pairwise(bounds):
            for i in range(start, stop, self.block_size or stop - start):
                end = min(stop, i + (self.block_size or stop))
                together[i:end, i:end] = 1
        return g.T @ g / len(g) * together + DAMPING * np.eye(ORDER.size)


CASES = {
    "several tiles": Case(),
    "whole tensors": Case(block_size=None, tile_bytes=10**9),
    "one sample, a tile for every block": Case(num_samples=1, tile_bytes=1),
    "full matrix": Case(block_size=None, full=True),
}


def stored(case: Case, store: str, *, keep: bool = True, **options):
    """The operator on gradients in a store, to be entered."""
    whole = tiles.whole(
        ORDER, case.layout, case.num_samples, tile_bytes=case.tile_bytes
    )
    passes = tiles.split(whole, 30) if store == "recompute" else (whole,)
    loss, compute = as_partial(inner_product), Compute(**options)
    problem = Problem(
        loss, params_of(), MASKS, SAMPLES, ORDER, case.num_samples, 1, compute
    )
    source = Stored(problem, Storage(store, whole, passes, keep), 9)
    return _stored(InverseFisher(source, DAMPING))


def in_memory(case: Case, **options) -> InverseFisher:
    source = InMemory(*laid_out(jnp.asarray(case.gradients), case.layout), ORDER.size)
    return InverseFisher(source, DAMPING, **options)


def close(found, expected, share=2e-4) -> None:
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=share * abs(expected).max())


@pytest.mark.parametrize(
    "case",
    [
        # Every tensor size compiles by itself.
        pytest.param(case, marks=[pytest.mark.slow] * (name != "several tiles"))
        for name, case in CASES.items()
    ],
    ids=CASES,
)
def test_diagonal_and_product_are_those_of_the_dense_inverse(case) -> None:
    inverse = np.linalg.inv(case.fisher())
    results = []
    for store in ("host", "recompute", "memory"):
        context = stored(case, store, keep=store == "host")
        with context if store != "memory" else wf.ready(in_memory(case))[0] as fisher:
            diagonal = fisher.diagonal()
            product = fisher.product(jnp.asarray(VECTOR), diagonal.factors)
        np.testing.assert_allclose(diagonal.value, np.diag(inverse), rtol=2e-4)
        close(product.value, inverse @ VECTOR)
        assert (store == "memory") == (not isinstance(diagonal.error, float))
        kept = [factor is not None for factor in diagonal.factors.values()]
        assert set(kept) == {store != "recompute"}
        results.append((diagonal.value, product.value))
    for found in results[1:]:
        np.testing.assert_array_equal(found[0], results[0][0])
        close(found[1], np.asarray(results[0][1]), 1e-6)


def test_every_store_gives_the_same_bits_and_leaves_nothing(tmp_path: Path) -> None:
    found = {}
    for store in STORES:
        with stored(Case(), store, keep=False, store_dir=tmp_path) as inverse:
            found[store] = inverse.diagonal().value, inverse.product(VECTOR).value
    for results in found.values():
        np.testing.assert_array_equal(results, found["device"])
    assert not list(tmp_path.iterdir())


def on_support(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Oracle: slope, joint update and leverages for the kept weights."""
    f, g = case.fisher(), case.gradients.astype(np.float64)
    n, w, y = len(g), VECTOR.astype(np.float64), TARGETS[: len(g)]
    step = np.where(KEPT, 0.0, -w)
    # Each block has its own gradients of the slope: Σ over blocks of G_B' y / N.
    slope = -g.T @ y / n
    step[KEPT] = np.linalg.solve(f[np.ix_(KEPT, KEPT)], (-slope - f @ step)[KEPT])
    leverages = np.zeros(len(w))
    for block in (row[row < ORDER.size] for rows in case.layout for row in rows):
        part, kept = g[:, block], KEPT[block]
        gram = n * DAMPING * np.eye(n) + part[:, kept] @ part[:, kept].T
        leverages[block] = np.sum(part * np.linalg.solve(gram, part), 0)
    return slope, step, leverages


def test_the_other_formulas_of_the_fisher() -> None:
    case = Case()
    f, g, w = case.fisher(), case.gradients, VECTOR.astype(np.float64)
    slope, step, leverages = on_support(case)
    with stored(case, "host") as out_of_core:
        for fisher in (in_memory(case), out_of_core):
            close(fisher.multiplied(jnp.asarray(VECTOR)), f @ w)
            close(fisher.slope(jnp.asarray(TARGETS)), slope)
            close(fisher.leverages(jnp.asarray(KEPT)), leverages)
            assert fisher.quadratic_form(VECTOR) == pytest.approx(w @ f @ w, rel=1e-5)
            found = fisher.joint_update(*map(jnp.asarray, (VECTOR, KEPT, TARGETS)))
            close(found.value, step, 1e-3)
    centered = f - np.where(f, np.outer(g.mean(0), g.mean(0)), 0)
    found = in_memory(case, centered=True).product(jnp.asarray(VECTOR)).value
    close(found, np.linalg.solve(centered, w), 1e-3)


def test_columns_of_a_small_support_are_gathered(monkeypatch) -> None:
    case = Case(num_samples=4, tile_bytes=10**9)
    _, step, leverages = on_support(case)
    support = jnp.asarray(KEPT)
    with stored(case, "host") as fisher:
        (tile,) = fisher.source.sweep("")
        assert fisher._few(tile, support) is None  # a small block
        monkeypatch.setattr(inverse, "WORTH_GATHERING", 0)
        assert fisher._few(tile, support) is None  # of which more than a quarter stays
        monkeypatch.setattr(inverse, "FEW", 1.0)
        assert fisher._few(tile, support).shape == (tile.index.shape[0], 8)
        close(fisher.leverages(support), leverages)
        arrays = (jnp.asarray(VECTOR), support, jnp.asarray(TARGETS[:4]))
        close(fisher.joint_update(*arrays).value, step, 1e-3)


@pytest.mark.slow
def test_damping_is_chosen_from_columns_of_a_small_support(monkeypatch) -> None:
    case = Case(num_samples=4)
    support = jnp.asarray(KEPT)
    arrays = support, jnp.where(support, 0.0, VECTOR), jnp.asarray(TARGETS[:4])
    with stored(case, "disk") as fisher:
        _, expected = fisher.leave_one_out(*arrays)
        monkeypatch.setattr(inverse, "WORTH_GATHERING", 0)
        monkeypatch.setattr(inverse, "FEW", 1.0)
        _, found = fisher.leave_one_out(*arrays)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_chosen_damping_is_that_of_the_gram_matrix(full) -> None:
    case = Case(block_size=None, full=full)
    plain, targets = in_memory(case), jnp.asarray(TARGETS)
    pruned = jnp.where(KEPT, 0.0, VECTOR)
    fisher, chosen = plain.with_chosen_damping(jnp.asarray(KEPT), pruned, targets)
    g = case.gradients.astype(np.float64)
    gram = (g * KEPT) @ g.T
    assert fisher.damping == chosen.damping
    shift = np.trace(gram) / EXAMPLES * chosen.multiple
    assert chosen.damping == pytest.approx(shift / EXAMPLES, rel=1e-4)
    # The factors of the blocks are known then, and serve the joint update.
    assert fisher.known
    arrays = (jnp.asarray(VECTOR), jnp.asarray(KEPT), targets)
    found = fisher.joint_update(*arrays).value
    again = InverseFisher(plain.source, chosen.damping).joint_update(*arrays).value
    close(found, np.asarray(again), 1e-5)


# ------------------------------------------------------------------ whole pruning steps


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and passes, as in a network that is large."""
    small = functools.partial(tiles.whole, tile_bytes=4 * EXAMPLES * 20)
    monkeypatch.setattr(memory_plan, "whole", small)
    cut = tiles.split
    monkeypatch.setattr(memory_plan, "split", lambda whole, _: cut(whole, 40))


def run(params=None, samples=SAMPLES, **options):
    options = {"sparsity": 0.6, "damping": DAMPING, "block_size": 8} | options
    options.setdefault("masks", MASKS)
    params = params_of() if params is None else params
    return wf.prune(inner_product, params, samples, **options)


def assert_same(found, expected) -> None:
    for path in SHAPES:
        np.testing.assert_array_equal(found[1][path], expected[1][path])
        np.testing.assert_array_equal(found[0][path], expected[0][path])


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_half_precision_is_that_of_rounded_gradients(tmp_path: Path, store) -> None:
    rounded = {
        path: np.asarray(jnp.asarray(given, jnp.bfloat16), np.float32)
        for path, given in SAMPLES.items()
    }
    expected = run(samples=rounded, store="host")
    found = run(store=store, store_dir=tmp_path, store_dtype="bfloat16")
    assert_same(found, expected)
    assert found[2].needs.store == store
    assert found[2].needs.store_bytes * 2 == expected[2].needs.store_bytes


@pytest.mark.slow
def test_samples_are_read_again_in_every_pass() -> None:
    """From a generator, in means over batches, by parts of the tensors."""
    pieces = [
        {path: given[i : i + 5] for path, given in SAMPLES.items()}
        for i in range(0, EXAMPLES, 5)
    ]
    options = {"num_samples": 5, "batch_size": 4, "microbatch_size": 3}
    found = run(samples=(piece for piece in pieces), store="recompute", **options)
    assert found[2].needs.passes > 1
    assert_same(found, run(store="host", **options))


@pytest.mark.slow
@pytest.mark.parametrize("store", IN_MEMORY_OR_IN_PASSES)
def test_a_tensor_that_is_all_pruned_already_has_no_part(store) -> None:
    masks = MASKS | {"b/kernel": jnp.zeros(SHAPES["b/kernel"], bool)}
    found = run(store=store, masks=masks)
    assert not np.asarray(found[0]["b/kernel"]).any()
    assert found[2].nonzero == 50
    other = SAMPLES | {"b/kernel": 100 * SAMPLES["b/kernel"]}
    assert_same(run(store=store, masks=masks, samples=other), found)


@pytest.mark.filterwarnings("ignore:no weight is left")  # of one
@pytest.mark.parametrize("store", IN_MEMORY_OR_IN_PASSES)
def test_one_weight_and_one_sample(store) -> None:
    params, samples = {"w": jnp.ones((1, 1))}, {"w": np.ones((1, 1, 1), np.float32)}
    found = run(params, samples, store=store, sparsity=0.0, masks=None)
    np.testing.assert_array_equal(found[0]["w"], [[1.0]])
    with pytest.raises(OptionError, match="has a single prunable weight; expected sp"):
        run(params, samples, store=store, sparsity=0.5, masks=None)


# ------------------------------------------------------------------ what can go wrong


def unchanged(params) -> None:
    for path, weights in WEIGHTS.items():
        np.testing.assert_array_equal(params[path], weights)


def files(parent: Path) -> list[Path]:
    return [p for p in parent.rglob("*") if p.is_file() and p.name != disk.LOCK]


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
@pytest.mark.parametrize("calls", [0, 9])
def test_a_disk_that_fails_leaves_params_and_folder_as_they_were(
    tmp_path: Path, monkeypatch, name, calls
) -> None:
    real, made = getattr(os, name), []

    def failing(*args):
        made.append(args)
        if len(made) > calls:
            raise OSError(5, "Input/output error")
        return real(*args)

    params = params_of()
    options = {"store": "disk", "store_dir": tmp_path, "microbatch_size": 4}
    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing)
        with pytest.raises(wf.StoreError, match="Input/output error"):
            run(params, **options)
    unchanged(params)
    assert not files(tmp_path)
    assert_same(run(params, **options), run(store="host", microbatch_size=4))


@pytest.mark.parametrize("store", ["disk", "recompute"])
@pytest.mark.parametrize("when", ["gradients", "curvature blocks", "update blocks"])
def test_an_interruption_leaves_no_files(tmp_path: Path, store, when) -> None:
    def progress(label: str, done: int, total: int) -> None:
        if label == when and done > 0:
            raise KeyboardInterrupt

    params = params_of()
    with pytest.raises(KeyboardInterrupt):
        run(params, store=store, store_dir=tmp_path, progress=progress)
    assert not files(tmp_path)
    unchanged(params)


@pytest.mark.parametrize("store", STORES)
def test_what_is_refused_is_named_and_leaves_no_files(tmp_path: Path, store) -> None:
    options = {"store": store, "store_dir": tmp_path}
    bad = np.full((EXAMPLES, 40), 1e6, np.float32)
    bad[:, 3:] += np.arange(37)
    with pytest.raises(wf.CurvatureError, match=r"first in 'd'.*raise damping"):
        run(samples=SAMPLES | {"d": bad}, damping=1e-9, **options)
    samples = SAMPLES | {"d": SAMPLES["d"].copy()}
    samples["d"][17] = np.nan
    with pytest.raises(ValueError, match="example 17 "):
        run(samples=samples, microbatch_size=4, **options)
    assert not files(tmp_path)


@pytest.mark.parametrize("store", ["disk", "recompute"])
def test_progress_counts_every_phase_to_its_end(tmp_path: Path, store) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(label: str, done: int, total: int) -> None:
        seen.setdefault(label, []).append((done, total))

    run(store=store, store_dir=tmp_path, progress=progress)
    assert set(seen) == {"gradients", "curvature blocks", "update blocks"}
    for label, calls in seen.items():
        done, totals = zip(*calls, strict=True)
        assert len(set(totals)) == 1
        assert done[-1] == totals[0]
        if label != "gradients" or store == "disk":  # else once in every pass
            assert list(done) == sorted(set(done))
            assert done[0] == 0
