"""Structures of networks: counted by hand, kinds, tables, and what stays whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.models import build_model
from woodfisher_jax.selection.structures import structures


def shape(*lengths: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, dtype)


def of_model(name: str, size: int, **settings):
    model = build_model(name, **settings)
    x = shape(1, size, size, 3)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return structures(lambda p, x: model.apply(p, x, train=False), params, x)


# The stream of a stage is one family, for every block adds to it: 5 with the stem. The
# two convolutions within each of 3 + 4 + 6 + 3 blocks are a family each.
WITHIN = [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6
RESNET_50 = [64, 256, 512, 1024, 2048, *WITHIN]

# Blocks of a width are added up: 7 widths. The wide part of a block is six times what
# goes into it, and its depthwise convolution has no channels of its own; the first
# block has no wide part, and shares the stem's 32. Then the last convolution.
NARROW = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3
MOBILENET_V2 = [32, *(6 * n for n in NARROW), 16, 24, 32, 64, 96, 160, 320, 1280]

# A stream a stage, to which the channels belong that its shortcuts pad with zeros; one
# convolution within each of 3 x 3 blocks.
RESNET_20 = [16, 32, 64, *[16] * 3, *[32] * 3, *[64] * 3]

# Every block has 6 heads and 4 x 384 neurons. The stream stays, for layer norms take
# means over it.
VIT_SMALL = 12 * [6, 1536]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "by_hand", "total"),
    [
        ("resnet20", RESNET_20, 448),
        ("resnet50", RESNET_50, 11_456),
        ("mobilenet_v2", MOBILENET_V2, 9_128),
        ("vit_small", VIT_SMALL, 18_504),
    ],
)
def test_structures_of_large_networks_are_those_counted_by_hand(name, by_hand, total):
    found = of_model(name, 224)
    assert sorted(len(f.units) for f in found.families) == sorted(by_hand)
    assert found.number == sum(by_hand) == total


def gated_attention(params, x):
    """A head of two, and a gated MLP with both halves in one tensor."""
    q, k, v = ((x @ params[n]).reshape(*x.shape[:2], 2, 3) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*x.shape[:2], -1)
    x = x + mixed @ params["o"]
    up, gate = jnp.split(x @ params["up"], 2, axis=-1)
    return x + (up * gate) @ params["down"]


PARAMS = {
    **{name: shape(4, 6) for name in "qkv"},
    "o": shape(6, 4),
    "up": shape(4, 10),
    "down": shape(5, 4),
    "unused": shape(4, 4),
}


@pytest.fixture(scope="module")
def found():
    return structures(gated_attention, PARAMS, shape(2, 7, 4))


def test_a_family_says_what_goes_and_what_that_saves(found) -> None:
    neurons, heads = found.families
    assert [(f.kind, len(f.units)) for f in found.families] == [
        ("neurons", 5),
        ("heads", 2),
    ]
    members = {(m.path, m.axis, m.role): m.entries.tolist() for m in heads.members}
    assert members == {
        **{(n, 1, "outputs"): [[0, 1, 2], [3, 4, 5]] for n in "kqv"},
        ("o", 0, "inputs"): [[0, 1, 2], [3, 4, 5]],
    }
    # Four weights of 4 x 3; each of 7 positions, and 7 x 7 x 3 scores and sums.
    assert (heads.size, heads.macs) == (48, 7 * 48 + 2 * 7 * 7 * 3)
    by_axis = {(m.path, m.axis): m.entries.tolist() for m in neurons.members}
    assert by_axis["up", 1] == [[i, i + 5] for i in range(5)]
    assert (neurons.size, neurons.macs) == (12, 7 * 12)
    assert found.size == 4 * 24 + 40 + 20 + 16
    assert found.macs == 7 * (4 * 24 + 40 + 20) + 2 * 7 * 7 * 6


def test_constants_that_a_weight_reads_stay() -> None:
    def net(params, x):
        h = jnp.tanh(x @ params["a"])
        parts = [jnp.ones((len(x), 2)), jnp.pad(h, ((0, 0), (0, 3))), jnp.arange(5) * x]
        return jnp.concatenate(parts, -1) @ params["b"]

    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((2 + 4 + 3 + 5, 3))}
    found = structures(net, params, jnp.ones((2, 5)))
    assert [family.name for family in found.families] == ["a"]
    assert found.number == 4
    # Rows of zeros that read them are left in place.
    masks = {"b": jnp.ones((14, 3), bool).at[jnp.array([0, 2, 3, 6, 8])].set(False)}
    pruned = wf.apply_masks(params, masks)
    small = wf.shrink(net, pruned, masks, jnp.ones((2, 5)))
    assert {path: a.shape for path, a in small.items()} == {"a": (5, 2), "b": (12, 3)}


def test_what_stays_whole_has_a_reason(found) -> None:
    reasons = {(w.path, w.axis): w.reason for w in found.whole}
    assert reasons.keys() == {
        *((n, 0) for n in "kqv"),
        ("o", 1),
        ("up", 0),
        ("down", 1),
    }
    assert {*reasons.values()} == {"belongs to the inputs"}


def test_weights_of_what_is_not_returned_stay() -> None:
    def net(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        hidden @ params["unread"]
        return hidden @ params["c"]

    params = {"a": jnp.ones((3, 4)), "unread": jnp.ones((4, 5)), "c": jnp.ones((4, 2))}
    found = wf.structures(net, params, jnp.ones((2, 3)))
    (family,) = found.families
    assert {(m.path, m.axis) for m in family.members} == {("a", 1), ("c", 0)}
    reasons = {w.axis: w.reason for w in found.whole if w.path == "unread"}
    assert reasons == dict.fromkeys((0, 1), "is read by nothing that is returned")


def test_masks_take_structures_out_and_tell_which_are_gone(found) -> None:
    neurons, heads = found.families
    gone = {heads.units[1], neurons.units[3]}
    masks = found.masks({p: np.ones(a.shape, bool) for p, a in PARAMS.items()}, gone)
    assert masks["q"].sum() == 12
    assert masks["up"].sum(0).tolist() == [4, 4, 4, 0, 4] * 2
    assert masks["unused"].all()
    for role in ("inputs", "outputs"):
        assert found.gone(masks, role) == gone
    only = {"down": masks["down"]}
    assert found.gone(only) == {neurons.units[3]}
    assert found.gone(only, "outputs") == set()


def test_the_table_has_a_line_for_each_family_and_reason(found) -> None:
    lines = str(found).splitlines()
    assert lines[0].startswith("7 structures; 172 parameters, ")
    assert [line.split()[:3] for line in lines[4:6]] == [
        ["up", "neurons", "5"],
        ["k", "and", "2"],  # more, such as v
    ]
    assert any(line.endswith(": belongs to the inputs") for line in lines)
    assert [f.kind for f in found.of(["heads"]).families] == ["heads"]
    kinds = iter(["heads", "neurons"])
    assert [f.kind for f in found.of(kinds).families] == ["neurons", "heads"]


@pytest.mark.parametrize("kinds", ["heads", ["head"], ["neurons", "filters"]])
def test_kinds_that_do_not_exist_are_refused(found, kinds) -> None:
    with pytest.raises(wf.OptionError, match=r"kinds=.*expected a list of some of"):
        found.of(kinds)


@pytest.mark.parametrize(
    ("net_fn", "params", "inputs", "message"),
    [
        (PARAMS, PARAMS, shape(2, 7, 4), "is of type dict; expected a function"),
        (gated_attention, PARAMS, shape(), "no array with examples along its first"),
        (gated_attention, PARAMS, shape(0, 7, 4), r"inputs=float32\[0, 7, 4\]"),
        (
            gated_attention,
            PARAMS,
            iter([shape(2, 7, 4)]),
            "inputs=a list_iterator has no array",
        ),
        (gated_attention, PARAMS | {"e": 0.1}, shape(2, 7, 4), "a float at 'e'"),
    ],
)
def test_what_cannot_be_traced_is_named(net_fn, params, inputs, message) -> None:
    with pytest.raises(ValueError, match=message):
        wf.structures(net_fn, params, inputs)


def test_a_vector_and_a_table_that_read_are_known() -> None:
    def net(params, x):
        h = jnp.tanh(params["table"][x] * params["scale"])
        return h @ params["vector"], h @ params["table"].T

    params = {"table": shape(9, 4), "scale": shape(4), "vector": shape(4)}
    found = structures(net, params, shape(2, 5, dtype=jnp.int32))
    (family,) = found.families
    assert {m.path: m.role for m in family.members} == {
        "table": "inputs",
        "scale": "",
        "vector": "inputs",
    }
    masks = {"vector": np.array([False, True, True, True])}
    assert found.gone(masks) == set()


def test_roles_are_known_of_tensors_in_several_products_or_after_others() -> None:
    """A decoder that is the encoder turned, and a weight plus one of low rank."""

    def net(params, x):
        h = jnp.tanh(x @ (params["w"] + params["u"] @ params["v"]))
        return h @ params["w"].T

    params = {"u": shape(6, 2), "v": shape(2, 4), "w": shape(6, 4)}
    (family,) = structures(net, params, shape(2, 6)).families
    assert {(m.path, m.axis): m.role for m in family.members} == {
        ("v", 1): "outputs",
        ("w", 1): "both",
    }


@pytest.mark.parametrize("flat", [True, False])
def test_heads_that_meet_one_head_of_keys_are_heads(flat) -> None:
    def net(params, x):
        queries = jnp.tensordot(x, params["q"], 1).reshape(*x.shape[:2], 3, 4)
        keys, values = x @ params["k"], x @ params["v"]
        scores = jnp.einsum("bthd,bsd->bhts", queries, keys)
        mixed = jnp.einsum("bhts,bsd->bthd", jax.nn.softmax(scores), values)
        if flat:
            return mixed.reshape(*x.shape[:2], -1) @ params["o"]
        return jnp.einsum("bthd,hde->bte", mixed, params["o"])

    params = {"q": shape(6, 12), "k": shape(6, 4), "v": shape(6, 4), "o": shape(12, 6)}
    if not flat:
        params |= {"q": shape(6, 3, 4), "o": shape(3, 4, 6)}
    family, *others = structures(net, params, shape(2, 5, 6)).families
    assert (family.kind, len(family.units)) == ("heads", 3)
    assert {m.path for m in family.members} == {"q", "o"}
    # Values of a head may go in all of them at once, where they have an axis.
    assert [(f.kind, f.name, len(f.units)) for f in others] == (
        [] if flat else [("neurons", "v", 4)]
    )


def test_heads_of_flattened_weights_share_repeated_keys() -> None:
    """The weights have axes of heads, of queries and of keys, and are flattened."""

    def net(params, x):
        def heads(name: str, number: int):
            h = x @ params[name].reshape(6, -1)
            h = h.reshape(*x.shape[:2], number, 4)
            return jnp.repeat(h, 6 // number, axis=2)

        queries, keys, values = heads("q", 6), heads("k", 3), heads("v", 3)
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values)
        return mixed.reshape(*x.shape[:2], -1) @ params["o"].reshape(-1, 6)

    params = {"q": shape(6, 6, 4), "k": shape(6, 3, 4), "v": shape(6, 3, 4)}
    params["o"] = shape(6, 4, 6)
    families = structures(net, params, shape(2, 5, 6)).families
    assert [(f.kind, len(f.units)) for f in families] == [("heads", 3), ("neurons", 4)]
    assert {m.path for m in families[0].members} == {*"qkvo"}


@pytest.mark.parametrize("flat", [False, True])
def test_outputs_of_a_weight_that_is_made_of_activations_are_no_heads(flat) -> None:
    def net(params, inputs):
        context, x = inputs
        made = (context @ params["make"]).reshape(-1, 6, 5)
        x = jnp.einsum("bti,bio->bto", jnp.tanh(x @ params["a"]), made)
        return (x.reshape(len(x), -1) if flat else x) @ params["c"]

    params = {"make": shape(4, 30), "a": shape(3, 6), "c": shape(35 if flat else 5, 2)}
    (family,) = structures(net, params, (shape(2, 4), shape(2, 7, 3))).families
    assert (family.kind, family.name, len(family.units)) == ("neurons", "make", 5)


def test_values_of_linear_attention_are_no_heads() -> None:
    def net(params, x):
        keys, values = x @ params["k"], x @ params["v"]
        state = jnp.einsum("bte,btf->bef", keys, values)
        return jnp.einsum("bte,bef->btf", x @ params["q"], state) @ params["o"]

    params = {"q": shape(6, 4), "k": shape(6, 4), "v": shape(6, 5), "o": shape(5, 6)}
    (family,) = structures(net, params, shape(2, 5, 6)).families
    assert (family.kind, len(family.units)) == ("neurons", 5)


def test_rows_of_the_table_say_what_makes_the_structures():
    def net(params, x):
        h = jax.nn.relu(x @ params["b"]["value"])
        h = h + jax.nn.relu(h @ params["a"]["value"])
        return jax.nn.relu(h @ params["c"]) @ params["d"]

    shapes = {"a": (4, 4), "b": (3, 4), "c": (4, 5), "d": (5, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params |= {name: {"value": params[name]} for name in "ab"}
    table = str(structures(net, params, jnp.ones((1, 3)))).splitlines()
    rows = [line.split("  ") for line in table[2:6]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["made by", "kind", "number", "one saves:"],
        ["parameters", "MACs", "in tensors"],
        ["a and 1 more", "neurons", "4", "15", "15", "3"],
        ["c", "neurons", "5", "6", "6", "2"],
    ]
    assert "b, axis 0: belongs to the inputs" in table
