"""Structure taken out: small networks equal masked ones, or are refused by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emptied_mlp import MLP, X, assert_close, compiled_mlp, mlp, without
from hypothesis import given, note, settings
from hypothesis import strategies as st
from random_networks import network
from structure_zoo import FRAMEWORKS, KINDS, made, normal

import woodfisher_jax as wf
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.trees.paths import leaves_by_path

SLOW = pytest.mark.slow
ALL = [
    pytest.param(
        framework,
        kind,
        id=f"{framework}-{kind.replace(' ', '_')}",
        marks=[] if framework == "plain" else SLOW,
    )
    for framework in FRAMEWORKS
    for kind in KINDS
]
SAYS_ITS_SHAPES = {
    *(("linen", kind) for kind in KINDS),
    # The number of groups; statistics that the function holds.
    *((framework, "depthwise") for framework in ("nnx", "equinox")),
    ("equinox", "batch norm"),
}
"""Whose functions do not run with other arrays: refused by ``wf.shrink`` alone."""


def half(found: Structures, seed: int = 0) -> set[int]:
    """A half of each family, by chance."""
    chance = np.random.default_rng(seed)
    return {
        int(unit)
        for family in found.families
        for unit in chance.permutation(family.units)[: len(family.units) // 2]
    }


def masks_of(found: Structures, params, gone: set[int], role: str = "") -> dict:
    """Masks of the weights that make and read structures, or that do one of them."""
    leaves = leaves_by_path(params)
    paths = {
        member.path
        for family in found.families
        for member in family.members
        if member.role and role in (member.role, "")
    }
    return found.masks({p: np.ones(leaves[p].shape, bool) for p in paths}, gone)


def shapes(params) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_a_small_network_equals_the_masked_one(framework: str, kind: str) -> None:
    params, net_fn, inputs = made(framework, kind)
    found = wf.structures(net_fn, params, inputs)
    assert found.number == KINDS[kind].number
    masks = masks_of(found, params, half(found))
    small_fn, small = wf.shrunk(net_fn, params, masks, inputs)
    assert shapes(small) == shapes(made(framework, kind, 1).params)
    assert jax.tree.structure(small) == jax.tree.structure(params)
    if (framework, kind) in SAYS_ITS_SHAPES:
        with pytest.raises(ValueError, match=r"does not run.*wf\.shrunk returns"):
            wf.shrink(net_fn, params, masks, inputs)
    else:
        same = wf.shrink(net_fn, params, masks, inputs)
        assert shapes(same) == shapes(small)
    if framework != "plain":
        # Other inputs, more of them.
        others = jnp.concatenate([inputs[::-1], inputs]) % 7
        wanted = net_fn(wf.apply_masks(params, masks), others)
        assert_close(small_fn(small, others), wanted)


def test_a_layer_that_is_emptied_keeps_one_neuron() -> None:
    masks = {"c": np.zeros((6, 2), bool)}
    small = wf.shrink(mlp, MLP, masks, X)
    assert small["a"].shape == (3, 1)
    masked = wf.apply_masks(MLP, masks)
    np.testing.assert_array_equal(compiled_mlp(small, X), compiled_mlp(masked, X))


def test_a_parameter_that_is_not_finite_is_named() -> None:
    broken = MLP | {"c": np.asarray(MLP["c"]) * np.nan}
    with pytest.raises(ValueError, match=r"NaN or infinity in params\['c'\]"):
        wf.shrink(mlp, broken, {"c": np.ones((6, 2), bool)}, X)


def test_masks_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"masks\['c'\] has shape \(2, 6\)"):
        wf.shrink(mlp, MLP, {"c": np.ones((2, 6), bool)}, X)
    with pytest.raises(ValueError, match="'d'"):
        wf.shrunk(mlp, MLP, {"d": np.ones((2, 6), bool)}, X)


def test_a_loss_with_leaves_of_all_kinds_and_inputs_in_a_dict() -> None:
    """Integers, keys and what is not used stay as they are."""
    params = MLP | {
        "order": jnp.array([1, 0]),
        "unused": normal(0, 6, 6),
        "key": jax.random.key(0),
    }

    def loss(params, batch):
        key, (x, y) = batch["a key"], batch["pairs"]
        outputs = mlp(params, x)[:, params["order"]]
        noise = jax.random.key_data(key)[0]
        return ((outputs - y) ** 2).mean(), {"noisy": outputs + noise}, outputs > 0

    batch = {"a key": jax.random.key(1), "pairs": (X, normal(5, 5, 2))}
    masks = without(MLP, "c", 0, 1, axis=0)
    small = wf.shrink(loss, params, masks, batch)
    assert (small["a"].shape, small["unused"].shape) == ((3, 4), (6, 6))
    assert small["key"] is params["key"]
    small_fn, other = wf.shrunk(loss, params, masks, batch)
    assert shapes(other) == shapes(small)
    tree = jax.tree.structure(jax.eval_shape(small_fn, other, batch))
    assert tree == jax.tree.structure(jax.eval_shape(loss, params, batch))


def test_numbers_of_16_bits_are_compared_as_such() -> None:
    """Equal but for the last bits, where the sum of eight terms has another order."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MLP)
    small = wf.shrink(mlp, params, without(MLP, "a", 1, 4), X.astype(jnp.bfloat16))
    assert small["c"].dtype == jnp.bfloat16


