"""Every kind of layer in every framework: right, or refused by name.

What is found in a network's own layout is compared with what convention says of its
twin, whose layers are unstacked kernels (..., inputs, outputs).
"""

import itertools
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import FRAMEWORKS, KINDS, READ, Network, attended, normal

import woodfisher_jax as wf
from woodfisher_jax.selection.named_patterns import parse
from woodfisher_jax.selection.patterns import groups_of
from woodfisher_jax.tracing.macs import macs_per_weight
from woodfisher_jax.trees.blocks import FlatOrder, flat_order, within_tensors
from woodfisher_jax.weights.sparse_files import load_sparse, save_sparse

PATTERNS = {"N:M": "1:2", "AxB": "2x3", "filters": "filters", "heads": "heads"}
COLUMNS = (*PATTERNS, "blocks", "scope", "kfac", "MACs", "export")

NO_HEADS = {kind for kind in KINDS if kind not in ("attention", "fused qkv")}
REFUSED: dict[str, set[str]] = {
    "N:M": {"depthwise convolution"},  # one input, no two
    "heads": NO_HEADS,
    "kfac": {"stacked by scan", "tied embedding"},  # no single product
}
"""The kinds of layers that a column refuses, whatever the framework."""

SLOW = pytest.mark.slow
# Layers of frameworks end as the plain ones: attention, with its heads, shows it.
QUICK = {("plain", kind) for kind in KINDS} | {("linen", "attention")}
ALL = [
    pytest.param(
        framework,
        kind,
        id=f"{framework}-{kind.replace(' ', '_')}",
        marks=[] if (framework, kind) in QUICK else SLOW,
    )
    for framework in FRAMEWORKS
    for kind in KINDS
]


# One program for each network, in place of one for each operation.
flatten = jax.jit(wf.blocks.flatten, static_argnums=0)
unflatten = jax.jit(wf.blocks.unflatten, static_argnums=0)


@cache
def network(framework: str, kind: str) -> Network:
    return KINDS[kind](framework)


def loss_of(apply):
    return lambda params, x: jnp.mean((apply(params, x) - 1) ** 2)


def axes_of(net: Network) -> dict[str, wf.WeightAxes]:
    return wf.find_axes(loss_of(net.apply), net.params, net.inputs)


def letters_of(net: Network) -> dict[str, wf.WeightAxes]:
    """The axes of the twin's kernels."""
    return {
        name: wf.WeightAxes(kernel.shape, "kkio"[-kernel.ndim :])
        for name, kernel in net.twin().items()
    }


def orders(net: Network) -> tuple[FlatOrder, FlatOrder]:
    """The flat order of the network by tracing, and of its twin by hand."""
    masks = wf.init_masks(net.params, axes=axes_of(net))
    return flat_order(masks, axes_of(net)), flat_order(net.twin(), letters_of(net))


