"""Networks with fewer outputs a layer: equal to masked ones, read off their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_variables

from woodfisher_jax.models import build_model, check_widths, layer_outputs, resized
from woodfisher_jax.models.bert import Bert, BertConfig
from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.models.vit import VisionTransformer
from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1}
LLAMA = LlamaConfig(
    **SIZES, intermediate_size=6, num_attention_heads=4, num_key_value_heads=2
)
VIT = {"width": 8, "num_heads": 2, "depth": 1, "patch_size": 8, "num_classes": 3}


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.parametrize(
    ("name", "widths", "follow"),
    [
        ("mlp", {"fc2": 7}, {"fc3": 10}),
        ("cifarnet", {"conv3": 5, "fc1": 9}, {"fc2": 10}),
        # The first block of a stage has a shortcut of its own, whatever comes in.
        (
            "resnet20",
            {"conv1": 9, "layer2/block0/conv2": 9, "layer2/block1/conv1": 3},
            {
                **{f"layer1/block{i}/conv2": 9 for i in range(3)},
                **{f"layer2/block{i}/conv2": 9 for i in (1, 2)},
                "layer2/block0/downsample_conv": 9,
            },
        ),
        pytest.param(
            "resnet50",
            {"layer1/block0/conv3": 64, "layer1/block1/conv2": 5},
            {
                "layer1/block0/downsample_conv": 64,
                **{f"layer1/block{i}/conv3": 64 for i in (1, 2)},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "vgg11_bn",
            {"features0": 3, "classifier3": 11},
            {"classifier6": 1000},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mobilenet_v1",
            {"model1/pointwise_3": 5},
            {"model2/depthwise_0": 5},
            marks=pytest.mark.slow,
        ),
        # The output of features4 is added to that of features5, and not to its input.
        pytest.param(
            "mobilenet_v2",
            {"features4/conv/project_2": 24, "features5/conv/expand_0/conv_0": 7},
            {
                **{f"features{i}/conv/project_2": 24 for i in (5, 6)},
                "features5/conv/depthwise_1/conv_0": 7,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_widths_are_read_off_shapes(name, widths, follow):
    x = jnp.zeros((1, 32, 32, 3))
    small = shapes(build_model(name, widths=widths), x)
    found = layer_outputs(small)
    assert widths.items() | follow.items() <= found.items()
    check_widths(widths, small)

    dense = build_model(name)
    model = resized(dense, small, x)
    assert dict(model.widths).items() <= found.items()
    # A jitted function may take it as a static argument.
    assert hash(model) != hash(dense)


def without(params, taken, axes):
    """Arrays with some indices left out, and the same with zeros in their place."""
    small, masked = {}, {}
    for path, leaf in leaves_by_path(params).items():
        small[path] = masked[path] = leaf
        for layer, axis, indices in axes:
            if path.startswith(layer):
                axis = axis % leaf.ndim
                kept = np.setdiff1d(np.arange(leaf.shape[axis]), taken[indices])
                small[path] = np.take(leaf, kept, axis)
                mask = np.isin(np.arange(leaf.shape[axis]), kept)
                mask = mask.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
                masked[path] = leaf * mask
    return replace_leaves(params, small), replace_leaves(params, masked)


def columns(head, size, parts=1, heads=2):
    """Where a head is among the outputs of a projection."""
    starts = [part * heads * size + head * size for part in range(parts)]
    return np.concatenate([np.arange(s, s + size) for s in starts])


NETWORKS = {
    "vit": (
        VisionTransformer(**VIT),
        jnp.ones((2, 16, 16, 3)),
        {"qkv": columns(0, 4, parts=3), "head": columns(0, 4), "inside": [3, 17]},
        [
            ("blocks0/attn/qkv", -1, "qkv"),
            ("blocks0/attn/proj/kernel", 0, "head"),
            ("blocks0/mlp/fc1", -1, "inside"),
            ("blocks0/mlp/fc2/kernel", 0, "inside"),
        ],
    ),
    # Queries 0 and 1 share the first head of keys.
    "llama": (
        Llama(LLAMA),
        jnp.arange(10).reshape(2, 5),
        {"q": columns(0, 4), "k": columns(0, 2), "inside": [1]},
        [
            ("model/layers_0/self_attn/q_proj", 1, "q"),
            ("model/layers_0/self_attn/k_proj", 1, "k"),
            ("model/layers_0/self_attn/v_proj", 1, "k"),
            ("model/layers_0/self_attn/o_proj", 0, "q"),
            ("model/layers_0/mlp/gate_proj", 1, "inside"),
            ("model/layers_0/mlp/up_proj", 1, "inside"),
            ("model/layers_0/mlp/down_proj", 0, "inside"),
        ],
    ),
    "bert": (
        Bert(BertConfig(**SIZES, num_attention_heads=2, intermediate_size=6)),
        jnp.arange(10).reshape(2, 5),
        {"head": columns(1, 4), "inside": [0, 5]},
        [
            *(
                (f"encoder/layer_0/attention/self/{n}", -1, "head")
                for n in ("query", "key", "value")
            ),
            ("encoder/layer_0/attention/output/dense/kernel", 0, "head"),
            ("encoder/layer_0/intermediate", -1, "inside"),
            ("encoder/layer_0/output/dense/kernel", 0, "inside"),
        ],
    ),
}


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit", "bert"))],
)
def test_without_heads_and_neurons_it_equals_the_masked_one(name):
    model, x, taken, axes = NETWORKS[name]
    variables, _ = random_variables(model, x)
    small, masked = without(variables["params"], taken, axes)
    found = resized(model, {"params": small}, x)
    given, expected = jax.jit(
        lambda *params: [
            net.apply({"params": p}, x)
            for net, p in zip((found, model), params, strict=True)
        ]
    )(small, masked)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "widths", "words"),
    [
        (VisionTransformer(**VIT), {"blocks0/attn/qkv": 13}, "a multiple of 12, whole"),
        (
            Llama(LLAMA),
            {"model/layers_0/self_attn/q_proj": 6},
            "layers_0/self_attn has 3 heads of queries for 2 of keys; expected as many",
        ),
    ],
)
def test_part_of_a_head_is_refused(model, widths, words):
    x = jnp.zeros((1, 16, 16, 3)) if "blocks0" in str(widths) else jnp.ones((1, 2), int)
    with pytest.raises(ValueError, match=words):
        shapes(model.clone(widths=widths), x)


def test_what_does_not_go_together_is_refused():
    dense, x = build_model("resnet20"), jnp.zeros((1, 32, 32, 3))
    small = shapes(dense, x)
    assert resized(dense, small, x) is dense
    path = "params/layer1/block1/conv2/kernel"
    shape = jax.ShapeDtypeStruct((3, 3, 16, 12), float)
    with pytest.raises(ValueError, match=f"{path}: got .*12.*, expected .*16, 16"):
        resized(dense, replace_leaves(small, {path: shape}), x)

    with pytest.raises(
        ValueError, match=r"block1/conv2'.=12; expected 16, which other"
    ):
        check_widths({"layer1/block1/conv2": 12}, small)
    with pytest.raises(ValueError, match=r"'conv9'.*no such layer; .* as conv1"):
        check_widths({"conv9": 12}, small)
    with pytest.raises(ValueError, match=r"widths=.*expected whole numbers .*by path"):
        build_model("mlp", widths={"fc1": 0})


def test_parameters_alone_in_place_of_variables_are_named() -> None:
    model, x = build_model("resnet20"), jnp.ones((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    message = r"'layer3'\]; expected {'batch_stats': \.\.\., 'params': \.\.\.}"
    with pytest.raises(ValueError, match=message):
        resized(model, variables["params"], x)