@jax.custom_jvp
def squared(x):
    return x**2


squared.defjvp(lambda x, t: (squared(*x), 2 * x[0] * t[0]))


def test_calls_around_layers_are_walked_through() -> None:
    scale = normal(5, 6)

    def net(params, x):
        inner = jax.checkpoint(lambda x: squared(x @ params["a"]) * scale)
        return jax.vmap(jax.jit(lambda h: h @ params["c"]))(inner(x))

    masks = without(MLP, "c", 2, 5, axis=0)
    small_fn, small = wf.shrunk(net, MLP, masks, X)
    assert small["a"].shape == (3, 4)
    some, masked = np.asarray(X)[:2], wf.apply_masks(MLP, masks)
    assert_close(jax.jit(small_fn)(small, some), jax.jit(net)(masked, some))
    slope = jax.grad(lambda p: small_fn(p, X).sum())
    assert jax.eval_shape(slope, small)["a"].shape == (3, 4)
    with pytest.raises(ValueError, match=r"does not run.*wf\.shrunk returns"):
        wf.shrink(net, MLP, masks, X)


# ------------------------------------------------------------------- networks by chance


EXAMPLE = itertools.count()


def perturbed(found: Structures, params, gone: set[int], seed: int) -> dict:
    """Other numbers in what is taken out, but in the weights that read it."""
    chance, arrays = np.random.default_rng(seed), {}
    for path, leaf in leaves_by_path(params).items():
        keep = found.masks({path: np.ones(leaf.shape, bool)}, gone)[path]
        arrays[path] = np.where(keep, leaf, chance.normal(size=leaf.shape))
    readers = masks_of(found, params, gone, "inputs")
    return {
        path: jnp.asarray(np.where(readers.get(path, True), array, 0), jnp.float32)
        for path, array in arrays.items()
    }


@SLOW
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(0, 100))
def test_any_small_network_equals_the_masked_one(chance, seed) -> None:
    if next(EXAMPLE) % 20 == 19:
        jax.clear_caches()  # some thousand programs in one process end it
    params, net_fn, x, kinds = network(chance)
    note(str(kinds))
    found = structures(net_fn, params, x)
    gone = half(found, seed)
    if not gone:
        return
    masks = masks_of(found, params, gone)
    small_fn, small = wf.shrunk(net_fn, params, masks, x)
    size = sum(leaf.size for leaf in small.values())
    assert size < found.size
    # No output depends on what is taken out, if those that read it are zero.
    other = perturbed(found, params, gone, seed)
    readers = wf.apply_masks(params, masks_of(found, params, gone, "inputs"))
    with jax.default_matmul_precision("highest"):  # compiled already
        whole, x = jax.jit(net_fn), 2 - x
        wanted = whole(wf.apply_masks(params, masks), x)
        assert_close(jax.jit(small_fn)(small, x), wanted)
        assert_close(whole(other, x), whole(readers, x))


