"""What structures that nothing makes contribute is folded, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emptied_mlp import MLP, X, assert_close, compiled_mlp, mlp, without
from structure_zoo import made, normal

import woodfisher_jax as wf


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


def test_what_an_array_of_the_function_reads_is_named() -> None:
    """No mask of a weight empties that array."""
    fixed = normal(7, 6, 4)

    def net(params, x):
        h = jnp.tanh(x @ params["a"] + params["p"]) @ fixed
        return jax.nn.relu(h) @ params["c"][:4]

    message = r"\['a'\] have.*; expected the array that reads \['a'\] as part of params"
    with pytest.raises(ValueError, match=message):
        wf.shrunk(net, MLP, without(MLP, "a", 1), X)
