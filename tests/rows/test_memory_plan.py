"""Memory plans against arithmetic that can be done by hand.

What the compiler would report is replaced by round numbers, and so is the memory that
the process has in use, so that limits can be exact.
"""

import contextlib
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import woodfisher_jax as wf
from woodfisher_jax.equations.fisher import solver_flops
from woodfisher_jax.rows import budget, memory_plan, tiles
from woodfisher_jax.rows.budget import Budget, block_bytes
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.gradients import Program, chunk_length, compile_rows
from woodfisher_jax.rows.memory_plan import (
    SLOPE_BYTES,
    VECTOR_BYTES,
    MemoryLimitError,
    plan_passes,
    plan_rows,
)
from woodfisher_jax.rows.needs import Needs, Passes
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees.blocks import flat_order, within_tensors

USED = 10**9
N, WIDTH, BLOCKS = 50, 100, 40
SIZE = WIDTH * BLOCKS
SHAPES = {"a": (30, 100), "b": (10, 100)}
STORED = 4 * N * SIZE
FACTORS = BLOCKS * 8 * N * N
TEMPORARY, FLOPS = 1000, 3 * SIZE
"""Of the gradient of one sample, as the compiler would report them."""
TILE_BLOCKS = 2
"""Tiles are small beside the store, as in a large network."""


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer examples at once than there are samples."""
    monkeypatch.setattr(memory_plan, "MICROBATCH_SIZE", 64)


def compiled(problem: Problem, microbatch_size: int) -> Program:
    length = chunk_length(problem.num_samples, problem.batch_size, microbatch_size)
    return Program(TEMPORARY * length, FLOPS * length)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of known size, endless disk, small tiles, nothing compiled."""
    monkeypatch.setattr(budget, "resident", lambda: USED)
    monkeypatch.setattr(budget, "free_bytes", lambda parent: 10**15)
    monkeypatch.setattr(memory_plan, "compile_rows", compiled)
    small = partial(tiles.whole, tile_bytes=4 * N * WIDTH * TILE_BLOCKS)
    monkeypatch.setattr(memory_plan, "whole", small)


def free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda parent: free)


def problem_of(
    above: float | None, *, shapes=SHAPES, num_samples=N, batch_size=1, **options
) -> Problem:
    """A problem with so much memory above what the process has in use already."""
    limit = 10**12 if above is None else USED + above
    compute = Compute(memory_limit=limit, **({"microbatch_size": 4} | options))
    order = flat_order({path: np.zeros(shape) for path, shape in shapes.items()})
    loss, rest = Partial(lambda params, batch: 0.0), ({}, {}, None)
    return Problem(loss, *rest, order, num_samples, batch_size, compute)


def plan(
    above: float | None = None,
    *,
    block_size: int | None = WIDTH,
    layout=within_tensors,
    vector_bytes: int = VECTOR_BYTES,
    **options,
) -> Needs:
    problem = problem_of(above, **options)
    layouts = layout and (lambda size: layout(problem.order, size))
    needs, storage = plan_rows(
        problem, layouts=layouts, block_size=block_size, vector_bytes=vector_bytes
    )
    assert needs.peak_bytes <= needs.limit_bytes
    assert (storage.store if storage else "") == needs.store
    assert needs.passes == (len(storage.passes) if storage else 1)
    return needs


def peaks(needs: Needs) -> dict[str, int]:
    return {phase.name: phase.peak_bytes - USED for phase in needs.phases}


def flops(needs: Needs) -> dict[str, float]:
    return {phase.name: phase.flops for phase in needs.phases}


# ------------------------------------------------------------------------ bytes by hand


def test_a_plan_describes_its_step() -> None:
    needs = plan()
    assert needs.num_weights == SIZE
    assert (needs.num_samples, needs.batch_size, needs.microbatch_size) == (N, 1, 4)
    assert needs.blocks == ((WIDTH, BLOCKS, "sample_space"),)
    assert (needs.store, needs.store_dtype) == ("device", "float32")
    assert (needs.passes, needs.keep_factors) == (1, True)
    assert needs.limit_bytes == 10**12
    assert needs.peak_bytes == max(peaks(needs).values()) + USED