def on_twin(net: Network, order: FlatOrder, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the network's weights, in the flat order of the twin."""
    arrays = unflatten(order, numbers)
    kernels = {
        name: np.asarray(arrays[path]).reshape(-1)[places]
        for name, (path, places) in net.entries().items()
    }
    return np.asarray(flatten(orders(net)[1], kernels))


def assert_same_parts(found: np.ndarray, expected: np.ndarray) -> None:
    """The same weights are together, whatever the numbers are."""
    pairs = {*zip(found.tolist(), expected.tolist(), strict=True)}
    assert len(pairs) == len({*found.tolist()}) == len({*expected.tolist()})


def blocks_of(order: FlatOrder, size: int | None) -> np.ndarray:
    """The block of each weight, with the place in it as digits."""
    numbers, first = np.zeros(order.size, int), 0
    for group in within_tensors(order, size):
        for row in group:
            real = row[row < order.size]
            numbers[real] = first
            first += 1
    return numbers


@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_weights_are_found_and_nothing_else(framework: str, kind: str) -> None:
    net = network(framework, kind)
    masks = wf.init_masks(net.params, axes=axes_of(net))
    assert {*masks} == {path for path, _ in net.kernels.values()}
    assert not any(axes.doubt for axes in axes_of(net).values())


@pytest.mark.parametrize(("framework", "kind"), ALL)
@pytest.mark.parametrize("column", ["N:M", "AxB", "filters"])
def test_patterns_lie_along_inputs_and_outputs(framework, kind, column) -> None:
    net, pattern = network(framework, kind), parse(PATTERNS[column])
    order, twin = orders(net)
    if kind in REFUSED.get(column, ()):
        with pytest.raises(ValueError, match=rf"{order.paths[0]}.*leave it out"):
            groups_of(pattern, order)
        return
    found, expected = groups_of(pattern, order), groups_of(pattern, twin)
    assert_same_parts(on_twin(net, order, found.of), expected.of)


@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_heads_are_found_by_what_the_network_does(framework, kind) -> None:
    net = network(framework, kind)
    order, _ = orders(net)
    if kind in REFUSED["heads"]:
        with pytest.raises(ValueError, match=rf"{order.paths[0]}.*no heads in the"):
            groups_of(parse("heads"), order)
        return
    of = unflatten(order, groups_of(parse("heads"), order).of)
    found, expected = [], []
    for path, heads in net.heads.items():
        found.append(np.asarray(of[path]).reshape(-1))
        expected.append(np.broadcast_to(heads, of[path].shape).reshape(-1))
    assert_same_parts(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_blocks_and_budgets_are_those_of_single_layers(framework, kind) -> None:
    net = network(framework, kind)
    order, twin = orders(net)
    for size in (4, None):
        found = on_twin(net, order, blocks_of(order, size))
        assert_same_parts(found, blocks_of(twin, size))
    layers = [
        np.repeat(np.arange(len(one.layers) - 1), np.diff(one.layers))
        for one in (order, twin)
    ]
    assert_same_parts(on_twin(net, order, layers[0]), layers[1])


@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_macs_are_those_counted_by_hand(framework, kind) -> None:
    net = network(framework, kind)
    inputs = jax.tree.map(lambda a: a[:1], net.inputs)
    assert macs_per_weight(loss_of(net.apply), net.params, inputs) == net.macs


SAVED = [("plain", kind) for kind in ("convolution", "experts by vmap", "sharded")]


@pytest.mark.parametrize(
    ("framework", "kind"),
    [
        pytest.param(
            *case.values,
            id=case.id,
            marks=[] if case.values in SAVED else SLOW,
        )
        for case in ALL
    ],
)
def test_a_saved_network_obeys_its_pattern(framework, kind, tmp_path: Path) -> None:
    net, axes = network(framework, kind), axes_of(network(framework, kind))
    pattern = "filters" if kind in REFUSED["N:M"] else "1:2"
    params, masks, _ = magnitude(net, pattern)
    save_sparse(tmp_path / "net.safetensors", params, masks)
    arrays, kept = load_sparse(tmp_path / "net.safetensors")
    tensors = {path: jnp.asarray(arrays[path]) for path in kept}
    everything = lambda path, leaf: True  # noqa: E731
    wf.patterns.check(tensors, pattern, everything, axes=axes)
    path = next(iter(masks))
    entry = np.unravel_index(
        np.flatnonzero(~np.asarray(masks[path]))[0], masks[path].shape
    )
    wrong = arrays[path].copy()
    wrong[entry] = 1.0
    broken = tensors | {path: jnp.asarray(wrong)}
    with pytest.raises(wf.patterns.PatternError, match=re.escape(path)):
        wf.patterns.check(broken, pattern, everything, axes=axes)


@pytest.mark.filterwarnings("ignore:no weight is left")
def magnitude(net: Network, pattern: str):
    return wf.prune(
        loss_of(net.apply),
        net.params,
        net.inputs,
        method="globalmagni",
        pattern=pattern,
        sparsity=0.5,
    )


# ---------------------------------------------------------------------- whole steps


def masks_on_twin(net: Network, masks) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(masks[path]).reshape(-1)[places]
        for name, (path, places) in net.entries().items()
    }


def assert_pruned_as_its_twin(net: Network, **options) -> None:
    loss = loss_of(net.apply)
    _, masks, _ = wf.prune(loss, net.params, net.inputs, **options)
    _, expected, _ = wf.prune(
        lambda kernels, x: loss(net.joined(kernels), x),
        net.twin(),
        net.inputs,
        axes=letters_of(net),
        prunable=".",
        **options,
    )
    for name, mask in masks_on_twin(net, masks).items():
        np.testing.assert_array_equal(mask, expected[name], err_msg=name)


STEPS = [
    {"block_size": 5, "scope": "layer"},
    {"block_size": None, "scope": "global"},
    {"pattern": "2x3", "block_size": 7, "scope": "layer"},
    {"pattern": "filters", "method": "diagfisher"},
]


@pytest.mark.slow
def test_a_stacked_network_is_pruned_as_its_layers() -> None:
    assert_pruned_as_its_twin(
        network("plain", "stacked by scan"), sparsity=0.5, **STEPS[0]
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::woodfisher_jax.info.PruneWarning")
@pytest.mark.parametrize(("framework", "kind"), ALL)
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_a_network_is_pruned_as_its_twin(framework, kind, options) -> None:
    assert_pruned_as_its_twin(network(framework, kind), sparsity=0.5, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::woodfisher_jax.info.PruneWarning")
@pytest.mark.parametrize(("framework", "kind"), ALL)
def test_kronecker_factors_of_a_network_or_a_refusal(framework, kind) -> None:
    net = network(framework, kind)
    run = lambda: wf.prune(  # noqa: E731
        loss_of(net.apply), net.params, net.inputs, sparsity=0.5, method="kfac"
    )
    # The plain one multiplies three slices of one weight.
    if kind in REFUSED["kfac"] or (framework, kind) == ("plain", "fused qkv"):
        path = next(iter(net.kernels.values()))[0]
        with pytest.raises(ValueError, match=f"kfac: {path!r}.*leave it out"):
            run()
        return
    masks = run()[1]
    assert wf.sparsity(masks) == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------- the table, a fuzz


def test_the_table_of_the_docs_is_what_these_tests_find() -> None:
    page = (Path(__file__).parents[1] / "docs/own_models.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.split("<!-- layouts -->")[1].strip().splitlines()
    ]
    assert rows[0] == ["", *COLUMNS]
    assert rows[2:] == [
        [kind] + ["refused" if kind in REFUSED.get(c, ()) else "right" for c in COLUMNS]
        for kind in KINDS
    ]


@st.composite
def stored(draw, shape: tuple[int, ...]) -> tuple[tuple[int, ...], READ]:
    """A layout for a tensor: its axes in some order, two of them perhaps one."""
    order = draw(st.permutations(range(len(shape))))
    moved = tuple(shape[axis] for axis in order)
    back = tuple(int(i) for i in np.argsort(order))
    joined = draw(st.integers(0, len(shape) - 1))
    kept = moved
    if joined and len(shape) > 2:
        both = moved[joined - 1] * moved[joined]
        kept = (*moved[: joined - 1], both, *moved[joined + 1 :])
    return kept, lambda array: array.reshape(moved).transpose(back)


@st.composite
def networks(draw) -> Network:
    """One to three layers of all kinds in any layout, most axes of one length."""
    width, heads = 4, 2
    scales = jnp.arange(1.0, 4.0)[:, None, None]
    layers = {
        "dense": ((width, width), lambda x, w: jnp.tanh(x @ w)),
        "experts": (
            (3, width, width),
            lambda x, w: jnp.einsum("neti,eio->neto", x[:, None] * scales, w).sum(1),
        ),
        "scan": (
            (3, width, width),
            lambda x, w: jax.lax.scan(lambda h, a: (jnp.tanh(h @ a), None), x, w)[0],
        ),
        "loop": (
            (3, width, width),
            lambda x, w: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]), x),
        ),
        "convolution": (
            (3, width, width),
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
        ),
        "gated": (
            (width, 2 * width),
            lambda x, w: jnp.prod(jnp.stack(jnp.split(x @ w, 2, axis=-1)), axis=0),
        ),
        "attention": ((width, 3 * heads * width), None),
    }
    params, reads, kernels = {}, {}, {}
    chosen = draw(st.lists(st.sampled_from(sorted(layers)), min_size=1, max_size=3))
    for number, kind in enumerate(chosen):
        kept, read = draw(stored(layers[kind][0]))
        path = f"layer{number}"
        params[path], reads[path] = normal(number, *kept), read
        if kind in ("scan", "loop", "experts"):
            for i in range(3):
                kernels[f"{path}_{i}/kernel"] = (path, lambda a, r=read, i=i: r(a)[i])
        else:
            kernels[f"{path}/kernel"] = (path, read)

    def apply(params, x):
        for number, kind in enumerate(chosen):
            w = reads[f"layer{number}"](params[f"layer{number}"])
            if kind == "attention":
                parts = (x @ w).reshape(*x.shape[:2], 3, heads, width)
                q, k, v = (parts[:, :, i] for i in range(3))
                x = attended(q, k, v).sum(2)
            else:
                x = layers[kind][1](x, w)
        return x

    return Network(params, apply, normal(9, 2, width, width), kernels, {})


EXAMPLE = itertools.count()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::woodfisher_jax.info.PruneWarning")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    networks(),
    st.sampled_from([None, "1:2", "2x3", "filters"]),
    st.sampled_from(["global", "layer"]),
    st.sampled_from([3, 8, None]),
    st.sampled_from(["magnitude"] * 8 + ["woodfisherblock", "diagfisher"]),
)
def test_any_layout_is_pruned_as_its_twin(net, pattern, scope, size, method) -> None:
    order, twin = orders(net)
    assert_same_parts(
        on_twin(net, order, blocks_of(order, size)), blocks_of(twin, size)
    )
    options = {"block_size": size, "damping": 1e-2} if "fisherblock" in method else {}
    if method == "magnitude":
        method = {"global": "globalmagni", "layer": "magni"}[scope]
    if next(EXAMPLE) % 10 == 9:
        jax.clear_caches()  # some thousand programs in one process end it
    options |= {"sparsity": 0.5, "pattern": pattern, "scope": scope, "method": method}
    try:
        assert_pruned_as_its_twin(net, **options)
    except wf.CurvatureError:
        # Gradients of a deep network are 1e5. The error says what to do then.
        assert_pruned_as_its_twin(net, **options, solver="dense")
