"""An optimizer that is masked keeps pruned weights at zero in any training loop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal
from flax import nnx
from flax.training.train_state import TrainState

import woodfisher_jax as wf
from woodfisher_jax.masked import MaskedState, mask_state
from woodfisher_jax.trees.paths import leaves_by_path

ROOT = Path(__file__).parents[1]
MASK = np.array([[True, False, True], [False, True, True]])
OTHER = np.array([[True, False, False], [False, False, True]])
PATH = "a/kernel"


def params_of(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "a": {"kernel": rng.standard_normal((2, 3)), "bias": np.ones(3)},
        # Of the same name and shape: no mask is theirs.
        "kernel": rng.standard_normal((2, 3)),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def step_of(tx: Any, traces: list | None = None) -> Any:
    """A training step; it notes each time that it is traced."""

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        if traces is not None:
            traces.append(1)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_zero(params: Any, state: Any, mask: np.ndarray) -> None:
    """The weights and whatever the optimizer keeps for each of them."""
    assert not np.asarray(params["a"]["kernel"])[~mask].any()
    inner = jax.tree.map(
        lambda s: s.inner_state if isinstance(s, MaskedState) else s,
        state,
        is_leaf=lambda s: isinstance(s, MaskedState),
    )
    for path, leaf in leaves_by_path(inner).items():
        if path.endswith(PATH):
            assert not np.asarray(leaf)[~mask].any(), path


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1),
    "adabelief": optax.adabelief(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "decayed": optax.chain(
        optax.add_decayed_weights(0.1, {"a": True, "kernel": False}), optax.sgd(0.1)
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "lamb": optax.lamb(0.1),
    "parts": optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"a": "x", "kernel": "y"}
    ),
    "schedule free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 2),
}
QUICK = ("adamw", "parts", "accumulated")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name in OPTIMIZERS
    ],
)
def test_pruned_weights_and_what_is_kept_of_them_are_zero(name: str) -> None:
    tx = wf.masked(OPTIMIZERS[name], {PATH: jnp.ones((2, 3), bool)})
    params, traces = params_of(), []
    step = step_of(tx, traces)
    state = tx.init(params)
    before = params
    for number in range(6):
        if number == 2:
            params, state = wf.with_masks(params, state, {PATH: jnp.asarray(MASK)})
            assert_zero(params, state, MASK)
        params, state = step(params, state, params_of(number))
        if number >= 2:
            assert_zero(params, state, MASK)
    moved = params["a"]["kernel"] != before["a"]["kernel"]
    assert np.asarray(moved)[MASK].all()
    assert np.asarray(params["kernel"] != before["kernel"]).all()
    # New masks are values: nothing was compiled anew for them.
    assert len(traces) == 1


def few(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """All but the pruned, which are taken out of their tensor."""
    kernel = np.asarray(tree["a"]["kernel"])[MASK]
    return {"a": kernel, "b": tree["a"]["bias"], "c": tree["kernel"]}


@pytest.mark.parametrize("name", ["sgd", "adamw", "clipped"])
def test_kept_weights_are_trained_as_if_they_were_alone(name: str) -> None:
    """The optimizer of a vector of the kept weights is the oracle."""
    tx = wf.masked(OPTIMIZERS[name], {PATH: jnp.asarray(MASK)})
    params = params_of()
    alone = few(params)
    state, alone_state = tx.init(params), OPTIMIZERS[name].init(alone)
    step, alone_step = step_of(tx), step_of(OPTIMIZERS[name])
    for number in range(4):
        g = params_of(number + 5)
        params, state = step(params, state, g)
        alone, alone_state = alone_step(alone, alone_state, few(g))
    for name, leaf in few(params).items():
        np.testing.assert_allclose(leaf, alone[name], rtol=1e-5)


def test_without_masks_nothing_changes() -> None:
    tx = optax.adam(0.1)
    full = wf.masked(tx, {PATH: jnp.ones((2, 3), bool)})
    params, other = params_of(), params_of()
    state, other_state = tx.init(params), full.init(params)
    step, other_step = step_of(tx), step_of(full)
    for number in range(3):
        params, state = step(params, state, params_of(number))
        other, other_state = other_step(other, other_state, params_of(number))
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_that_is_not_zero_yet_is_after_the_step(dtype: Any) -> None:
    tx = wf.masked(optax.sgd(0.1), {PATH: jnp.asarray(MASK)})
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of())
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(1))
    params, _ = step_of(tx)(params, tx.init(params), gradients)
    assert params["a"]["kernel"].dtype == dtype
    assert not np.asarray(params["a"]["kernel"], np.float32)[~MASK].any()


def test_what_is_pruned_is_zero_to_the_optimizer() -> None:
    """Of lamb, whose rate is the norm of the weights."""
    tx = wf.masked(optax.lamb(0.1), {PATH: jnp.asarray(MASK)})
    params, gradients = params_of(), params_of(1)
    clean = wf.apply_masks(params, {PATH: MASK})
    step = jax.jit(tx.update)
    one, _ = step(gradients, tx.init(params), params)
    two, _ = step(gradients, tx.init(params), clean)
    kept = [np.asarray(u["a"]["kernel"])[MASK] for u in (one, two)]
    np.testing.assert_array_equal(*kept)


def test_a_gradient_that_is_not_finite_stays_out() -> None:
    tx = wf.masked(optax.adam(0.1), {PATH: jnp.asarray(MASK)})
    params = params_of()
    gradients = params_of(1)
    gradients["a"]["kernel"] = jnp.where(MASK, 1.0, jnp.nan)
    params, state = step_of(tx)(params, tx.init(params), gradients)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params))
    np.testing.assert_array_equal(updates["a"]["kernel"] == 0, ~MASK)


@pytest.mark.parametrize("outside", [True, False])
def test_with_multisteps_inside_and_around(outside: bool) -> None:
    """Two half batches and one whole one lead to the same weights."""
    masks = {PATH: jnp.asarray(MASK)}
    whole = wf.masked(optax.adam(0.1), masks)
    halves: Any
    if outside:
        halves = optax.MultiSteps(wf.masked(optax.adam(0.1), masks), 2)
    else:
        halves = wf.masked(optax.MultiSteps(optax.adam(0.1), 2), masks)
    params = other = wf.apply_masks(params_of(), masks)
    state, halves_state = whole.init(params), halves.init(params)
    step, half_step = step_of(whole), step_of(halves)
    for number in range(4):
        parts = [params_of(2 * number), params_of(2 * number + 1)]
        mean = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, *parts)
        params, state = step(params, state, mean)
        for part in parts:
            other, halves_state = half_step(other, halves_state, part)
        if number == 1:
            new = {PATH: jnp.asarray(OTHER)}
            params, state = wf.with_masks(params, state, new)
            other, halves_state = wf.with_masks(other, halves_state, new)
    assert not np.asarray(other["a"]["kernel"])[~OTHER].any()
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(wf.masks_of(halves_state)[PATH], OTHER)


def test_the_state_may_be_donated() -> None:
    masks = {PATH: jnp.asarray(MASK)}
    tx = wf.masked(optax.adam(0.1), masks)
    params = params_of()

    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    state = tx.init(params)
    for number in range(2):
        params, state = step(params, state, params_of(number))
    np.testing.assert_array_equal(masks[PATH], MASK)
    np.testing.assert_array_equal(wf.masks_of(state)[PATH], MASK)


def test_optax_finds_the_parameters_in_the_state() -> None:
    """As users do to lay the state out over devices."""
    tx = wf.masked(optax.adam(0.1), {PATH: jnp.asarray(MASK)})
    params = params_of()
    specs = jax.tree.map(lambda _: "spec", params)
    found = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(params),
        specs,
        transform_non_params=lambda _: "other",
    )
    assert found.inner_state[0].mu == specs
    assert found.masks == {PATH: "other"}


def test_the_three_lines_in_a_loop_of_ones_own() -> None:
    """A TrainState of Flax, whose step knows nothing of masks."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 12)).astype(np.float32)
    y = np.argmax(x @ rng.standard_normal((12, 4)), -1)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = jnp.tanh(x @ params["hidden"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = {
        "hidden": jnp.float32(rng.standard_normal((12, 10)) / 3),
        "out": jnp.float32(rng.standard_normal((10, 4)) / 3),
    }
    tx = wf.masked(optax.adam(0.02), wf.init_masks(params))
    levels = dict(wf.gradual(start=5, end=13, frequency=4, initial=0.3, target=0.8))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    traces = []

    @jax.jit
    def train_step(state: TrainState) -> tuple[jax.Array, TrainState]:
        traces.append(1)
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, (x, y))
        return loss, state.apply_gradients(grads=gradients)

    sparsities, losses = [], []
    for step in range(30):
        if step in levels:
            params, opt_state, info = wf.prune_masked(
                loss_fn,
                state.params,
                state.opt_state,
                (x, y),
                sparsity=levels[step],
                method="diagfisher",
            )
            state = state.replace(params=params, opt_state=opt_state)
            assert info.nonzero == sum(map(np.count_nonzero, params.values()))
        loss, state = train_step(state)
        losses.append(float(loss))
        kept = sum(map(np.count_nonzero, state.params.values()))
        sparsities.append(round(1 - kept / 160, 4))
    steps = [0.0] * 5 + [0.3] * 4 + [0.7375] * 4 + [0.8] * 17
    np.testing.assert_allclose(sparsities, steps, atol=1 / 160)
    assert sparsities[-1] == 0.8
    assert losses[-1] < losses[13]
    assert len(traces) == 1
    # Nested: what was pruned first is pruned still.
    assert wf.sparsity(wf.masks_of(state.opt_state)) == pytest.approx(0.8)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import woodfisher_jax as wf

mesh = Mesh(np.asarray(jax.devices()), ("d",))
rows = NamedSharding(mesh, PartitionSpec("d"))
x = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1) ** 2)