@pytest.mark.parametrize("vector_bytes", [VECTOR_BYTES, VECTOR_BYTES + SLOPE_BYTES])
def test_a_phase_holds_vectors_rows_and_its_work(vector_bytes) -> None:
    vectors = vector_bytes * SIZE
    # By tensor, as rows, by block, and the chunk before; four samples at once.
    forming = 4 * (4 * 4 * SIZE + TEMPORARY)
    tile = 4 * (4 * N * WIDTH * TILE_BLOCKS)
    work = tile + block_bytes(N, WIDTH, "sample_space") + FACTORS
    for store, stored in (("device", STORED), ("host", STORED), ("disk", 0)):
        assert peaks(plan(vector_bytes=vector_bytes, store=store)) == {
            "gradients": stored + vectors + forming,
            "curvature": stored + vectors + work,
            "update": stored + vectors + work,
        }
    # Weights, diagonal, scores, direction in float32, and at least one sorted copy.
    assert VECTOR_BYTES >= 5 * 4


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_the_store_holds_every_gradient_once(dtype, item) -> None:
    needs = plan(store_dtype=dtype)
    assert needs.store_bytes == item * N * SIZE
    assert {phase.bytes_moved for phase in needs.phases} == {item * N * SIZE}


@pytest.mark.parametrize(
    ("block_size", "padded"),
    [(100, 4000), (99, 99 * (31 + 11)), (None, 4000), (3000, 6000), (10**6, 6000)],
)
def test_padding_is_stored_too(monkeypatch, block_size, padded) -> None:
    # 3000 weights in 31 blocks of 99 and 1000 in 11.
    monkeypatch.setattr(memory_plan, "whole", tiles.whole)
    assert plan(block_size=block_size).store_bytes == 4 * N * padded


def test_a_curvature_without_blocks_keeps_no_gradients() -> None:
    needs = plan(layout=None, block_size=None)
    assert (needs.store, needs.store_bytes, needs.blocks) == ("", 0, ())
    forming = 4 * (4 * 4 * SIZE + TEMPORARY)
    assert peaks(needs) == {"gradients": VECTOR_BYTES * SIZE + forming}
    assert flops(needs) == {"gradients": FLOPS * 4 * 13}  # thirteen chunks of four


# ------------------------------------------------------------------------- arithmetic


def test_blocks_are_factorized_again_where_factors_do_not_fit() -> None:
    factorize, diagonal = solver_flops(N, WIDTH, "sample_space")
    kept = plan(store="disk")
    assert flops(kept)["curvature"] == pytest.approx(BLOCKS * (factorize + diagonal))
    assert flops(kept)["update"] == 0
    again = plan(peaks(kept)["curvature"] - 1, store="disk")
    assert flops(again)["update"] == pytest.approx(BLOCKS * factorize)
    assert peaks(kept)["update"] - peaks(again)["update"] == FACTORS
    assert (kept.keep_factors, again.keep_factors) == (True, False)


def test_recomputation_pays_in_gradients() -> None:
    stored, again = flops(plan(store="disk")), flops(plan(store="recompute"))
    once = stored["gradients"]
    assert again["gradients"] == once > 0
    assert again["update"] == stored["update"] + once


def test_every_width_has_the_solver_that_suits_it() -> None:
    needs = plan(block_size=None, shapes={"a": (30, 100), "b": (3, 4)})
    assert needs.blocks == ((3000, 1, "sample_space"), (12, 1, "dense"))
    assert plan(solver="recursion").blocks == ((WIDTH, BLOCKS, "recursion"),)


# ------------------------------------------------------------------------------- tiers


LIMITS = [int(2_500_000 * 0.88**i) for i in range(22)]


def stores(limits=LIMITS, **options) -> list[str]:
    """The store chosen under each limit, without repetitions."""
    chosen = []
    for above in limits:
        try:
            chosen.append(plan(above, **options).store)
        except MemoryLimitError:
            chosen.append("refused")
    return [store for store, _ in itertools.groupby(chosen)]


def test_with_less_memory_gradients_go_to_disk_or_are_formed_again(monkeypatch) -> None:
    assert stores() == ["device", "disk", "refused"]
    free_disk(monkeypatch, 0)
    assert stores() == ["device", "recompute", "refused"]


@pytest.mark.parametrize("store", ["device", "host", "disk", "recompute"])
def test_a_given_store_is_kept_to_or_refused(store) -> None:
    assert stores(store=store) == [store, "refused"]


def test_a_disk_that_just_holds_them(monkeypatch) -> None:
    # Just too little for the device.
    above = peaks(plan(store="device"))["curvature"] - FACTORS - 1
    for free, store in ((STORED, "disk"), (STORED - 1, "recompute")):
        free_disk(monkeypatch, free)
        assert plan(above).store == store


