"""Inputs that are no batch of the network are named, not what JAX makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.rows.inputs import check_targets

PARAMS = {"a": np.ones((3, 5), np.float32), "c": np.ones((5, 2), np.float32)}
MASKS = {"c": jnp.ones((5, 2), bool).at[1].set(False)}
ROWS = np.ones((6, 3), np.float32)


def net(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["c"]


CALLS = {
    "prune_layerwise": lambda net, x: wf.prune_layerwise(net, PARAMS, x, sparsity=0.5),
    "prune_outputs": lambda net, x: wf.prune_outputs(net, PARAMS, x, sparsity=0.5),
    "structures": lambda net, x: wf.structures(net, PARAMS, x),
    "shrink": lambda net, x: wf.shrink(net, PARAMS, MASKS, x),
    "shrunk": lambda net, x: wf.shrunk(net, PARAMS, MASKS, x),
}


def loss_of(net):
    return lambda params, x: jnp.mean(net(params, x) ** 2)


OF_SAMPLES = {
    "prune": lambda net, x: wf.prune(loss_of(net), PARAMS, x, sparsity=0.5),
    "plan_pruning": lambda net, x: wf.plan_pruning(
        loss_of(net), PARAMS, x, sparsity=0.5
    ),
    "prune_searched": lambda net, x: wf.prune_searched(
        loss_of(net), PARAMS, x, x, sparsity=0.5
    ),
    "prune_matched": lambda net, x: wf.prune_matched(
        lambda number, params: wf.matching.Stage(net, x, ROWS), PARAMS, sparsity=0.5
    ),
    "find_axes": lambda net, x: wf.find_axes(net, PARAMS, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_network_that_is_no_function_is_named(name: str) -> None:
    with pytest.raises(wf.OptionError, match="net_fn is of type dict; expected a func"):
        CALLS[name](PARAMS, ROWS)


@pytest.mark.parametrize("function", [wf.prune_layerwise, wf.prune_outputs, wf.prune])
def test_params_that_are_no_arrays_are_named(function) -> None:
    for given in ({}, None):
        with pytest.raises(wf.OptionError, match=r"params, of type \w+, has no arrays"):
            function(net, given, ROWS, sparsity=0.5)
    with pytest.raises(TypeError, match=r"params\['n'\] has type float"):
        function(net, PARAMS | {"n": 1.0}, ROWS, sparsity=0.5)
    with pytest.raises(TypeError, match=r"\['a/0/0'\] .*weights arrays, as by np.asa"):
        function(net, {"a": [[0.5, 1.0]]}, ROWS, sparsity=0.5)
    with pytest.raises(TypeError, match=r"has type function; .* eqx.partition\(model"):
        function(net, PARAMS | {"n": lambda x: x}, ROWS, sparsity=0.5)
    small = PARAMS | {"a": np.ones((3, 5), np.int8)}
    with pytest.raises(TypeError, match=r"type int8; .*quantized weights by their sca"):
        function(net, small, ROWS, sparsity=0.5)


def test_a_loss_that_is_no_function_is_named() -> None:
    with pytest.raises(wf.OptionError, match="loss_fn is of type dict; expected a fun"):
        wf.prune(PARAMS, net, ROWS, sparsity=0.5)


def test_axes_are_found_beside_numbers_that_are_no_arrays() -> None:
    found = wf.find_axes(lambda p, x: net(p, x) * p["n"], PARAMS | {"n": 1.0}, ROWS)
    assert found.keys() == PARAMS.keys()


def test_masks_of_no_structure_are_no_riddle() -> None:
    with pytest.raises(ValueError, match="masks is a single array, which is not in"):
        wf.shrink(net, PARAMS, np.ones((2, 2), bool), ROWS)


# The others read shapes alone.
DRIVERS = (CALLS | OF_SAMPLES).keys() - {"structures", "find_axes"}


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_under_jit_a_driver_says_its_name(name: str) -> None:
    def traced(x):
        (CALLS | OF_SAMPLES)[name](net, x)
        return 0

    message = rf"^wf\.{name} cannot run under jit.*call it outside"
    with pytest.raises(TypeError, match=message):
        jax.jit(traced)(ROWS)
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda: traced(ROWS))()


@pytest.mark.parametrize("name", ["prune_layerwise", "prune_outputs"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (ROWS[:0], r"no examples in inputs=float32\[0, 3\]; expected one batch"),
        ([], r"no examples in inputs=\[\]; expected"),
        (None, "no examples in inputs=None; expected"),
        (
            {"x": ROWS, "m": 2.0},
            r"inputs\['m'\] has no axis of examples in inputs=\{'m",
        ),
        ([[1, 2, 3], [4, 5]], r"of type \['int'\]. Make lists of one length an array"),
    ],
)
def test_what_has_no_examples_is_shown(name: str, inputs, message: str) -> None:
    with pytest.raises(wf.OptionError, match=message):
        CALLS[name](net, inputs)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_batch_is_named_with_what_to_give(name: str) -> None:
    with pytest.raises(wf.OptionError, match=r"tuple of 3.*concatenate") as caught:
        CALLS[name](net, (ROWS[:2], ROWS[2:4], ROWS[4:]))
    assert "an array of shape (2, 3), read as one batch, which net" in str(caught.value)
    for given in (list(ROWS), list(np.ones((6, 4, 3, 2), np.float32))):
        with pytest.raises(wf.OptionError, match=r"list of 6.*np.stack\(inputs\)"):
            CALLS[name](net, given)
    given = [{"x": ROWS}, {"x": ROWS}]
    with pytest.raises(wf.OptionError, match="2, the first a dict, read as") as caught:
        CALLS[name](net, given)
    assert ("tuple(inputs)" in str(caught.value)) == name.startswith("prune")
    assert ("give inputs[0]" in str(caught.value)) == name.startswith(("str", "shr"))


@pytest.mark.parametrize("name", [*CALLS, *OF_SAMPLES])
def test_an_error_of_a_network_says_what_it_was_given(name: str) -> None:
    call, function = (CALLS | OF_SAMPLES)[name], "net_fn"
    if name in OF_SAMPLES:
        function = "f" if name == "find_axes" else r"(loss_fn|outputs_fn)"
    rows = r"float32\[\d, 2\]"
    with pytest.raises(
        wf.OptionError, match=rf"^{function} fails on {rows} \(TypeError: dot_general"
    ) as caught:
        call(net, ROWS[:, :2])
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(wf.OptionError, match=rf"fails on \{{'x': '{rows}'\}} \("):
        call(net, {"x": ROWS[:, :2]})


def test_a_network_of_a_fixed_number_of_examples_is_told_how_many_it_was_given() -> (
    None
):
    def fixed(params, x):
        return net(params, x.reshape(6, 3))

    for given in (ROWS, [ROWS[:2], ROWS[2:]]):
        with pytest.raises(wf.OptionError, match="called with 3 of the 6 ex") as caught:
            CALLS["prune_layerwise"](fixed, given)
        assert "give batch_size=6 if it takes just so many" in str(caught.value)
    with pytest.raises(wf.OptionError, match=r"^net_fn fails on float32\[3, 3\] \("):
        CALLS["prune_layerwise"](fixed, ROWS)
    wf.prune_layerwise(fixed, PARAMS, ROWS, sparsity=0.5, batch_size=6)
    with pytest.raises(wf.OptionError, match=r"on int32\[2\] .*give inputs\[None\] if"):
        CALLS["prune_layerwise"](net, np.arange(1, 3))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("inputs", [ROWS, (ROWS, ROWS)])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda p, x: x if jnp.sum(jax.tree.leaves(x)[0]) > 0 else p, "lax.cond in"),
        (lambda p, x: np.tanh(jax.tree.leaves(x)[0]), "expected jax.numpy in place"),
        (lambda p, x, y: net(p, x), r"lambda params, batch: net\(params, \*batch\)"),
    ],
)
def test_errors_of_python_are_not_blamed_on_shapes(
    name: str, inputs, wrong, expected: str
) -> None:
    with pytest.raises(
        wf.OptionError, match=rf"^net_fn fails on .*{expected}"
    ) as found:
        CALLS[name](wrong, inputs)
    assert "first axis" not in str(found.value)


@pytest.mark.parametrize("name", CALLS)
def test_errors_that_are_explained_are_the_network_s_own(name: str) -> None:
    def training(params, x):
        raise ValueError("Dropout requires a key")

    with pytest.raises(ValueError, match="requires a key") as caught:
        CALLS[name](training, ROWS)
    assert any("inference_mode" in note for note in caught.value.__notes__)
    with pytest.raises(wf.OptionError, match=r"tuple of 1, .* a key") as caught:
        CALLS[name](training, (ROWS,))
    cause = caught.value.__cause__
    assert any("inference_mode" in note for note in cause.__notes__)


def test_targets_whose_squares_leave_float32_are_refused() -> None:
    assert check_targets([0.0, -1e15], 2).tolist() == [0.0, np.float32(-1e15)]
    with pytest.raises(wf.OptionError, match=r"targets are 1e\+20 at most; expected"):
        check_targets(-1e20, 2)


def test_a_list_of_batches_of_several_arrays_is_taken() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((8, n)).astype(np.float32) for n in (1, 2))
    params = {"w": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}

    def net(params, batch):
        return jnp.concatenate(batch, axis=-1) @ params["w"]

    whole = tuple(np.concatenate([a, a]) for a in (one, other))
    _, wanted, _ = wf.prune_layerwise(net, params, whole, sparsity=0.5)
    _, masks, _ = wf.prune_layerwise(net, params, [(one, other)] * 2, sparsity=0.5)
    np.testing.assert_array_equal(masks["w"], wanted["w"])


@pytest.mark.parametrize("function", [wf.prune_layerwise, wf.prune_outputs])
@pytest.mark.parametrize(
    ("net_fn", "message"),
    [
        (lambda params, x: None, "^net_fn returns no array"),
        (lambda params, x: jnp.tanh(x), "^net_fn returns .* not depend on params"),
        (lambda params, x: x + 0 * params["b"].size, "^net_fn .* not depend on params"),
    ],
)
def test_a_network_without_weights_is_named(function, net_fn, message) -> None:
    params = {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    with pytest.raises(wf.OptionError, match=message):
        function(net_fn, params, np.ones((4, 3), np.float32), sparsity=0.5)


@pytest.mark.parametrize("function", [wf.prune_layerwise, wf.prune_outputs])
def test_the_function_of_the_call_is_named_for_counters(function) -> None:
    params = {"w": jnp.ones((3, 3)), "step": jnp.arange(2)}
    with pytest.raises(TypeError, match="in the closure of net_fn"):
        function(lambda p, x: x @ p["w"], params, np.ones((4, 3)), sparsity=0.5)


@pytest.mark.parametrize("function", [wf.prune_layerwise, wf.prune_outputs])
def test_a_generator_of_inputs_is_called_one(function) -> None:
    batches = (np.ones((4, 3), np.float32) for _ in range(2))
    with pytest.raises(wf.OptionError, match=r"^inputs is a generator, .*list\(inputs"):
        function(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, batches, sparsity=0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda *given: wf.shrink(*given[:2], {}, given[2]),
        lambda *given: wf.prune_outputs(*given, sparsity=0.5),
        lambda *given: wf.prune_layerwise(*given, sparsity=0.5),
    ],
    ids=["shrink", "prune_outputs", "prune_layerwise"],
)
def test_shapes_are_no_params(call) -> None:
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), np.float32)}
    with pytest.raises(TypeError, match=r"params\['a'\] is a jax.ShapeDtype"):
        call(lambda params, x: x @ params["a"], shapes, np.ones((4, 2)))