@pytest.mark.parametrize(("zero", "left"), [("g", 8), ("u", 8), ("gu", 4)])
def test_a_gate_goes_with_what_it_multiplies(zero: str, left: int) -> None:
    params = {"g": normal(0, 5, 8), "u": normal(1, 5, 8), "d": normal(2, 8, 3)}
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in params.items()}
    for path in zero:
        masks[path][:, :4] = False

    def net(params, x):
        return (jax.nn.silu(x @ params["g"]) * (x @ params["u"])) @ params["d"]

    params = wf.apply_masks(params, masks)
    _, small = wf.shrunk(net, params, masks, normal(3, 10, 5))
    assert small["d"].shape == (left, 3)


@pytest.mark.parametrize("function", [wf.shrink, wf.shrunk])
def test_arguments_in_another_order_are_named(function) -> None:
    masks = {"c": np.ones((6, 4), bool)}
    params, x = {"a": np.ones((3, 6)), "c": np.ones((6, 4))}, np.ones((5, 3))

    def net(params, x):
        return jnp.tanh(x @ params["a"]) @ params["c"]

    for arguments, message in (
        ((params, net, masks, x), "net_fn is of type dict; expected a function"),
        ((net, masks, params, x), "params has booleans alone, as masks have; expected"),
        ((net, params, x, masks), "masks has dtype float64; expected bool"),
        (
            (net, x, masks, params),
            "names 'c', which is not in params: that is a single",
        ),
        ((net, params, {"c": None}, x), r"masks={'c': None} has no mask, .*'a', 'c'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(*arguments)


def test_the_caller_s_arrays_stay_as_they_are() -> None:
    """Arrays of float64 could be changed where they are."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 6)), "ba": np.ones(6)}
    params |= {"c": rng.normal(size=(6, 4)), "b": np.zeros(4)}
    masks = {"a": np.ones((3, 6), bool)}
    masks["a"][:, 1] = False

    def net(params, x):
        h = jax.nn.relu(x @ params["a"] + params["ba"])
        return h @ params["c"] + params["b"]

    x = rng.normal(size=(5, 3)).astype(np.float32)
    small = wf.shrink(net, params, masks, x)
    np.testing.assert_array_equal(params["b"], 0.0)
    np.testing.assert_allclose(small["b"], params["c"][1], rtol=1e-6)
    whole = wf.shrink(net, params, {"a": np.ones((3, 6), bool)}, x)
    for leaf in jax.tree.leaves((small, whole)):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.float32


def fan_in(params, x):
    """The number of inputs of its second layer is in the code."""
    h = jax.nn.relu(x @ params["a"])
    return h @ params["c"] / np.sqrt(params["c"].shape[0])


def masked_scores(params, x):
    """Two outputs that say nothing, as of a vocabulary that is padded."""
    return jnp.concatenate([fan_in(params, x), jnp.full((len(x), 2), -1e9)], 1)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (fan_in, X),
        (masked_scores, X),
        (fan_in, jnp.zeros((1, 3))),
        # A neuron that is dead on all of them is the one that stays.
        (fan_in, jnp.array([[1.0, 0.0, 0.0]])),
    ],
    ids=["ordinary", "masked scores", "zeros", "dead"],
)
def test_silent_outputs_hide_no_difference(net, x) -> None:
    params = {"a": MLP["a"].at[0, 0].set(-1.0), "c": MLP["c"]}
    masks = without(params, "c", *range(1, 6), axis=0)
    with pytest.raises(ValueError, match=r"changes outputs by .*; wf\.shrunk returns"):
        wf.shrink(net, params, masks, x)
    function, small = wf.shrunk(net, params, masks, x)
    assert small["a"].shape == (3, 1)
    assert_close(function(small, X), net(wf.apply_masks(params, masks), X))


def test_a_function_made_smaller_takes_numbers_of_any_type() -> None:
    masks = without(MLP, "c", 1, 4, axis=0)
    function, small = wf.shrunk(mlp, MLP, masks, X)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)  # noqa: E731
    outputs = function(half(small), half(X))
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, mlp(half(small), half(X)))
    message = r"params has \(3, 6\) at 'a', expected \(3, 4\): the second result of"
    with pytest.raises(ValueError, match=message):
        function(MLP, X)
    with pytest.raises(ValueError, match=r"params has nothing at 'q', expected \(2,\)"):
        function({name: small[name] for name in "apc"}, X)