def test_the_less_memory_the_more_passes() -> None:
    plans = []
    with contextlib.suppress(MemoryLimitError):
        for above in LIMITS:
            plans.append(plan(above, store="recompute"))
    passes = [needs.passes for needs in plans]
    assert passes == sorted(passes)
    assert passes[0] == 1
    assert passes[-1] > 3
    assert {flops(n)["gradients"] / n.passes for n in plans} == {FLOPS * 4 * 13}


def test_passes_leave_room_for_forming_their_gradients() -> None:
    forming = 25 * (4 * 4 * SIZE + TEMPORARY)
    one_tile = 4 * N * WIDTH * TILE_BLOCKS
    above = VECTOR_BYTES * SIZE + forming + one_tile
    needs = plan(above, store="recompute", microbatch_size=25)
    assert needs.passes == BLOCKS // TILE_BLOCKS


def test_limits_are_exact() -> None:
    lowest = peaks(plan(store="device"))["curvature"]
    assert plan(lowest, store="device").keep_factors
    lowest -= FACTORS
    assert not plan(lowest, store="device").keep_factors
    with pytest.raises(MemoryLimitError):
        plan(lowest - 1, store="device")


@pytest.mark.parametrize("layout", [within_tensors, None])
def test_a_process_beyond_its_limit_already_is_refused(layout) -> None:
    with pytest.raises(MemoryLimitError):
        plan(-1, layout=layout)


# ------------------------------------------------------------------- examples at once