def run(place):
    rng = np.random.default_rng(1)
    params = {
        "w": place(rng.standard_normal((16, 8)).astype(np.float32)),
        "v": place(rng.standard_normal((8, 8)).astype(np.float32)),
    }
    tx = wf.masked(optax.adam(0.01), wf.init_masks(params))
    state = tx.init(params)

    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(6):
        if number in (2, 4):
            # The first step puts Adam's count on all devices; so two traces till here.
            before = len(traces)
            params, state, _ = wf.prune_masked(
                None, params, state, sparsity=0.1 * (number + 4), method="globalmagni"
            )
        params, state = step(params, state)
    assert len(traces) == before, (before, len(traces))
    return params, state


params, state = run(lambda a: jax.device_put(a, rows))
for leaf in jax.tree.leaves((params, state.inner_state[0].mu, state.masks)):
    assert leaf.sharding == rows, leaf.sharding
for path, mask in state.masks.items():
    for tree in (params, state.inner_state[0].mu, state.inner_state[0].nu):
        assert not np.asarray(tree[path])[~np.asarray(mask)].any()
assert wf.sparsity(state.masks) == 1 - np.floor(192 * 0.2 + 1e-6) / 192
alone, _ = run(jnp.asarray)
for path, leaf in alone.items():
    np.testing.assert_allclose(leaf, params[path], rtol=1e-4, atol=1e-6)
