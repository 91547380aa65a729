"""Structure taken out: small networks equal masked ones, or are refused by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def assert_close(outputs, wanted) -> None:
    largest = np.max(np.abs(wanted))
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-5 * largest)


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


# --------------------------------------------------------------------- what is constant


def mlp(params, x):
    return jnp.tanh(x @ params["a"] + params["p"]) @ params["c"] + params["q"]


compiled_mlp = jax.jit(mlp)

MLP = {
    "a": normal(0, 3, 6),
    "p": normal(1, 6),
    "c": normal(2, 6, 2),
    "q": normal(3, 2),
}
X = normal(4, 5, 3)


def without(params, path: str, *entries: int, axis: int = -1) -> dict:
    """A mask of a tensor that empties some entries along an axis."""
    mask = np.ones(params[path].shape, bool)
    np.moveaxis(mask, axis, 0)[[*entries]] = False
    return {path: mask}


def test_a_neuron_that_is_not_made_leaves_its_constant_in_the_next_bias() -> None:
    masks = without(MLP, "a", 1, 4)
    small = wf.shrink(mlp, MLP, masks, X)
    assert small["a"].shape == (3, 4)
    others = normal(9, 7, 3)
    masked = wf.apply_masks(MLP, masks)
    assert_close(compiled_mlp(small, others), compiled_mlp(masked, others))
    assert np.max(np.abs(small["q"] - MLP["q"])) > 0.01


def images(params, x, padding: str):
    """A convolution, a norm and another, the second on the left of its product."""
    x = jax.nn.relu(jnp.einsum("bhwi,io->bhwo", x, params["a"]) * params["s"])
    x = jax.nn.relu(x + params["b"])
    x = jax.lax.conv_general_dilated(
        x, params["k"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.einsum("oi,bhwi->bhwo", params["c"], x + params["q"])


IMAGES = {
    "a": normal(0, 3, 4),
    "s": normal(1, 4),
    "b": 1 + normal(2, 4) ** 2,
    "k": normal(3, 2, 2, 4, 5),
    "q": normal(4, 5),
    "c": normal(5, 2, 5),
}


def test_a_border_that_is_padded_has_no_constant() -> None:
    x, masks = normal(6, 2, 4, 4, 3), without(IMAGES, "a", 0, 2)
    small = wf.shrink(lambda p, x: images(p, x, "VALID"), IMAGES, masks, x)
    assert small["k"].shape == (2, 2, 2, 5)
    with pytest.raises(ValueError, match=r"\['a'\] have outputs.*from place to place"):
        wf.shrink(lambda p, x: images(p, x, "SAME"), IMAGES, masks, x)
    # Nothing but zeros goes over the border.
    zeros = IMAGES | {"b": jnp.zeros(4)}
    same = wf.shrink(lambda p, x: images(p, x, "SAME"), zeros, masks, x)
    assert same["k"].shape == (2, 2, 2, 5)


def test_a_constant_that_no_bias_takes_is_refused() -> None:
    def net(params, x):
        return jnp.tanh(x @ params["a"] + params["p"]) @ params["c"]

    params = {name: MLP[name] for name in "apc"}
    with pytest.raises(ValueError, match=r"\['a'\] have outputs.*has no bias"):
        wf.shrink(net, params, without(MLP, "a", 1), X)


NORM = {
    "a": normal(0, 3, 6),
    "p": normal(1, 6),
    "m": normal(2, 6, 4),
    "mean": normal(3, 4),
    "var": 1 + normal(4, 4) ** 2,
    "scale": normal(5, 4),
    "bias": normal(6, 4),
    "c": normal(7, 4, 2),
}


def normed(params, x, skip: float = 0.0):
    """A layer without a bias, and a batch norm in evaluation mode."""
    y = jnp.tanh(x @ params["a"] + params["p"]) @ params["m"]
    z = (y - params["mean"]) * jax.lax.rsqrt(params["var"] + 1e-5) * params["scale"]
    z = z + params["bias"]
    return jax.nn.relu(z + skip * y if skip else z) @ params["c"]


def test_a_constant_goes_into_the_mean_of_the_batch_norm_that_follows() -> None:
    masks = without(NORM, "a", 1, 4)
    small = wf.shrink(normed, NORM, masks, X)
    assert small["m"].shape == (4, 4)
    others = normal(9, 7, 3)
    assert_close(normed(small, others), normed(wf.apply_masks(NORM, masks), others))
    assert np.max(np.abs(small["mean"] - NORM["mean"])) > 0.01
    np.testing.assert_array_equal(small["bias"], NORM["bias"])


@pytest.mark.parametrize(
    "skip",
    [
        lambda y: y,
        lambda y: 1e-9 * y.reshape(-1, 2, 2),
        lambda y: 1e-9 * jax.jit(jnp.sin)(y.T),
        lambda y: 1e-9 * y @ jnp.eye(4),
    ],
)
def test_a_layer_that_is_read_without_its_bias_takes_no_constant(skip) -> None:
    """Whatever the batch shows: it is the program that says so."""

    def biased(params, x):
        y = jnp.tanh(x @ params["a"] + params["p"]) @ params["m"]
        return jax.nn.relu(y + params["bias"]) @ params["c"], skip(y)

    message = "'bias', but the output of that layer is read without it as well, as by"
    with pytest.raises(ValueError, match=message):
        wf.shrink(biased, NORM, without(NORM, "a", 1, 4), X)
    message = "numbers to be added to 'mean', but the output"
    with pytest.raises(ValueError, match=message):
        wf.shrink(lambda p, x: normed(p, x, 1e-9), NORM, without(NORM, "a", 1), X)


@pytest.mark.parametrize(
    "again",
    [
        lambda y, q: y + q,
        lambda y, q: y * jax.nn.sigmoid(q),
        lambda y, q: jnp.tanh(y) - q,
    ],
)
def test_a_bias_that_is_read_in_several_places_takes_no_constant(again) -> None:
    def net(params, x):
        return again(mlp(params, x), params["q"])

    message = "numbers to be added to 'q', which is read in several places; expected"
    with pytest.raises(ValueError, match=message):
        wf.shrink(net, MLP, without(MLP, "a", 1), X)
    # What nothing reads needs no bias.
    assert wf.shrink(net, MLP, without(MLP, "c", 1, axis=0), X)["a"].shape == (3, 5)


def test_one_example_does_not_make_a_constant() -> None:
    def net(params, x):
        h = (x @ params["a"] + params["p"]) * x.sum(-1, keepdims=True)
        return h @ params["c"] + params["q"]

    with pytest.raises(ValueError, match="or with the inputs"):
        wf.shrink(net, MLP, without(MLP, "a", 1), X[:1])


def test_what_is_read_in_a_loop_is_folded_if_it_is_nothing() -> None:
    net_fn, x = made("plain", "stacked by scan").net_fn, normal(1, 2, 5, 6)
    params = made("plain", "stacked by scan").params["stack"]
    net = lambda p, x: net_fn({"stack": p}, x)  # noqa: E731
    small = wf.shrink(net, params, without(params, "up", 3), x)
    assert small["down"].shape == (2, 7, 6)


# ------------------------------------------------------------- what users come with


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


def test_what_a_gate_closes_on_the_given_inputs_alone_is_refused() -> None:
    def net(params, batch):
        h = jax.nn.relu(batch["x"] @ params["a"] + params["b"])
        return jnp.where(batch["open"], h, 0) @ params["c"] + params["d"]

    shapes = {"a": (4, 6), "b": (6,), "c": (6, 3), "d": (3,)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    masks = {"a": jnp.ones((4, 6), bool).at[:, :3].set(False)}
    closed = {"x": jnp.ones((5, 4)), "open": jnp.zeros((5, 1), bool)}
    with pytest.raises(ValueError, match="differs from place to place or with"):
        wf.shrink(net, params, masks, closed)


def looked_up(params, inputs):
    x, kind = inputs
    h = jax.nn.relu(x @ params["a"] + params["t"][kind])
    return h @ params["c"] + params["b"]


def one_of_a_table(params, inputs):
    x, kind = inputs
    row = jax.lax.dynamic_index_in_dim(params["t"], kind[0], keepdims=False)
    return jax.nn.relu(x @ params["a"] + row) @ params["c"] + params["b"]


def weighted(params, inputs):
    x, kind = inputs
    h = jax.nn.relu(x @ params["a"] + 1.0)
    return jnp.einsum("bn,b->bn", h, 1.0 * kind) @ params["c"] + params["b"]


@pytest.mark.parametrize("net", [looked_up, one_of_a_table, weighted])
def test_what_the_inputs_choose_is_no_constant_whatever_the_batch_holds(net) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "t": (2, 6), "c": (6, 4), "b": (4,)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    masks = {"a": np.ones((3, 6), bool)}
    masks["a"][:, 1] = False
    x = rng.standard_normal((5, 3)).astype(np.float32), np.zeros(5, np.int32)
    with pytest.raises(ValueError, match="differ"):
        wf.shrink(net, params, masks, x)


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
