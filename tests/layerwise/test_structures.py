"""Structures that layer-wise pruning takes from the layers that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf
from woodfisher_jax.layerwise.structures import counts_of, goal_of, readers
from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.structures import Structures, structures


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
        ({}, "sparsity=None with none of macs, size, latency; expected"),
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
        ({"macs": 0.5, "sparsity": 0.5}, "sparsity=0.5 with macs=0.5; expected either"),
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
        (lambda found: found.of(["heads"]), "pattern is a Structures without any"),
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


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"scope": "global", "spread": 0.0}, marks=pytest.mark.slow)],
)
def test_what_is_read_through_a_concatenation_goes(given, options):
    def net(params, x):
        parts = [jnp.tanh(x @ params["a"]), x, jnp.tanh(x @ params["b"])]
        return jnp.concatenate(parts, -1) @ params["c"]

    shapes = {"a": (8, 8), "b": (8, 6), "c": (22, 2)}
    params = {
        path: normal(number, *shape)
        for number, (path, shape) in enumerate(shapes.items())
    }
    pruned, masks, _ = wf.prune_layerwise(
        net, params, given[1], pattern="structures", sparsity=0.5, **options
    )
    small = wf.shrink(net, pruned, masks, given[1])
    assert {p: a.shape for p, a in small.items()} == {
        "a": (8, 4),
        "b": (8, 3),
        "c": (15, 2),
    }


def test_structures_of_several_sizes_go_where_one_layer_reads_them() -> None:
    """Channels of flattened images, a number that is no multiple of their pixels."""

    def net(params, x):
        images = jax.lax.conv_general_dilated(
            x["images"],
            params["k"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        rows = jnp.tanh(x["rows"] @ params["t"])
        pixels = jnp.tanh(images).reshape(len(rows), -1)
        parts = [rows, pixels, jnp.ones((len(rows), 2))]
        return jnp.concatenate(parts, -1) @ params["c"]

    shapes = {"k": (1, 1, 3, 4), "t": (3, 5), "c": (5 + 4 * 6 + 2, 3)}
    params = {p: normal(n, *shape) for n, (p, shape) in enumerate(shapes.items())}
    x = {"images": normal(8, 60, 2, 3, 3), "rows": normal(9, 60, 3)}
    options = {"pattern": "structures", "progress": False}
    pruned, masks, info = wf.prune_layerwise(net, params, x, sparsity=0.5, **options)
    assert info.whole == ()
    small = wf.shrink(net, pruned, masks, x)
    assert {p: a.shape for p, a in small.items()} == {
        "k": (1, 1, 3, 2),
        "t": (3, 2),
        "c": (2 + 2 * 6 + 2, 3),
    }
    wanted = net(params, x)

    def off(other):
        return float(jnp.mean((net(other, x) - wanted) ** 2))

    assert off(pruned) < 0.8 * off(wf.apply_masks(params, masks))
    _, again, _ = wf.prune_layerwise(
        net, pruned, x, macs=0.3, masks=masks, scope="global", **options
    )
    assert all(not np.any(again[path] & ~masks[path]) for path in masks)


@pytest.mark.slow
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


FAMILIES = [("neurons", 40), ("heads", 3), ("neurons", 40), ("heads", 3)]
"""Of two blocks of a transformer."""


@pytest.fixture(scope="module")
def few_heads() -> Structures:
    def net(params, tokens):
        x = params["embed"][tokens] + params["places"]
        for block in (params["block0"], params["block1"]):
            q, k, v = (
                (x @ block[name]).reshape(*x.shape[:2], 3, 8) for name in ("qkv")
            )
            attention = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k), -1)
            heads = jnp.einsum("bhij,bjhd->bihd", attention, v)
            x = block["first"] * x + heads.reshape(x.shape) @ block["o"]
            inner = jax.nn.silu(x @ block["gate"]) * (x @ block["up"])
            x = block["second"] * x + inner @ block["down"]
        return params["last"] * x @ params["embed"].T

    wide = dict.fromkeys("qkvo", (24, 24))
    block = {**wide, "gate": (24, 40), "up": (24, 40), "down": (40, 24)}
    given = {
        "embed": jnp.zeros((50, 24)),
        "places": jnp.zeros((20, 24)),
        "last": jnp.zeros(24),
    }
    for name in ("block0", "block1"):
        given[name] = {path: jnp.zeros(shape) for path, shape in block.items()}
        given[name] |= {"first": jnp.zeros(24), "second": jnp.zeros(24)}
    found = structures(net, given, jnp.zeros((1, 20), int))
    shapes = {
        f"block{i}/{name}": shape for i in range(2) for name, shape in block.items()
    }
    inside = tuple(f for r in readers(found, shapes).values() for f in r.families)
    assert [(family.kind, len(family.units)) for family in inside] == FAMILIES
    return found._replace(families=inside)


@pytest.mark.parametrize(
    ("cost", "share", "left"),
    [
        ("macs", 1.0, [40, 3, 40, 3]),
        ("macs", 0.95, [35, 3, 35, 3]),
        ("macs", 0.9, [30, 3, 31, 3]),
        ("macs", 0.8, [28, 2, 29, 3]),
        ("macs", 0.7, [27, 2, 27, 2]),
        ("macs", 0.6, [17, 2, 18, 2]),
        ("macs", 0.3, [4, 1, 5, 1]),
        ("size", 0.7, [25, 2, 25, 2]),
    ],
)
def test_few_heads_do_not_overshoot(few_heads, cost, share, left) -> None:
    level, budget = goal_of(few_heads, None, {cost: share})
    counts = counts_of(few_heads, level, budget)
    sizes = [size for _, size in FAMILIES]
    assert [n - gone for n, gone in zip(sizes, counts, strict=True)] == left
    # Nor do they where losses decide: no neuron could stay besides.
    losses = {
        unit: family.macs * (8 + unit % 7)
        for family in few_heads.families
        for unit in family.units
    }
    for found in (counts, counts_of(few_heads, level, budget, losses, spread=0.2)):
        gone = {
            unit
            for family, count in zip(few_heads.families, found, strict=True)
            for unit in family.units[:count]
        }
        most = share * few_heads.account().left[cost]
        neuron = getattr(few_heads.families[0], cost)
        assert most - neuron < few_heads.account(gone).left[cost] <= most


def test_copies_go_first_and_the_last_of_them_stays(given) -> None:
    params, x = given
    # Of 16 neurons 15 are worth nothing; which, no one of them tells.
    copies = {**params, "b": jnp.tile(params["b"][:, :1], 16)}

    def two(params, x):
        h = jnp.tanh(x @ params["a"] + params["bias"])
        h = h + jnp.tanh(h @ params["b"]) @ params["c"]
        return (h + jnp.tanh(h @ params["e"]) @ params["f"]) @ params["d"]

    copies |= {"e": params["b"], "f": params["c"]}
    _, masks, info = wf.prune_layerwise(
        two,
        copies,
        x,
        pattern="neurons",
        size=0.6,
        scope="global",
        spread=1.0,
        damping=1e-4,
    )
    small = wf.shrink(two, copies, masks, x)
    assert small["b"].shape == (10, 1)
    # All 15, and the one more that the budget needs.
    assert small["e"].shape == (10, 15)
    assert info.costs["size"].left <= 0.6


def test_what_is_left_of_a_budget_is_said(given) -> None:
    _, masks, info = prune(given, macs=0.7)
    found = wf.structures(net, *given)
    left = found.account(found.gone(masks)).left["macs"] / found.macs
    assert info.costs == {"macs": (0.7, pytest.approx(left))}
    assert f"macs: {left:.4f} left, 0.7 asked" in str(info)
    # The residual stream.
    assert info.whole == ("a",)
    assert "whole    a: no prunable layer alone reads them\n" in str(info)


def test_a_budget_that_what_stays_forbids_names_it(given) -> None:
    message = (
        r"macs=0\.1; with .*more that may go: those made by \['a'\], which wf\.prune"
    )
    with pytest.raises(ValueError, match=message):
        prune(given, macs=0.1)


@pytest.mark.slow
def test_what_a_grouped_convolution_reads_stays() -> None:
    def net(params, x):
        for name, groups in (("a", 1), ("b", 4)):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x,
                    params[name],
                    (1, 1),
                    "SAME",
                    feature_group_count=groups,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
        return x.mean((1, 2)) @ params["c"]

    shapes = {"a": (1, 1, 4, 8), "b": (1, 1, 2, 8), "c": (8, 3)}
    params = {p: normal(n, *shape) for n, (p, shape) in enumerate(shapes.items())}
    _, masks, info = wf.prune_layerwise(
        net, params, normal(9, 20, 4, 4, 4), pattern="structures", sparsity=0.5
    )
    assert [layer.path for layer in info.layers] == ["c"]
    assert info.whole == ("a",)
    assert bool(jnp.all(masks["a"]))
