"""A step is planned before it starts: by arithmetic that can be done by hand.

Gradients are injected: the loss is the inner product of the weights with the example.
What the process takes already is set to a round number, so that limits can be exact.
"""

import contextlib
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from woodfisher_jax.settings import check_settings

import woodfisher_jax as wf
from woodfisher_jax.curvature.checked import block_bytes
from woodfisher_jax.equations.fisher import solver_flops
from woodfisher_jax.rows import budget
from woodfisher_jax.rows import memory_plan as resources
from woodfisher_jax.rows import tiles as panels
from woodfisher_jax.trees.blocks import flat_order, within_tensors
from woodfisher_jax.trees.masks import init_masks

USED = 10**9
N, WIDTH, BLOCKS = 50, 100, 40
SHAPES = {"a": (30, 100), "b": (10, 100)}
SAMPLES = {path: np.ones((N, *shape), np.float32) for path, shape in SHAPES.items()}
PARAMS = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
STORED = 4 * N * WIDTH * BLOCKS
PANEL_BLOCKS = 2
"""Two blocks a panel: panels small beside the store, as in a large network."""


def inner_product(params, batch):
    terms = (
        jnp.sum(params[path] * given, axis=tuple(range(1, given.ndim)))
        for path, given in batch.items()
    )
    return jnp.mean(sum(terms))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of known size, endless disk, and small panels."""
    monkeypatch.setattr(budget.memory, "resident", lambda: USED)
    monkeypatch.setattr(budget, "free_bytes", lambda parent: 10**15)
    size = 4 * N * WIDTH * PANEL_BLOCKS
    monkeypatch.setattr(resources, "whole", partial(panels.whole, panel_bytes=size))


def plan(above: float | None = None, *, samples=SAMPLES, params=PARAMS, **options):
    """The plan with so much memory above what the process has already."""
    options = {"sparsity": 0.5, "block_size": WIDTH, "microbatch_size": 4} | options
    limit = 10**12 if above is None else USED + above
    return wf.plan_pruning(
        inner_product, params, samples, memory_limit=limit, **options
    )


def peaks(needs) -> dict[str, int]:
    return {phase.name: phase.peak_bytes - USED for phase in needs.phases}


# ------------------------------------------------------------------------ bytes by hand


def test_a_plan_says_what_it_is_for() -> None:
    needs = plan()
    assert needs.num_weights == 4000
    assert (needs.num_samples, needs.batch_size) == (N, 1)
    assert needs.blocks == ((WIDTH, BLOCKS, "sample_space"),)
    assert (needs.store, needs.store_dtype) == ("device", "float32")
    assert (needs.passes, needs.keep_factors) == (1, True)
    assert needs.microbatch_size == 4
    assert needs.limit_bytes == 10**12
    assert [p.name for p in needs.phases] == ["gradients", "curvature", "update"]
    assert needs.peak_bytes == max(peaks(needs).values()) + USED


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_the_store_holds_every_gradient_once(dtype, item) -> None:
    needs = plan(store_dtype=dtype)
    assert needs.store_bytes == item * N * 4000
    assert {phase.bytes_moved for phase in needs.phases} == {item * N * 4000}


@pytest.mark.parametrize(
    ("block_size", "padded"),
    [(100, 4000), (99, 99 * (31 + 11)), (None, 4000), (3000, 6000), (10**6, 6000)],
)
def test_padding_is_stored_too(monkeypatch, block_size, padded) -> None:
    # 3000 weights in 31 blocks of 99 and 1000 in 11.
    monkeypatch.setattr(resources, "whole", panels.whole)
    assert plan(block_size=block_size).store_bytes == 4 * N * padded


def test_what_is_stored_in_memory_is_in_the_peak_and_on_disk_is_not() -> None:
    device, on_disk = peaks(plan(store="device")), peaks(plan(store="disk"))
    for phase in ("gradients", "curvature", "update"):
        assert device[phase] - on_disk[phase] == STORED
    assert peaks(plan(store="host")) == device


def test_factors_are_an_n_by_n_matrix_a_block() -> None:
    with_factors = peaks(plan(store="disk"))
    above = with_factors["curvature"] - 1
    without = plan(above, store="disk")
    assert not without.keep_factors
    difference = with_factors["update"] - peaks(without)["update"]
    assert difference == BLOCKS * 4 * N * N


def test_a_phase_holds_vectors_panels_and_its_work() -> None:
    found = peaks(plan(store="disk", block_size=WIDTH))["curvature"]
    vectors = budget.VECTOR_BYTES * 4000
    held = 4 * (4 * N * WIDTH * PANEL_BLOCKS)
    work = block_bytes(N, WIDTH, "sample_space")
    factors = BLOCKS * 4 * N * N
    assert found == vectors + held + work + factors
    # Weights, diagonal, scores, direction in float32, and at least one sorted copy.
    assert budget.VECTOR_BYTES >= 5 * 4


def test_chunks_of_gradients_take_their_room() -> None:
    few, many = (peaks(plan(microbatch_size=n))["gradients"] for n in (1, 5))
    # By tensor, flat, by block and the one before; the compiler may add to it.
    assert many - few >= 4 * (3 * 4 * 4000)
    assert few >= STORED + budget.VECTOR_BYTES * 4000 + 4 * 4000


def test_more_weights_samples_or_width_need_more() -> None:
    base = plan().peak_bytes
    larger = {path: np.ones((N, 2 * s[0], s[1])) for path, s in SHAPES.items()}
    params = {path: jnp.ones(given.shape[1:]) for path, given in larger.items()}
    assert plan(samples=larger, params=params).peak_bytes > base
    assert plan(num_samples=25).peak_bytes < base
    assert plan(store_dtype="bfloat16").peak_bytes < base


def test_the_diagonal_of_the_fisher_keeps_no_gradients() -> None:
    needs = plan(method="diagfisher", block_size=None)
    assert (needs.store, needs.store_bytes, needs.blocks) == ("", 0, ())
    assert [phase.name for phase in needs.phases] == ["gradients"]


@pytest.mark.parametrize("method", ["woodtaylor", "woodtaylorblock"])
def test_a_slope_takes_its_vectors(method) -> None:
    """ḡ, summed and flat, h, and w - h in float32."""
    without = plan(method=method.replace("taylor", "fisher"))
    slope = {phase: 4 * 4 * 4000 for phase in ("gradients", "curvature", "update")}
    found = peaks(plan(method=method))
    assert {p: found[p] - peak for p, peak in peaks(without).items()} == slope


def dense_layer(params, x):
    return jnp.mean(jnp.sin(x @ params["w"]))


def plan_layer(method, above: float | None = None, **options):
    """The plan of one dense layer from 200 inputs to 100 outputs."""
    limit = 10**12 if above is None else USED + above
    shapes = {"w": jax.ShapeDtypeStruct((200, 100), jnp.float32)}
    samples = np.ones((64, 200), np.float32)
    options = {"sparsity": 0.5, "method": method, "memory_limit": limit} | options
    return wf.plan_pruning(dense_layer, shapes, samples, **options)


def test_kronecker_factors_are_planned_and_take_no_store() -> None:
    needs = plan_layer("kfac")
    assert (needs.store, needs.store_bytes, needs.blocks) == ("", 0, ())
    assert (needs.num_weights, needs.num_samples) == (20_000, 64)
    found, factors = peaks(needs), 8 * (200**2 + 100**2)
    vectors = budget.VECTOR_BYTES * 20_000
    assert found["curvature"] == vectors + 2 * factors + 3 * 8 * 200**2
    assert found["gradients"] >= vectors + 3 * factors


@pytest.mark.parametrize(
    ("method", "options"),
    [("kfac", {}), ("naivehess", {}), ("naivehess", {"hessian": "hutchinson"})],
)
def test_fewer_examples_at_once_where_memory_is_short(method, options) -> None:
    whole = plan_layer(method, **options)
    assert whole.microbatch_size == 64
    small = plan_layer(method, whole.peak_bytes - USED, **options)
    assert small.microbatch_size < 64
    assert small.peak_bytes < whole.peak_bytes
    with pytest.raises(wf.MemoryLimitError, match="Leave out the widest"):
        plan_layer(method, 10_000, **options)
    with pytest.raises(wf.MemoryLimitError, match="smaller microbatch_size"):
        plan_layer(method, 10_000, microbatch_size=5, **options)


@pytest.mark.parametrize("method", ["magni", "globalmagni"])
def test_magnitudes_need_no_plan(method) -> None:
    assert plan(samples=None, method=method, block_size=None) is None


# ------------------------------------------------------------------------- arithmetic


def flops(needs) -> dict[str, float]:
    return {phase.name: phase.flops for phase in needs.phases}


def test_arithmetic_adds_up_over_tensors() -> None:
    one, other, both = (flops(plan(prunable=pattern)) for pattern in ("a", "b", "a|b"))
    for phase in ("curvature", "update"):
        assert both[phase] == pytest.approx(one[phase] + other[phase])
    assert one["curvature"] == pytest.approx(3 * other["curvature"])
    assert one["gradients"] > 0
    assert one["curvature"] > 0


def test_arithmetic_of_a_phase_is_that_of_its_blocks() -> None:
    kept = flops(plan())
    factorize, diagonal = solver_flops(N, WIDTH, "sample_space")
    assert kept["curvature"] == pytest.approx(BLOCKS * (factorize + diagonal))
    assert kept["update"] == 0
    above = peaks(plan(store="disk"))["curvature"] - 1
    anew = flops(plan(above, store="disk"))
    assert anew["update"] == pytest.approx(BLOCKS * factorize)


def test_recomputation_pays_in_gradients() -> None:
    stored = plan(store="disk")
    again = plan(store="recompute")
    assert again.passes == 1
    once = flops(stored)["gradients"]
    assert once > 0
    assert flops(again)["gradients"] == pytest.approx(once)
    assert flops(again)["update"] == pytest.approx(flops(stored)["update"] + once)


@pytest.mark.parametrize("solver", ["sample_space", "dense", "recursion"])
def test_the_solver_that_is_asked_for(solver) -> None:
    needs = plan(solver=solver)
    assert needs.blocks == ((WIDTH, BLOCKS, solver),)
    assert all(number > 0 for number in flops(needs).values()) or needs.keep_factors


def test_every_width_has_the_solver_that_suits_it() -> None:
    needs = plan(
        block_size=None,
        samples={"a": SAMPLES["a"]},
        params={"a": PARAMS["a"], "b": jnp.ones((3, 4))},
        masks={"a": jnp.ones(SHAPES["a"], bool), "b": jnp.ones((3, 4), bool)},
    )
    assert needs.blocks == ((3000, 1, "sample_space"), (12, 1, "dense"))


# ------------------------------------------------------------------------------- tiers


def tiers(limits, **options) -> list[str]:
    """The store chosen under each limit, without repetitions."""
    found = []
    for above in limits:
        try:
            needs = plan(above, **options)
            assert needs.peak_bytes <= USED + above
            found.append(needs.store)
        except wf.MemoryLimitError:
            found.append("refused")
    return [store for store, _ in itertools.groupby(found)]


LIMITS = [int(2_500_000 * 0.88**i) for i in range(22)]


def test_with_less_memory_gradients_go_to_disk_and_then_it_is_refused() -> None:
    assert tiers(LIMITS) == ["device", "disk", "refused"]


def test_without_a_disk_they_are_formed_again(monkeypatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda parent: 0)
    assert tiers(LIMITS) == ["device", "recompute", "refused"]


def test_a_disk_that_just_holds_them(monkeypatch) -> None:
    above = peaks(plan(store="disk"))["curvature"]
    for free, store in ((STORED, "disk"), (STORED - 1, "recompute")):
        monkeypatch.setattr(budget, "free_bytes", lambda parent, free=free: free)
        assert plan(above).store == store


def test_the_less_memory_the_more_passes() -> None:
    found = []
    for above in LIMITS:
        try:
            found.append(plan(above, store="recompute").passes)
        except wf.MemoryLimitError:
            break
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] > 3


@pytest.mark.parametrize("store", ["device", "host", "disk", "recompute"])
def test_a_store_that_is_asked_for_is_kept_to_or_refused(store) -> None:
    assert tiers(LIMITS, store=store) == [store, "refused"]
    assert plan(store=store).store == store


def test_recomputation_takes_as_many_passes_as_it_needs(monkeypatch) -> None:
    half = partial(panels.whole, panel_bytes=STORED // 4)
    monkeypatch.setattr(resources, "whole", half)
    options = {"store": "recompute", "microbatch_size": 1}
    once = peaks(plan(**options))["curvature"]
    without_factors = once - BLOCKS * 4 * N * N
    assert plan(without_factors - STORED // 4, **options).passes > 1


def test_limits_are_exact() -> None:
    lowest = plan(store="device").peak_bytes - USED
    with contextlib.suppress(wf.MemoryLimitError):
        while True:  # by one less each time: first the factors go
            lowest = plan(lowest - 1, store="device").peak_bytes - USED
    assert plan(lowest, store="device").peak_bytes == USED + lowest
    with pytest.raises(wf.MemoryLimitError):
        plan(lowest - 1, store="device")


@pytest.mark.parametrize("method", ["woodfisher", "woodfisherblock", "diagfisher"])
def test_a_process_beyond_its_limit_already_is_refused(method) -> None:
    options = {"block_size": None} if method == "diagfisher" else {}
    with pytest.raises(wf.MemoryLimitError):
        plan(-1, method=method, **options)


# -------------------------------------------------------------------- chunks that fit


def wide(above: float | None, **options):
    """20,000 weights, whose gradients count beside what is stored."""
    return plan(
        above,
        samples={"w": np.ones((100, 200, 100), np.float32)},
        params={"w": jnp.ones((200, 100))},
        microbatch_size=None,
        **options,
    )


def test_microbatches_shrink_with_the_memory_there_is() -> None:
    found = [
        wide(above, store="disk").microbatch_size
        for above in (None, 16_000_000, 8_000_000, 4_000_000)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] == 64
    assert found[-1] < 8
    assert all(size >= 1 for size in found)


def test_microbatches_that_are_asked_for_are_kept_to() -> None:
    assert plan(microbatch_size=7).microbatch_size == 7
    assert plan(microbatch_size=1000).microbatch_size == 1000


@pytest.mark.parametrize("batch_size", [1, 3, 25])
def test_means_over_batches_can_be_formed_in_parts(batch_size) -> None:
    for above in (None, 6_000_000):
        needs = wide(above, store="disk", batch_size=batch_size, num_samples=4)
        assert needs.batch_size == batch_size
        assert needs.microbatch_size >= 1


# ----------------------------------------------------------------------------- refusal


def refusal(above: float, **options) -> str:
    with pytest.raises(wf.MemoryLimitError) as caught:
        plan(above, **options)
    return str(caught.value)


def ways_out(message: str) -> dict[str, Any]:
    """The settings that a message names as a way out."""
    _, _, ways = message.partition("It fits with ")
    found = re.findall(r"(\w+)=('\w+'|\d+)", ways)
    return {name: eval(value) for name, value in found}


def test_a_refusal_names_the_numbers() -> None:
    message = refusal(500_000, store="device")
    needed = plan(store="device").peak_bytes
    for part in (
        f"{(USED + 500_000) / 1e9:.3g} GB",
        "4,000 weights",
        f"num_samples={N}",
        f"{WIDTH}",
        "store='device'",
        "microbatch_size=4",
    ):
        assert part in message
    assert re.search(r"needs [\d.]+ GB of memory for its \w+", message)
    assert needed > USED + 500_000


def test_a_refusal_for_the_disk_names_its_room(monkeypatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda parent: 123_000)
    message = refusal(10**9, store="disk")
    assert f"{STORED / 1e9:.3g} GB for its gradients" in message
    assert "0.000123 GB of disk" in message
    assert ways_out(message)["store"] == "auto"


def test_every_way_out_that_is_named_is_one(monkeypatch) -> None:
    named = set()
    for store, block_size, disk in (
        ("auto", None, 0),
        ("device", 100, 10**15),
        ("disk", 1500, 10**15),
        ("disk", 100, 100_000),
        ("recompute", None, 10**15),
    ):
        monkeypatch.setattr(budget, "free_bytes", lambda parent, free=disk: free)
        options = {"store": store, "block_size": block_size}
        for above in LIMITS[::2]:
            try:
                plan(above, **options)
            except wf.MemoryLimitError as error:
                for name, value in ways_out(str(error)).items():
                    named.add(name)
                    assert plan(above, **(options | {name: value})) is not None
    assert named == {"store", "block_size", "num_samples"}


def test_the_way_out_is_the_nearest_by_halves() -> None:
    above = peaks(plan(store="device", num_samples=25))["curvature"]
    message = refusal(above, store="device")
    assert ways_out(message)["num_samples"] == 25


def test_where_nothing_helps_it_says_so() -> None:
    message = refusal(1000)
    assert "larger machine" in message
    assert not ways_out(message)


def test_fewer_samples_in_larger_chunks_are_no_way_out(monkeypatch) -> None:
    samples = {p: np.ones((129, *s), np.float32) for p, s in SHAPES.items()}
    options = {"samples": samples, "microbatch_size": 64, "store": "device"}
    named = []
    for above in range(4_000_000, 6_000_000, 100_000):
        try:
            plan(above, **options)
        except wf.MemoryLimitError as error:
            number = ways_out(str(error)).get("num_samples")
            if number is not None:
                named.append(number)
                plan(above, **(options | {"num_samples": number}))
    assert named


def test_ways_out_for_blocks_that_grow() -> None:
    masks = {p: jnp.zeros(s, bool).at[:, :20].set(True) for p, s in SHAPES.items()}
    options = {"method": "woodfisherblockdynamic", "masks": masks, "store": "disk"}
    options |= {"block_size": 200, "microbatch_size": 1}
    named = []
    for above in range(300_000, 4_000_000, 50_000):
        try:
            plan(above, **options)
        except wf.MemoryLimitError as error:
            width = ways_out(str(error)).get("block_size")
            if width is not None:
                named.append(width)
                plan(above, **(options | {"block_size": width}))
    assert named


@pytest.mark.xfail(
    strict=True,
    reason="what one example takes is a share of what all take, though the compiler's "
    "room need not grow with the examples",
)
def test_smaller_microbatches_are_no_way_out_where_they_take_no_less() -> None:
    def loss(params, batch):
        # Independent of the examples: formed once, and large.
        spread = jnp.sin(params["w"][:, None] * jnp.arange(1000.0)[:, None, None])
        return jnp.mean(jnp.sum(batch * jnp.sum(jnp.cos(spread), 0), axis=(1, 2)))

    params = {"w": jnp.ones((10, 100))}
    samples = np.ones((N, 10, 100), np.float32)

    def plan_with(above: float, microbatch_size: int):
        return wf.plan_pruning(
            loss,
            params,
            samples,
            sparsity=0.5,
            block_size=WIDTH,
            memory_limit=USED + above,
            microbatch_size=microbatch_size,
        )

    above = peaks(plan_with(10**9, 1))["gradients"] - 1
    with pytest.raises(wf.MemoryLimitError) as caught:
        plan_with(above, N)
    assert "microbatch_size" not in ways_out(str(caught.value))


@pytest.mark.parametrize("method", ["woodfisherblock", "diagfisher"])
def test_smaller_microbatches_are_a_way_out(method) -> None:
    options = {"method": method}
    if method == "diagfisher":
        options["block_size"] = None
    above = 2_000_000
    plan(above, microbatch_size=1, **options)
    message = refusal(above, microbatch_size=N, **options)
    assert "microbatch_size" in ways_out(message)


# ---------------------------------------------------------------------- an accelerator


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    """Pretends that devices have so much memory of their own."""

    def pretend(free: int) -> None:
        monkeypatch.setattr(budget.memory, "device_limit", lambda device: USED + free)
        monkeypatch.setattr(budget.memory, "device_used", lambda device: USED)
        # Blocks are then computed many at a time.
        monkeypatch.setattr(resources, "BATCH_BYTES", 10_000)

    return pretend


def test_an_accelerator_keeps_gradients_in_the_host_s_memory_next(accelerator) -> None:
    found = []
    for free in LIMITS:
        accelerator(free)
        try:
            found.append(plan().store)
        except wf.MemoryLimitError:
            found.append("refused")
    stores = [store for store, _ in itertools.groupby(found)]
    assert stores == ["device", "host", "refused"]


def test_a_host_without_room_passes_them_on_to_disk(accelerator) -> None:
    accelerator(900_000)
    assert plan(STORED).store == "host"
    assert plan(STORED - 1).store == "disk"


def test_without_room_on_host_and_disk_they_are_formed_again(
    accelerator, monkeypatch
) -> None:
    accelerator(1_000_000)
    monkeypatch.setattr(budget, "free_bytes", lambda parent: 0)
    needs = plan(STORED - 1)
    assert needs.store == "recompute"
    assert needs.limit_bytes == USED + 1_000_000


def test_a_refusal_for_the_host_s_memory_speaks_of_it(accelerator) -> None:
    accelerator(10**9)
    message = refusal(STORED - 1, store="host")
    assert "disk" not in message.partition("It fits")[0]


def test_several_accelerators_have_each_their_own_memory() -> None:
    found = []
    for devices in (1, 8):
        room = budget.Budget(
            used=0,
            limit=20_000_000,
            host_used=0,
            host_limit=10**12,
            disk=10**12,
            shared=False,
            devices=devices,
        )
        params = {"w": jnp.ones((200, 100))}
        samples = {"w": np.ones((100, 200, 100), np.float32)}
        settings, _ = check_settings(samples, sparsity=0.5, block_size=100)
        masks = init_masks(params)
        order = flat_order(masks)
        work = resources._gradient_work(
            Partial(inner_product),
            params,
            masks,
            {"w": samples["w"][:1]},
            order,
            settings,
            room,
        )
        part = panels.whole(order, within_tensors(order, 100), 100)
        recompute = settings._replace(store="recompute")
        parts = next(resources._candidates(part, work, recompute, room)).parts
        found.append((work.microbatch_size, len(parts)))
    assert found[0] == found[1]


# ------------------------------------------------------------------ nothing is computed


def test_planning_computes_nothing_and_changes_nothing() -> None:
    ran: list[int] = []

    def told(params, batch):
        jax.debug.callback(lambda: ran.append(1))
        return inner_product(params, batch)

    params = {path: jnp.asarray(np.arange(3000.0).reshape(30, 100)) for path in "a"}
    before = np.array(params["a"])
    samples = {"a": SAMPLES["a"][:3]}
    options = {"sparsity": 0.5, "block_size": 100, "progress": ran.append}
    needs = wf.plan_pruning(told, params, samples, **options)
    jax.effects_barrier()
    assert needs.num_weights == 3000
    assert not ran
    np.testing.assert_array_equal(params["a"], before)


def test_params_may_be_shapes() -> None:
    shapes = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()}
    assert plan(params=shapes) == plan()


def test_the_plan_is_that_of_the_step() -> None:
    options = {
        "sparsity": 0.5,
        "block_size": WIDTH,
        "microbatch_size": 4,
        "memory_limit": 10**12,
    }
    *_, info = wf.prune(inner_product, PARAMS, SAMPLES, **options)
    assert info.needs == plan()


def test_a_limit_of_less_than_a_byte_is_a_limit() -> None:
    with pytest.raises((ValueError, wf.MemoryLimitError)):
        wf.plan_pruning(inner_product, PARAMS, SAMPLES, sparsity=0.5, memory_limit=0.5)


def test_an_endless_limit_is_no_limit() -> None:
    options = {"sparsity": 0.5, "memory_limit": float("inf")}
    assert wf.plan_pruning(inner_product, PARAMS, SAMPLES, **options) is not None


def test_a_loss_that_is_missing_is_asked_for() -> None:
    with pytest.raises((TypeError, ValueError), match="loss_fn"):
        wf.plan_pruning(None, PARAMS, SAMPLES, sparsity=0.5)