print("agree")
"""


@pytest.mark.slow
def test_a_state_that_is_spread_over_eight_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + " --xla_force_host_platform_device_count=8",
        },
    )
    assert done.stdout == "agree\n", done.stderr


def test_what_a_bare_array_and_a_list_leave_behind() -> None:
    for params, path in ((jnp.ones((2, 3)), ""), ([jnp.ones(2), jnp.ones((2, 3))], 1)):
        masks = {str(path): jnp.asarray(MASK)}
        tx = optax.adam(0.1)
        _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
        cleared = mask_state(state, params, masks)[0]
        for tree in (cleared.mu, cleared.nu):
            leaf = tree if path == "" else tree[1]
            np.testing.assert_array_equal(leaf != 0, MASK)
        assert int(cleared.count) == 1


def test_bad_masks_and_states_are_refused() -> None:
    params, full = params_of(), {PATH: jnp.ones((2, 3), bool)}
    for masks, error, words in (
        ({"b": jnp.ones(3, bool)}, ValueError, "names 'b'"),
        ({PATH: jnp.ones((3, 2), bool)}, ValueError, r"shape \(3, 2\)"),
        ({PATH: jnp.ones((2, 3))}, TypeError, "dtype float32"),
        ({}, ValueError, "masks={} has no mask"),
    ):
        with pytest.raises(error, match=words):
            wf.masked(optax.sgd(0.1), masks).init(params)
        state = wf.masked(optax.sgd(0.1), full).init(params)
        with pytest.raises(error, match=words):
            wf.with_masks(params, state, masks)
    with pytest.raises(ValueError, match=r"found 0; wrap the whole optimizer"):
        wf.masks_of(optax.adam(0.1).init(params))
    twice = optax.chain(*[wf.masked(optax.sgd(0.1), full) for _ in range(2)])
    with pytest.raises(ValueError, match="found 2"):
        wf.masks_of(twice.init(params))
    more = full | {"kernel": jnp.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=r"expected those of \['a/kernel'\].*'kernel'"):
        wf.with_masks(params, state, more)
    for name in ("masks", "prunable"):
        with pytest.raises(ValueError, match=f"{name}: the masks are those in opt_st"):
            wf.prune_masked(None, params, state, sparsity=0.5, **{name: full})


# ---------------------------------------------------- forms of optimizers and of masks


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("as_tree", [False, True])
def test_the_optimizer_of_nnx(as_tree: bool) -> None:
    """Its init has variables with a ``value``, its update their arrays alone."""
    net, x = Net(nnx.Rngs(0)), normal(0, 8, 3)

    def loss_of_net(net: Net, x: jax.Array) -> jax.Array:
        return jnp.mean((net(x) - 1) ** 2)

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer) -> None:
        optimizer.update(net, nnx.grad(loss_of_net)(net, x))

    def train() -> None:
        for _ in range(2):
            step(net, optimizer)

    params = nnx.state(net, nnx.Param)
    masks = wf.init_masks(params)
    masks["first/kernel/value"] = jnp.asarray(np.arange(12).reshape(3, 4) % 2 == 0)
    given = nnx.as_pure(wf.masks_tree(params, masks)) if as_tree else masks
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer = nnx.Optimizer(net, wf.masked(tx, given), wrt=nnx.Param)
    train()
    np.testing.assert_array_equal(
        net.first.kernel[...] != 0, masks["first/kernel/value"]
    )
    assert net.last.kernel[...].all()
    params, optimizer.opt_state, info = wf.prune_masked(
        None,
        nnx.state(net, nnx.Param),
        optimizer.opt_state,
        sparsity=0.6,
        method="globalmagni",
    )
    nnx.update(net, params)
    train()
    found = wf.masks_of(optimizer.opt_state)
    assert found.keys() == masks.keys()
    assert wf.sparsity(found) == info.sparsity == 0.6
    for layer, name in ((net.first, "first"), (net.last, "last")):
        mask = found[f"{name}/kernel/value"]
        np.testing.assert_array_equal(layer.kernel[...] != 0, mask)
        moment = nnx.as_pure(optimizer.opt_state).inner_state[0].trace[name]["kernel"]
        assert not moment[~mask].any()
        assert moment[mask].all()


def test_flattened_moments_of_pruned_weights_are_zero() -> None:
    params, masks = params_of(), {PATH: jnp.asarray(MASK)}
    for inner in (optax.adam(0.1), optax.MultiSteps(optax.adam(0.1), 2)):
        tx = wf.masked(optax.flatten(inner), wf.init_masks(params, PATH))
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            _, state = update(params, state, params)
        _, state = wf.with_masks(params, state, masks)
        flat = [leaf for leaf in jax.tree.leaves(state.inner_state) if leaf.ndim == 1]
        assert len(flat) in (2, 3)
        for leaf in flat:  # 3 of bias, 6 of a/kernel, 6 of kernel
            np.testing.assert_array_equal(leaf[3:9] != 0, MASK.ravel() * leaf.any())
            assert leaf.any() == leaf[:3].all() == leaf[9:].all()


def test_gradients_of_past_steps_are_zero_for_pruned_weights() -> None:
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    tx = wf.masked(optax.scale_by_lbfgs(4), wf.init_masks(params))
    state, update = tx.init(params), jax.jit(tx.update)
    for scale in (1.0, 2.0, 3.0):
        gradients = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)
        _, state = update(gradients, state, params)
    _, state = wf.with_masks(params, state, {PATH: jnp.asarray(MASK)})
    memory = state.inner_state.diff_updates_memory["a"]["kernel"]
    assert memory.shape == (4, 2, 3)
    np.testing.assert_array_equal(memory.any(axis=0), MASK)


def preconditioned() -> optax.GradientTransformation:
    """A factor of Shampoo's kind has the shape of a square tensor."""

    def init(params: Any) -> Any:
        return {"left": jax.tree.map(lambda leaf: jnp.eye(len(leaf)), params)}

    return optax.GradientTransformation(init, lambda g, state, params=None: (g, state))


@pytest.mark.parametrize(
    ("tx", "path"),
    [
        (preconditioned(), "left/a"),
        (
            optax.partition(
                {"x": optax.flatten(optax.adam(0.1)), "y": optax.sgd(0.1)},
                {"a": "x", "b": "x", "c": "y"},
            ),
            "mu",
        ),
        (optax.masked(optax.flatten(optax.adam(0.1)), {"a": 1, "b": 1, "c": 0}), "mu"),
    ],
)
def test_a_state_that_mixes_weights_is_refused(tx: Any, path: str) -> None:
    params = {name: jnp.ones((4, 4)) for name in "abc"}
    with pytest.raises(ValueError, match=f"tx: its state .*{path}.*mixes weights"):
        wf.masked(tx, wf.init_masks(params)).init(params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
        optax.sm3(0.1),
        optax.contrib.prodigy(),
        optax.contrib.muon(0.1),
    ],
)
def test_a_state_of_other_shapes_is_taken(tx: Any) -> None:
    params = params_of()
    masked = wf.masked(tx, {PATH: jnp.asarray(MASK)})
    updates, state = jax.jit(masked.update)(params, masked.init(params), params)
    assert_zero(optax.apply_updates(params, updates), state.masks, MASK)
