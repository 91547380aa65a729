"""Layer-wise pruning in sequence, against an explicit loop over the layers."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from llama_folders import SMOLLM2, needs_smollm2

import woodfisher_jax as wf
from woodfisher_jax.equations.layerwise import pruned_layer
from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.layerwise.weights import PENALTIES
from woodfisher_jax.training.language.perplexity import perplexity
from woodfisher_jax.weights.hugging_face import read_folder

WIDTH, DEPTH = 8, 3
X = normal(9, 40, 5)
WITHOUT = Layerwise()


def parameters():
    return {
        "first": normal(0, WIDTH, 5),
        "layers": jnp.asarray(np.asarray(normal(1, DEPTH, WIDTH, WIDTH)) / 3),
        "bias": jnp.asarray(np.linspace(-1, 1, WIDTH), jnp.float32),
    }


def stacked(params, x):
    def body(h, w):
        return h + jnp.tanh(h @ w.T + params["bias"]), None

    return jax.lax.scan(body, x @ params["first"].T, params["layers"])[0]


def unstacked(params, x):
    h = x @ params["first"].T
    for i in range(DEPTH):
        h = h + jnp.tanh(h @ params[f"layer{i}"].T + params["bias"])
    return h


def apart(params):
    own = {f"layer{i}": w for i, w in enumerate(params["layers"])}
    return {"first": params["first"], "bias": params["bias"], **own}


def prune_by_hand(weights, x, z, kept):
    """In NumPy but for the layer itself: it compiles nothing else."""
    weights, x, z = map(np.asarray, (weights, x, z))
    moment, cross = x.T @ x / len(x), z.T @ x / len(x)
    pruned, _ = pruned_layer(
        weights[None],
        moment[None],
        cross[None],
        np.ones((1, len(weights)), np.float32),
        np.ones((1, *weights.shape), bool),
        kept,
        np.float32(WITHOUT.damping),  # as in a run, which has compiled it
        np.asarray(PENALTIES, np.float32),
        rounds=WITHOUT.rounds,
        polish=WITHOUT.polish,
    )
    return np.asarray(pruned)[0]


@pytest.fixture(scope="module")
def pruned():
    return wf.prune_layerwise(stacked, parameters(), X, sparsity=0.5)


def test_it_is_the_loop_over_the_layers(pruned) -> None:
    params, masks, info = pruned
    dense, x = jax.tree.map(np.asarray, (apart(parameters()), X))
    layers = np.asarray(params["layers"])
    first = prune_by_hand(dense["first"], x, x, 20)
    np.testing.assert_allclose(params["first"], first, atol=1e-4)
    h, z = x @ first.T, x @ dense["first"].T
    for i in range(DEPTH):
        own = prune_by_hand(dense[f"layer{i}"], h, z, 32)
        np.testing.assert_allclose(layers[i], own, atol=1e-4)
        h = h + np.tanh(h @ own.T + dense["bias"])
        z = z + np.tanh(z @ dense[f"layer{i}"].T + dense["bias"])
    assert masks["layers"].sum(axis=(1, 2)).tolist() == [32] * DEPTH
    assert info.nonzero == 20 + 32 * DEPTH
    assert set(info.errors) == {"first", "layers"}
    assert [layer.number for layer in info.layers] == [0, 0, 1, 2]


def test_a_stacked_network_is_pruned_as_its_layers(pruned) -> None:
    params, masks, _ = pruned
    own, own_masks, _ = wf.prune_layerwise(
        unstacked, apart(parameters()), X, sparsity=0.5
    )
    for i in range(DEPTH):
        np.testing.assert_allclose(own[f"layer{i}"], params["layers"][i], atol=1e-5)
        np.testing.assert_array_equal(own_masks[f"layer{i}"], masks["layers"][i])


def test_it_prints_as_a_table(pruned) -> None:
    lines = str(pruned[2]).splitlines()
    assert lines[0] == "50.00 % sparse: 116 of 232 prunable weights left"
    assert {line.split()[0] for line in lines[3:7]} == {
        "first",
        "layers",
        "layers[1]",
        "layers[2]",
    }
    assert lines[2].split() == ["sparsity", "error"]
    assert lines[-1].startswith("seconds  inputs")
    assert repr(pruned[2]).count("\n") == 0


def test_it_says_what_the_errors_do_not_count(pruned) -> None:
    info = pruned[2]
    moved = info._replace(seconds=info.seconds | {"repair": 1.0, "distillation": 2.0})
    header = str(moved).splitlines()[2]
    assert header.endswith("error before repair and distillation")


@jax.jit
def distances(params, dense):
    aim = stacked(dense, X)
    return jnp.sum((stacked(params, X) - aim) ** 2), jnp.sum(aim**2)


def distance(params) -> float:
    missed, whole = distances(params, parameters())
    return float(missed) / float(whole)


def test_the_outputs_stay_nearer_than_after_magnitude(pruned) -> None:
    by_size, _, _ = wf.prune(
        None, parameters(), method="magni", sparsity=0.5, prunable="first|layers"
    )
    assert distance(pruned[0]) < 0.7 * distance(by_size)


@pytest.mark.parametrize(
    "how", ["repair", pytest.param("distil", marks=pytest.mark.slow)]
)
def test_moving_what_stays_brings_the_outputs_nearer(how: str, pruned) -> None:
    options = {how: 40, f"{how}_rate": 1e-2, "repair_stages": 2}
    params, masks, _ = wf.prune_layerwise(
        stacked, parameters(), X, sparsity=0.5, **options
    )
    assert distance(params) < 0.7 * distance(pruned[0])
    assert (params["layers"][~masks["layers"]] == 0).all()
    assert masks["layers"].sum() == pruned[1]["layers"].sum()


def test_global_budgets_add_up_and_differ() -> None:
    _, masks, info = wf.prune_layerwise(
        stacked, parameters(), X, sparsity=0.5, scope="global", spread=0.3
    )
    total = 40 + DEPTH * WIDTH * WIDTH
    assert sum(int(m.sum()) for m in masks.values()) == total // 2 == info.nonzero
    levels = [layer.sparsity for layer in info.layers]
    assert len(set(levels)) > 1
    assert 0.2 - 0.02 <= min(levels) <= max(levels) <= 0.82
    with pytest.raises(wf.OptionError, match="spread=2"):
        wf.prune_layerwise(stacked, parameters(), X, sparsity=0.5, spread=2)


@pytest.mark.slow
def test_convolutions_of_groups_and_strides() -> None:
    def net(params, x):
        first = jax.lax.conv_general_dilated(
            x,
            params["conv"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        second = jax.lax.conv_general_dilated(
            jax.nn.relu(first),
            params["depthwise"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )
        return second.mean(axis=(1, 2)) @ params["head"]

    params = {
        "conv": normal(0, 3, 3, 4, 4),
        "depthwise": normal(1, 3, 3, 1, 4),
        "head": normal(2, 4, 3),
    }
    images = normal(3, 12, 8, 8, 4)
    new, masks, _ = wf.prune_layerwise(
        net, params, images, pattern="2:4", prunable="conv"
    )
    kept = np.asarray(masks["conv"]).transpose(0, 1, 3, 2).sum(axis=-1)
    assert (kept == 2).all()
    assert (new["depthwise"] == params["depthwise"]).all()
    new, masks, _ = wf.prune_layerwise(net, params, images, sparsity=0.5)
    assert [int(m.sum()) for m in masks.values()] == [72, 18, 6]
    by_size, _, _ = wf.prune(
        None, params, method="magni", sparsity=0.5, prunable=".", scope="layer"
    )
    aim = net(params, images)
    assert jnp.sum((net(new, images) - aim) ** 2) < jnp.sum(
        (net(by_size, images) - aim) ** 2
    )


@pytest.mark.slow
def test_experts_are_layers_of_their_own() -> None:
    def net(params, x):
        gates = jax.nn.softmax(x @ params["gate"])
        sent = jnp.einsum("ne,ni->eni", gates, x)
        hidden = jnp.einsum("eni,eio->eno", sent, params["experts"])
        return jax.nn.relu(hidden).sum(axis=0)

    params = {
        "gate": jnp.ones((5, 2)),
        "experts": normal(0, 2, 5, 4) * jnp.array([1, 9])[:, None, None],
    }
    _, masks, info = wf.prune_layerwise(
        net, params, X, sparsity=0.5, prunable="experts"
    )
    assert masks["experts"].sum(axis=(1, 2)).tolist() == [10, 10]
    assert [layer.number for layer in info.layers] == [0, 1]


def test_pruned_weights_stay_pruned(pruned) -> None:
    params, masks, _ = pruned
    _, new, _ = wf.prune_layerwise(stacked, params, X, sparsity=0.75, masks=masks)
    for path, mask in new.items():
        assert not (mask & ~masks[path]).any()
    assert new["layers"].sum() == 16 * DEPTH


def test_masks_may_be_a_tree_and_then_nothing_else_is_prunable() -> None:
    params = apart(parameters())
    mask = jnp.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) % 4 > 0
    tree = wf.masks_tree(params, {"layer1": mask})
    _, masks, _ = wf.prune_layerwise(unstacked, params, X, sparsity=0.5, masks=tree)
    assert list(masks) == ["layer1"]
    assert not (masks["layer1"] & ~mask).any()
    with pytest.raises(wf.OptionError, match="prunable='layer0' together with masks"):
        wf.prune_layerwise(
            unstacked, params, X, sparsity=0.5, masks=tree, prunable="layer0"
        )


@pytest.mark.parametrize("options", [{}, {"pattern": "structures", "macs": 0.5}])
def test_times_without_a_latency_are_refused(options: dict) -> None:
    params = apart(parameters())
    with pytest.raises(wf.OptionError, match=r"times='t\.json' without a latency"):
        wf.prune_layerwise(unstacked, params, X, times="t.json", **options)
    with pytest.raises(wf.OptionError, match="times is of type int; expected the name"):
        wf.prune_layerwise(unstacked, params, X, latency=0.5, times=3, **options)


def test_times_beside_structures_that_are_timed_are_refused() -> None:
    params = apart(parameters())
    found = wf.structures(unstacked, params, X)._replace(speeds=("some",))
    message = r"times='t\.json' with a pattern whose structures are timed already"
    with pytest.raises(wf.OptionError, match=message):
        wf.prune_layerwise(
            unstacked, params, X, pattern=found, latency=0.5, times="t.json"
        )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_sparsity_below_that_of_the_masks_is_refused(scope: str, pruned) -> None:
    params, masks, _ = pruned
    run = functools.partial(wf.prune_layerwise, stacked, params, X, scope=scope)
    with pytest.raises(wf.OptionError, match=r"sparsity=0.2 is below the 0.5 that mas"):
        run(sparsity=0.2, masks=masks)


def test_a_layer_may_have_more_pruned_than_the_sparsity(pruned) -> None:
    params, masks, _ = pruned
    fuller = masks | {"first": jnp.ones_like(masks["first"])}
    message = (
        r"^masks leave fewer weights of 'layers\[0\]', 'layers\[1\]', 'layers\[2\]'"
    )
    with pytest.warns(wf.PruneWarning, match=message) as caught:
        _, new, info = wf.prune_layerwise(
            stacked, params, X, sparsity=0.4, masks=fuller
        )
    assert wf.sparsity_by_path(new) == {"first": 0.4, "layers": 0.5}
    assert info.warnings == (str(caught[0].message),)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"repair": 2, "distil": 2}, marks=pytest.mark.slow)],
)
def test_half_precision_stays_half_precision(options) -> None:
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), parameters())
    params, masks, _ = wf.prune_layerwise(
        stacked, half, X.astype(jnp.bfloat16), sparsity=0.5, **options
    )
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert (params["layers"][~masks["layers"]] == 0).all()
    assert distance(params) < 1


def tied(params, tokens):
    h = params["table"][tokens]
    return jnp.tanh(h @ params["w"]) @ params["table"].T


TIED = {"table": jnp.ones((9, 4)), "w": jnp.eye(4)}
TOKENS = jnp.arange(8).reshape(4, 2)


@pytest.mark.slow
def test_a_tied_embedding_is_left_out() -> None:
    _, masks, _ = wf.prune_layerwise(tied, TIED, TOKENS, sparsity=0.5)
    assert list(masks) == ["w"]


def test_a_tied_embedding_that_is_asked_for_is_refused() -> None:
    with pytest.raises(wf.OptionError, match="'table' meets activations in 'gather'"):
        wf.prune_layerwise(tied, TIED, TOKENS, sparsity=0.5, prunable=".")


def test_all_that_are_no_layers_are_named_at_once() -> None:
    params = {name: normal(i, 5, 5) for i, name in enumerate(("of", "u", "v"))}

    def net(p, x):
        step = lambda h, row: (jnp.tanh(h @ p["u"] + row @ p["v"]), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.stack([x, x]))[0] @ p["of"]

    message = (
        r"'u' enters .* after 'scan' \(and 'v' as little\); leave them out by .*'v'"
    )
    with pytest.raises(wf.OptionError, match=message):
        wf.prune_layerwise(net, params, X, sparsity=0.5)


def test_a_weight_of_several_layers_is_refused() -> None:
    def net(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    with pytest.raises(
        wf.OptionError, match=r"'w' of shape \(5, 5\) is used in several"
    ):
        wf.prune_layerwise(net, {"w": jnp.eye(5)}, X, sparsity=0.5)


def test_the_default_without_one_is_written_as_the_message_says() -> None:
    def net(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["twice"]) @ params["twice"])
        return h @ params["last"] + params["bias"]

    shapes = {"twice": (5, 5), "last": (5, 8), "bias": (40, 8)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    inputs = X[:40]
    run = functools.partial(wf.prune_layerwise, net, params, inputs, batch_size=40)
    with pytest.raises(wf.OptionError, match="leave it out by") as caught:
        run(sparsity=0.5)
    said = re.search(r"lambda path.*?\]", str(caught.value))
    assert said is not None
    axes = wf.find_axes(net, params, inputs)
    _, masks, _ = run(sparsity=0.5, prunable=eval(said.group(), {"axes": axes}))
    assert set(masks) == {"last"}


def test_a_regular_expression_may_leave_out() -> None:
    params = {n: {"kernel": jnp.ones((2, 2))} for n in ("body", "head")}
    params["body"]["bias"] = jnp.ones(2)
    masks = wf.init_masks(params, prunable=r"^(?!head/).*kernel")
    assert list(masks) == ["body/kernel"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity is missing; expected a fraction"),
        ({"sparsity": 1.0}, "sparsity=1.0; expected a number from 0 and below 1"),
        ({"pattern": "filters"}, "pattern='filters' in layer-wise pruning"),
        ({"pattern": "foo"}, "pattern='foo'; expected N:M such as 2:4, 'structures', "),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity=0.6 with pattern='2:4'"),
        ({"sparsity": 0.5, "dampin": 1}, "no option 'dampin'; did you mean 'damping'"),
        ({"mac": 0.5}, "prune_layerwise has no option 'mac'; did you mean 'macs'"),
        ({"sparsity": 0.5, "repair": -1}, "repair=-1"),
    ],
)
def test_what_is_wrong_is_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wf.prune_layerwise(stacked, parameters(), X, **options)


def deep(params, x):
    for i in range(5):
        x = x + jnp.tanh(x @ params[f"layer{i}"])
    return x


@pytest.fixture(scope="module")
def five_layers():
    params = {f"layer{i}": normal(i, 8, 8) / 3 for i in range(5)}
    return params, normal(5, 32, 8)


@pytest.mark.slow
def test_a_layer_that_is_left_over_is_repaired_as_well(five_layers) -> None:
    dense, x = five_layers
    far = []
    for passes in (0, 20):
        new, _, _ = wf.prune_layerwise(
            deep, dense, x, sparsity=0.5, repair=passes, repair_rate=0.01
        )
        far.append(float(jnp.var(deep(new, x) - deep(dense, x))))
    assert far[1] < 0.8 * far[0]


def test_layers_side_by_side_have_inputs_of_their_own(five_layers) -> None:
    dense, x = five_layers

    def net(params, x):
        return jnp.tanh(x) @ params["layer0"] + jax.nn.relu(x) @ params["layer1"]

    two = {name: dense[name] for name in ("layer0", "layer1")}
    new, _, _ = wf.prune_layerwise(net, two, x, sparsity=0.5)
    positive = np.maximum(x, 0)
    by_hand = prune_by_hand(two["layer1"].T, positive, positive, 32)
    np.testing.assert_allclose(new["layer1"], by_hand.T, atol=1e-4)


@pytest.mark.slow
def test_with_64_bits_enabled_it_is_the_same(pruned) -> None:
    dense = parameters()
    with jax.enable_x64(True):
        params, _, _ = wf.prune_layerwise(stacked, dense, X, sparsity=0.5)
    np.testing.assert_allclose(params["layers"], pruned[0]["layers"], atol=1e-4)


def test_what_cannot_be_estimated_is_refused(five_layers) -> None:
    dense, x = five_layers
    run = functools.partial(wf.prune_layerwise, sparsity=0.5)
    with pytest.raises(wf.OptionError, match=r"'layer0', or their squares, are not"):
        run(deep, dense, x.at[2, 3].set(jnp.nan))
    with pytest.raises(wf.OptionError, match="distil=1: net_fn returns no floating"):
        run(lambda p, x: deep(p, x).argmax(axis=1), dense, x, distil=1)
    with pytest.raises(wf.OptionError, match="scope='global' with pattern='2:4'"):
        wf.prune_layerwise(deep, dense, x, pattern="2:4", scope="global")
    with pytest.raises(wf.OptionError, match="damping=0"):
        run(deep, dense, x, damping=0.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "layer4",
            jnp.nan,
            r"\['layer4'\] of shape \(8, 8\) has 1 entries that are NaN",
        ),
        ("layer4", jnp.inf, r"\['layer4'\] of .* are NaN or infinity; expected finite"),
        ("bias", jnp.nan, r"\['bias'\] of shape \(8, 8\) has 1 entries that are NaN;"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    five_layers, path: str, value: float, message: str
) -> None:
    dense, x = five_layers
    dense = {**dense, "bias": jnp.zeros((8, 8))}
    wrong = {**dense, path: dense[path].at[1, 2].set(value)}
    with pytest.raises(wf.OptionError, match=rf"^params{message}") as caught:
        wf.prune_layerwise(deep, wrong, x, sparsity=0.5)
    assert caught.value.name == "params"


def test_infinity_may_say_where_attention_does_not_look(five_layers) -> None:
    dense, x = five_layers
    own = {"layer0": dense["layer0"], "hidden": jnp.array([-jnp.inf] + 7 * [0.0])}
    pruned, _, _ = wf.prune_layerwise(
        lambda p, x: jax.nn.softmax(x @ p["layer0"] + p["hidden"]), own, x, sparsity=0.5
    )
    np.testing.assert_array_equal(pruned["hidden"], own["hidden"])


def until_small(params, x):
    h = jnp.tanh(x @ params["layer0"])
    return jax.lax.while_loop(lambda h: h.max() > 1, lambda h: h / 2, h)


@pytest.mark.parametrize(
    ("name", "value"), [("repair", 1), ("distil", 1), ("scope", "global")]
)
def test_a_network_without_gradients(five_layers, name: str, value) -> None:
    dense, x = five_layers
    one = {"layer0": dense["layer0"]}
    with pytest.raises(wf.OptionError, match=rf"{name}={value!r}: .*Reverse-mode"):
        wf.prune_layerwise(until_small, one, x, sparsity=0.5, **{name: value})


def test_wrong_inputs_are_called_inputs(five_layers) -> None:
    dense, x = five_layers
    for wrong in (x[0, 0], np.array([["a"]] * 4), [x, x]):
        with pytest.raises(wf.OptionError, match=r"^inputs"):
            wf.prune_layerwise(deep, dense, wrong, sparsity=0.5)


@pytest.mark.slow
@needs_smollm2
def test_two_blocks_of_a_published_language_model() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(f"{SMOLLM2}/tokenizer.json")
    docs = Path(__file__).parents[2] / "docs"

    def tokens(page: str, number: int) -> np.ndarray:
        ids = tokenizer.encode((docs / page).read_text()).ids
        return np.reshape(ids[: 256 * number], (number, 256))

    module, dense = read_folder(SMOLLM2)
    net = functools.partial(_logits, module)
    prunable = r"layers_[01]/.*kernel$"
    pruned, masks, _ = wf.prune_layerwise(
        net, dense, tokens("concepts.md", 8), sparsity=0.6, prunable=prunable
    )
    assert len(masks) == 14
    assert all(abs(s - 0.6) < 1e-3 for s in wf.sparsity_by_path(masks).values())
    by_size, _, _ = wf.prune(
        None, dense, method="magni", sparsity=0.6, prunable=prunable
    )
    text = tokens("quickstart.md", 2)
    whole, layers, sizes = (
        perplexity(net, params, text).all for params in (dense, pruned, by_size)
    )
    assert whole < layers < 1.5 * whole
    assert np.log(sizes / whole) > 2 * np.log(layers / whole)


def _logits(module, params, tokens):
    return module.apply({"params": params}, tokens)


def test_a_layer_without_weights_is_warned_of() -> None:
    params = {"v": normal(0, 3, 20), "w": normal(1, 20, 1)}
    inputs = np.ones((4, 3), np.float32)
    message = (
        r"no weight is left of \['w'\]; lower sparsity=0.97 to 0.95, which leaves one"
    )
    with pytest.warns(wf.PruneWarning, match=message) as caught:
        _, masks, info = wf.prune_layerwise(
            lambda p, x: jnp.tanh(x @ p["v"]) @ p["w"], params, inputs, sparsity=0.97
        )
    assert caught[0].filename == __file__
    assert info.warnings == (str(caught[0].message),)
    neurons = 20 - int(masks["v"].any(axis=0).sum())
    assert info.empty_outputs == {"v": neurons, "w": 1}
    *_, empty, _, warning = str(info).splitlines()
    assert empty == f"empty    outputs without a weight left: v {neurons}, w 1"
    assert warning == f"warning  {info.warnings[0]}"
    assert repr(info).endswith(", warnings=1)")


def test_a_sparsity_that_leaves_no_weight_at_all_is_refused(five_layers) -> None:
    dense, x = five_layers
    largest = max(dense, key=lambda path: dense[path].size)
    message = f"sparsity=0.9999 leaves none of .* of '{largest}', .*expected at most 0"
    with pytest.raises(wf.OptionError, match=message):
        wf.prune_layerwise(deep, dense, x, sparsity=0.9999)
    with pytest.raises(
        wf.OptionError, match=r"none of the 1 .* expected sparsity=0, or"
    ):
        wf.prune_layerwise(
            lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}, x[:, :1], sparsity=0.5
        )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_squares_that_leave_float32_are_refused(scope: str) -> None:
    params = {"a": normal(0, 5, 6), "b": normal(1, 6, 3)}

    def net(params, x):
        return 1e-20 * jnp.tanh(1e19 * jnp.tanh(x @ params["a"]) @ params["b"])

    with pytest.raises(wf.OptionError, match=r"layer of 'b', or their squares, are"):
        wf.prune_layerwise(net, params, X, sparsity=0.5, scope=scope)


@pytest.mark.parametrize("scale", [1e-17, 1e-18, 1e-20])
def test_inputs_whose_squares_vanish_are_refused(scale: float) -> None:
    params = {"a": normal(0, 5, 6), "b": normal(1, 6, 3)}

    def net(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    with pytest.raises(wf.OptionError, match=r"of the layer of 'a' are .*1e-15 or mo"):
        wf.prune_layerwise(net, params, X * np.float32(scale), sparsity=0.5)


@pytest.mark.parametrize("pattern", [None, "structures"])
def test_params_of_float64_come_out_in_one_type(pattern) -> None:
    def net(params, x):
        return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]

    shapes = {"a": (5, 6), "b": (6,), "c": (6, 3)}
    params = {n: np.asarray(normal(i, *s)) for i, (n, s) in enumerate(shapes.items())}
    for dtype, expected in ((np.float64, jnp.float32), (np.float16, jnp.float16)):
        given = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
        found, _, _ = wf.prune_layerwise(
            net, given, X, sparsity=0.5, pattern=pattern, prunable="a|c"
        )
        for leaf in jax.tree.leaves(found):
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype == expected


def test_inputs_that_are_all_zero_are_refused(five_layers) -> None:
    dense, x = five_layers
    with pytest.raises(wf.OptionError, match="inputs are all zero"):
        wf.prune_layerwise(deep, dense, [0 * x, 0 * x[:8]], sparsity=0.5)


@pytest.mark.slow
def test_tokens_or_one_of_several_inputs_may_be_zero() -> None:
    wf.prune_layerwise(tied, TIED, 0 * TOKENS, sparsity=0.5)

    def net(params, inputs):
        return jnp.tanh((inputs[0] + inputs[1]) @ params["w"])

    wf.prune_layerwise(net, {"w": normal(0, 5, 6)}, (X, 0 * X), sparsity=0.5)


@pytest.mark.slow
def test_outputs_that_mean_nothing_share_nothing_out() -> None:
    """The softmax of a single logit is 1, whatever the network does."""
    params = {"a": normal(0, 5, 6), "b": normal(1, 6, 1)}

    def net(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    options = {"sparsity": 0.5, "scope": "global"}
    with pytest.raises(wf.OptionError, match="metric='softmax': no layer's outputs"):
        wf.prune_layerwise(net, params, X, metric="softmax", **options)
    wf.prune_layerwise(net, params, X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": 0.3}, "spread=0.3 has no effect without scope='global'"),
        ({"metric": "softmax"}, "metric='softmax' .* without scope='global' or distil"),
        ({"seed": 3}, "seed=3 has no effect without scope='global'"),
    ],
)
def test_an_option_that_others_leave_unused_is_warned_of(options, message) -> None:
    params = {"w": normal(0, 5, 6)}

    def net(params, x):
        return jnp.tanh(x @ params["w"])

    with pytest.warns(wf.PruneWarning, match=message) as caught:
        _, _, info = wf.prune_layerwise(net, params, X, sparsity=0.5, **options)
    assert caught[0].filename == __file__
    assert info.warnings == (str(caught[0].message),)
    used = {"spread": 0.3, "metric": "softmax", "scope": "global"}
    wf.prune_layerwise(net, params, X, sparsity=0.5, **used)
    wf.prune_layerwise(net, params, X, sparsity=0.5, spread=0.2, metric="identity")


def test_a_layer_that_is_left_out_is_named() -> None:
    def net(params, x):
        h = jnp.tanh(jnp.sum(x[:, :, None] * params["by_hand"], axis=1))
        return h @ params["layer"]

    params = {"by_hand": normal(3, 5, 8), "layer": normal(4, 8, 3)}
    with pytest.warns(wf.PruneWarning, match=r"\['by_hand'\] multiply") as caught:
        _, masks, info = wf.prune_layerwise(net, params, X, sparsity=0.5)
    assert caught[0].filename == __file__
    assert info.warnings == (str(caught[0].message),)
    assert "path not in ['by_hand'], with axes = wf.find_axes" in info.warnings[0]
    assert set(masks) == {"layer"}
    # Nothing is said of what was not to be pruned.
    _, masks, _ = wf.prune_layerwise(net, params, X, sparsity=0.5, prunable="layer")
    assert set(masks) == {"layer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": 1}, "repair has given weights of 'a' that are not finite"),
        ({"distil": 1}, "distil has given weights of 'a' that are not finite"),
        (
            {"scope": "global", "sensitivity_examples": 40},
            "gradients of net_fn at the layer of 'a' are not finite",
        ),
    ],
)
def test_gradients_that_are_not_finite_are_named(options, message: str) -> None:
    """The outputs are finite: an example of zeros is divided by its norm."""

    def net(params, x):
        h = jnp.tanh(x @ params["a"].T)
        norm = jnp.linalg.norm(h, axis=-1, keepdims=True)
        return (h / (norm + 1e-6)) @ params["b"].T

    params = {"a": normal(0, WIDTH, 5), "b": normal(1, 3, WIDTH)}
    inputs = X.at[0].set(0.0)
    assert np.isfinite(net(params, inputs)).all()
    with pytest.raises(wf.OptionError, match=message):
        wf.prune_layerwise(net, params, inputs, sparsity=0.5, **options)
