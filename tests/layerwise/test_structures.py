"""Structures that layer-wise pruning takes from the layers that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf
from woodfisher_jax.options import OptionError


def net(params, x):
    h = jnp.tanh(x @ params["a"] + params["bias"])
    return (h + jnp.tanh(h @ params["b"]) @ params["c"]) @ params["d"]


@pytest.fixture(scope="module")
def given():
    shapes = {"a": (8, 10), "bias": (10,), "b": (10, 16), "c": (16, 10), "d": (10, 3)}
    params = {
        path: 0.4 * normal(number, *shape)
        for number, (path, shape) in enumerate(shapes.items())
    }
    return params, normal(9, 200, 8)


def prune(given, **options):
    params, x = given
    return wf.prune_layerwise(net, params, x, pattern="neurons", **options)


def error(given, params):
    wanted, found = (np.asarray(jax.jit(net)(p, given[1])) for p in (given[0], params))
    return np.mean((found - wanted) ** 2) / np.var(wanted)


def test_what_one_layer_reads_goes_and_shrinks(given):
    params, masks, info = prune(given, sparsity=0.5)
    small = wf.shrink(net, params, masks, given[1])
    # The residual stream is read by two layers and stays.
    assert {p: a.shape for p, a in small.items()} == {
        "a": (8, 10),
        "bias": (10,),
        "b": (10, 8),
        "c": (8, 10),
        "d": (10, 3),
    }
    assert [layer.path for layer in info.layers] == ["c"]
    assert error(given, params) < 0.1
    # Better than the same neurons without the others' compensation.
    assert error(given, params) < 0.5 * error(given, wf.apply_masks(given[0], masks))


@pytest.mark.parametrize(
    "options",
    [
        {"macs": 0.7},
        pytest.param({"size": 0.6, "scope": "global"}, marks=pytest.mark.slow),
    ],
)
def test_budgets_are_met_and_not_by_far(given, options):
    _, masks, _ = prune(given, **options)
    found = wf.structures(net, *given)
    left = found.account(found.gone(masks)).left
    (cost, share), *_ = options.items()
    whole = getattr(found, cost)
    # One neuron more would exceed it.
    assert share * whole - 20 < left[cost] <= share * whole


@pytest.mark.slow
def test_a_second_pruning_is_nested(given):
    params, masks, _ = prune(given, sparsity=0.5)
    again, later, _ = wf.prune_layerwise(
        net, params, given[1], pattern="neurons", masks=masks, sparsity=0.75
    )
    assert all(bool(jnp.all(masks[p] | ~later[p])) for p in masks)
    assert wf.shrink(net, again, later, given[1])["b"].shape == (10, 4)
    assert error(given, again) < 0.5


@pytest.mark.slow
def test_repair_moves_what_is_left_alone(given):
    plain, masks, _ = prune(given, sparsity=0.5)
    repaired, same, _ = prune(given, sparsity=0.5, repair=5)
    assert all(bool(jnp.all(masks[p] == same[p])) for p in masks)
    assert error(given, repaired) < error(given, plain)
    assert not np.any(np.asarray(repaired["c"])[~np.asarray(same["c"])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither macs nor size"),
        ({"macs": 2.0}, "above 0 and at most 1"),
        ({"macs": "half"}, "above 0 and at most 1"),
        ({"size": True}, "size=True; expected the share"),
        ({"size": 60}, r"size=60; expected the share .*; did you mean 0\.6\?"),
        ({"sparsity": "0.5"}, r"sparsity='0\.5'; expected .*; did you mean 0\.5\?"),
        ({"sparsity": 1.5}, "sparsity=1.5; expected a number from 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1; expected a number"),
        ({"sparsity": "half"}, "sparsity='half'; expected a number"),
        ({"sparsity": [0.5]}, r"sparsity=\[0.5\]; expected a number"),
        ({"macs": 0.1}, "of the multiply-accumulates are left"),
        ({"macs": 0.5, "sparsity": 0.5}, "expected either"),
        ({"sparsity": 0.5, "prunable": "^a$"}, "no prunable layer reads"),
    ],
)
def test_what_cannot_be_met_is_said(given, options, message):
    with pytest.raises(OptionError, match=message):
        prune(given, **options)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda found: "heads", "'heads': there are no heads; .*there is: neurons"),
        (lambda found: found.of(["heads"]), "no channels or neurons or heads; .*N:M"),
    ],
)
def test_kinds_that_there_are_none_of_are_named(given, pattern, message):
    with pytest.raises(OptionError, match=message):
        wf.prune_layerwise(
            net, *given, pattern=pattern(wf.structures(net, *given)), sparsity=0.5
        )


def test_structures_of_another_network_are_refused(given):
    def other(params, x):
        return jnp.tanh(x @ params["u"]) @ params["v"]

    params = {"u": given[0]["a"], "v": given[0]["d"]}
    found = wf.structures(net, *given)
    with pytest.raises(OptionError, match="structures of 'a', which is not in params"):
        wf.prune_layerwise(other, params, given[1], pattern=found, sparsity=0.5)


@pytest.mark.parametrize("name", ["sparsity", "size"])
def test_numbers_of_numpy_are_numbers(given, name):
    _, masks, _ = prune(given, **{name: 0.5})
    _, same, _ = prune(given, **{name: np.float32(0.5)})
    assert all(np.array_equal(masks[path], same[path]) for path in masks)


def test_budgets_need_structures(given):
    with pytest.raises(OptionError, match="without structures"):
        wf.prune_layerwise(net, *given, macs=0.5)


@pytest.mark.slow
def test_what_is_read_through_a_concatenation_goes(given):
    def net(params, x):
        parts = [jnp.tanh(x @ params["a"]), x, jnp.tanh(x @ params["b"])]
        return jnp.concatenate(parts, -1) @ params["c"]

    shapes = {"a": (8, 8), "b": (8, 6), "c": (22, 2)}
    params = {
        path: normal(number, *shape)
        for number, (path, shape) in enumerate(shapes.items())
    }
    pruned, masks, _ = wf.prune_layerwise(
        net, params, given[1], pattern="structures", sparsity=0.5
    )
    small = wf.shrink(net, pruned, masks, given[1])
    assert {p: a.shape for p, a in small.items()} == {
        "a": (8, 4),
        "b": (8, 3),
        "c": (15, 2),
    }


def test_its_own_masks_are_accepted_where_layers_follow_one_another() -> None:
    """A pruned layer between two others loses rows to one and columns to the other."""
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "c": (8, 7), "o": (7, 3)}
    params = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
    inputs = rng.standard_normal((40, 6)).astype(np.float32)

    def net(params, x):
        h = jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["c"])
        return h @ params["o"]

    options = {"pattern": "structures", "progress": False}
    first, masks, _ = wf.prune_layerwise(net, params, inputs, macs=0.7, **options)
    _, again, _ = wf.prune_layerwise(
        net, first, inputs, macs=0.4, masks=masks, **options
    )
    assert all(not np.any(again[path] & ~masks[path]) for path in masks)
    assert sum(int(m.sum()) for m in again.values()) <= 0.4 * 125
    one = tuple(np.argwhere(masks["c"])[0])
    broken = {**masks, "c": masks["c"].at[one].set(False)}
    with pytest.raises(ValueError, match="'c' have single weights pruned"):
        wf.prune_layerwise(net, first, inputs, macs=0.4, masks=broken, **options)