def test_fewer_examples_at_once_where_memory_is_short() -> None:
    options = {"shapes": {"w": (200, 100)}, "num_samples": 100, "store": "disk"}
    sizes = [
        plan(above, microbatch_size=None, **options).microbatch_size
        for above in (None, 16_000_000, 8_000_000, 4_000_000)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert 1 <= sizes[-1] < 8
    assert plan(microbatch_size=1000).microbatch_size == 1000  # as given


def test_fewer_examples_at_once_where_compiling_shows_that_they_take_more(
    monkeypatch,
) -> None:
    attempts = []

    def heavy(problem: Problem, microbatch_size: int) -> Program:
        attempts.append(microbatch_size)
        return Program(10**6 * microbatch_size, 0.0)

    monkeypatch.setattr(memory_plan, "compile_rows", heavy)
    # Half of the memory is for forming gradients: nine examples and their chunk.
    needs = plan(2 * 10**7, store="disk", microbatch_size=None)
    assert attempts == [64, needs.microbatch_size]
    assert needs.microbatch_size == 9


@pytest.mark.parametrize("batch_size", [3, 25])
def test_means_over_batches_take_the_room_of_their_rows(batch_size) -> None:
    needs = plan(batch_size=batch_size, microbatch_size=4, num_samples=4)
    assert needs.batch_size == batch_size
    forming = 4 * 4 * SIZE + TEMPORARY  # one row at a time
    stored = 4 * 4 * SIZE
    assert peaks(needs)["gradients"] == VECTOR_BYTES * SIZE + forming + stored


# ----------------------------------------------------------------- passes without rows


def passes(size: int) -> Passes:
    """A thousand bytes an example and ten thousand after the last pass."""
    return Passes(1000 * size, 5.0, 10_000, 7.0)


def test_passes_hold_vectors_and_their_work() -> None:
    needs = plan_passes(passes, problem_of(None, microbatch_size=None))
    assert needs.microbatch_size == 64
    vectors = VECTOR_BYTES * SIZE
    assert peaks(needs) == {"gradients": vectors + 64_000, "curvature": vectors + 10**4}
    assert flops(needs) == {"gradients": 5.0, "curvature": 7.0}
    assert (needs.store, needs.blocks, needs.num_samples) == ("", (), N)


def test_passes_take_fewer_examples_where_memory_is_short() -> None:
    vectors = VECTOR_BYTES * SIZE
    short = problem_of(vectors + 40_000, microbatch_size=None)
    needs = plan_passes(passes, short)
    assert needs.microbatch_size == 20  # half of what is left
    message = r"memory_limit=1000000100 allows 1 GB .*; raise memory_limit, leave out"
    with pytest.raises(MemoryLimitError, match=message):
        plan_passes(passes, problem_of(100, microbatch_size=None))
    with pytest.raises(MemoryLimitError, match="raise memory_limit, take a smaller mi"):
        plan_passes(passes, problem_of(100, microbatch_size=5))


# ----------------------------------------------------------------------------- refusal


def refusal(above: float, **options) -> str:
    with pytest.raises(MemoryLimitError) as caught:
        plan(above, **options)
    return str(caught.value)


def ways_out(message: str) -> dict[str, str | int]:
    """The options that a message suggests."""
    _, _, ways = message.partition("It fits with ")
    pairs = re.findall(r"(\w+)=(?:'(\w+)'|(\d+))", ways)
    return {name: word or int(number) for name, word, number in pairs}


def suggested(limits, option: str, **options) -> list[str | int]:
    """Values suggested for an option under each limit, all of which fit."""
    values = []
    for above in limits:
        try:
            plan(above, **options)
        except MemoryLimitError as error:
            value = ways_out(str(error)).get(option)
            if value is not None:
                values.append(value)
                plan(above, **(options | {option: value}))
    return values


def test_a_refusal_names_the_numbers() -> None:
    message = refusal(500_000, store="device")
    for part in (
        f"memory_limit={USED + 500_000} allows {(USED + 500_000) / 1e9:.3g} GB",
        "4,000 weights",
        f"num_samples={N}",
        f"blocks of up to {WIDTH}",
        "store='device'",
        "microbatch_size=4",
    ):
        assert part in message
    assert re.search(r"needs [\d.]+ GB of memory for its \w+", message)


def test_a_refusal_for_the_disk_names_its_room(monkeypatch) -> None:
    free_disk(monkeypatch, 123_000)
    message = refusal(10**9, store="disk")
    assert f"{STORED / 1e9:.3g} GB for its gradients" in message
    assert "0.000123 GB of disk" in message
    assert ways_out(message)["store"] == "auto"


def test_every_suggestion_fits(monkeypatch) -> None:
    names = ("store", "block_size", "num_samples", "microbatch_size")
    found = set()
    for store, block_size, disk in (
        ("auto", None, 0),
        ("device", 100, 10**15),
        ("disk", 1500, 10**15),
        ("disk", 100, 100_000),
    ):
        free_disk(monkeypatch, disk)
        options = {"store": store, "block_size": block_size}
        found |= {name for name in names if suggested(LIMITS[::2], name, **options)}
    assert found == {"store", "block_size", "num_samples"}


def test_a_suggestion_is_the_nearest_by_halves_if_there_is_one() -> None:
    above = peaks(plan(store="device", num_samples=25))["curvature"]
    assert ways_out(refusal(above, store="device"))["num_samples"] == 25
    assert "Raise memory_limit" in refusal(1000)


def test_fewer_samples_that_make_larger_chunks_are_not_suggested() -> None:
    # 129 samples go in chunks of 43, and 64 at once.
    options = {"num_samples": 129, "microbatch_size": 64, "store": "device"}
    assert suggested(range(4_000_000, 6_000_000, 100_000), "num_samples", **options)


@pytest.mark.parametrize("layout", [within_tensors, None])
def test_smaller_microbatches_are_suggested(layout) -> None:
    assert suggested([2_000_000], "microbatch_size", microbatch_size=N, layout=layout)


@pytest.mark.xfail(
    strict=True,
    reason="what one example takes is a share of what all take, though the compiler's "
    "room need not grow with the examples",
)
def test_smaller_microbatches_that_take_no_less_are_not_suggested(monkeypatch) -> None:
    constant = Program(10**7, 0.0)
    monkeypatch.setattr(memory_plan, "compile_rows", lambda problem, size: constant)
    above = peaks(plan(microbatch_size=1))["gradients"] - 1
    assert "microbatch_size" not in ways_out(refusal(above, microbatch_size=N))


# ---------------------------------------------------------------------- an accelerator


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    """Pretends that devices have so much memory of their own."""

    def pretend(free: int) -> None:
        memory = (USED, USED + free)
        monkeypatch.setattr(budget, "device_memory", lambda device: memory)
        # Blocks are then computed many at a time.
        monkeypatch.setattr(memory_plan, "BATCH_BYTES", 10_000)

    return pretend


def test_an_accelerator_keeps_gradients_in_the_host_s_memory_next(accelerator) -> None:
    chosen = []
    for free in LIMITS:
        accelerator(free)
        chosen += stores([None])
    assert list(dict.fromkeys(chosen)) == ["device", "host", "refused"]


def test_an_accelerator_takes_larger_chunks_and_many_blocks(
    accelerator, monkeypatch
) -> None:
    monkeypatch.setattr(memory_plan, "CPU_CHUNK_BYTES", 4 * (4 * 4 * SIZE + TEMPORARY))
    on_cpu = plan(microbatch_size=None)
    accelerator(10**9)
    few = plan(microbatch_size=None)
    assert (on_cpu.microbatch_size, few.microbatch_size) == (4, 64)
    monkeypatch.setattr(memory_plan, "BATCH_BYTES", 10**6)
    more = peaks(plan())["curvature"] - peaks(on_cpu)["curvature"]
    assert more == 10**6 - block_bytes(N, WIDTH, "sample_space")


def test_where_the_host_has_no_room_either(accelerator, monkeypatch) -> None:
    accelerator(1_000_000)
    assert plan(STORED).store == "host"
    assert plan(STORED - 1).store == "disk"
    assert "disk" not in refusal(STORED - 1, store="host").partition("It fits")[0]
    free_disk(monkeypatch, 0)
    needs = plan(STORED - 1)
    assert needs.store == "recompute"
    assert needs.limit_bytes == USED + 1_000_000


def test_what_follows_passes_lies_on_the_host(accelerator) -> None:
    accelerator(10**9)
    needs = plan_passes(passes, problem_of(10_000))
    assert peaks(needs)["curvature"] == VECTOR_BYTES * SIZE
    with pytest.raises(MemoryLimitError):
        plan_passes(passes, problem_of(9_999))


def test_several_devices_share_a_host_and_not_each_other_s_memory(monkeypatch) -> None:
    def planned(devices: int, *, shared: bool) -> Needs:
        monkeypatch.setattr(memory_plan, "BATCH_BYTES", 0)
        room = Budget(0, 1_100_000, 0, 10**12, 10**12, shared, devices)
        monkeypatch.setattr(memory_plan, "budget_of", lambda compute: room)
        return plan(microbatch_size=None, store="recompute")

    one = planned(1, shared=False)
    assert one.passes > 1
    assert planned(8, shared=False) == one
    assert planned(2, shared=True).microbatch_size < one.microbatch_size
    assert planned(2, shared=True).passes > one.passes


# ------------------------------------------------------------------ whole pruning steps


EXAMPLES = np.ones((64, 200), np.float32)


def dense_layer(params, x):
    return jnp.mean(jnp.sin(x @ params["w"]))


def plan_layer(above: float | None = None, loss=dense_layer, **options) -> Needs:
    """The plan of one dense layer from 200 inputs to 100 outputs, given as shapes."""
    limit = 10**12 if above is None else USED + above
    shapes = {"w": jax.ShapeDtypeStruct((200, 100), jnp.float32)}
    options = {"sparsity": 0.5, "memory_limit": limit} | options
    return wf.plan_pruning(loss, shapes, EXAMPLES, **options)


def test_the_plan_is_that_of_the_step_and_computes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(memory_plan, "compile_rows", compile_rows)
    monkeypatch.setattr(memory_plan, "whole", tiles.whole)
    ran: list[int] = []

    def traced(params, batch):
        jax.debug.callback(lambda: ran.append(1))
        return dense_layer(params, batch)

    options = {"block_size": 10_000, "damping": 1e-2}
    needs = plan_layer(loss=traced, **options)
    jax.effects_barrier()
    assert not ran
    # Two products of a vector and a matrix for each example, at least.
    assert flops(needs)["gradients"] >= 64 * 2 * 200 * 100
    params, options = {"w": jnp.full((200, 100), 0.1)}, options | {"sparsity": 0.5}
    *_, info = wf.prune(traced, params, EXAMPLES, memory_limit=10**12, **options)
    assert info.needs == needs
    assert ran


@pytest.mark.parametrize("method", ["woodtaylor", "woodtaylorblock"])
def test_a_slope_takes_its_vectors(method) -> None:
    """ḡ, summed and flat, h, and w - h in float32."""
    slope = peaks(plan_layer(method=method))
    without = peaks(plan_layer(method=method.replace("taylor", "fisher")))
    assert {slope[phase] - without[phase] for phase in slope} == {4 * 4 * 20_000}


def test_kronecker_factors_are_planned() -> None:
    factors, vectors = 8 * (200**2 + 100**2), VECTOR_BYTES * 20_000
    needs = peaks(plan_layer(method="kfac"))
    assert needs["curvature"] == vectors + 2 * factors + 3 * 8 * 200**2
    assert needs["gradients"] >= vectors + 3 * factors


@pytest.mark.parametrize("method", ["kfac", "naivehess"])
def test_other_curvatures_take_fewer_examples_at_once_too(method) -> None:
    most = plan_layer(method=method)
    fewer = plan_layer(most.peak_bytes - USED, method=method)
    assert fewer.microbatch_size < most.microbatch_size == 64
    assert fewer.peak_bytes < most.peak_bytes


def test_magnitudes_need_no_plan() -> None:
    assert plan_layer(method="globalmagni") is None
