"""The table of models: names, sizes, dtypes, and the original's checkpoints."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from numpy_layers import relu, torch_conv_norm, torch_dense, torch_residual
from random_weights import random_variables, shapes_of

from woodfisher_jax.models import MODELS, build_model, num_parameters
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import to_variables, torch_name
from woodfisher_jax.weights.torch_files import read_state_dict


def cifar_resnet_parameters(depth):
    """Convolutions, shortcuts, two vectors a batch norm, and the dense layer."""
    n = (depth - 2) // 6
    within = 2 * n * 16**2 + (2 * n - 1) * (32**2 + 64**2)
    between = 3 * 16 + 16 * 32 + 32 * 64
    shortcuts = 16 * 32 + 32 * 64
    norms = 16 + 2 * n * (16 + 32 + 64) + 32 + 64
    return 9 * (within + between) + shortcuts + 2 * norms + 64 * 10 + 10


# Trainable parameters, as torchvision, timm and the original count them.
PARAMETERS = {
    "mlp": 32_360,
    "logistic_regression": 7_850,
    "cifarnet": 3 * 32 * 25 + 32 * 32 * 25 + 32 * 64 * 25 + 128 + 576 * 64 + 64 + 650,
    "resnet20": 272_474,
    **{f"resnet{d}": cifar_resnet_parameters(d) for d in (32, 44, 56, 110)},
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}

# One network of each form: the others only have other numbers.
FORMS = [
    *["mlp", "logistic_regression", "cifarnet", "resnet20", "resnet18", "resnet50"],
    *["mobilenet_v1", "mobilenet_v2", "vgg11_bn", "deit_tiny"],
]

# Shapes, in the layout used here, by the names of torchvision and STR; None where there
# is no such tensor.
SHAPES = {
    "mlp": {"fc1.weight": (784, 40), "fc3.weight": (20, 10), "fc1.bias": None},
    "resnet20": {
        "conv1.weight": (3, 3, 3, 16),
        "conv1.bias": None,
        "layer1.0.downsample.0.weight": None,
        "layer2.0.conv1.weight": (3, 3, 16, 32),
        "layer3.0.downsample.0.weight": (1, 1, 32, 64),
        "layer3.0.downsample.1.running_mean": (64,),
        "fc.bias": (10,),
    },
    "resnet18": {
        "layer1.0.downsample.0.weight": None,
        "layer2.0.downsample.0.weight": (1, 1, 64, 128),
    },
    "resnet50": {
        "conv1.weight": (7, 7, 3, 64),
        "layer1.0.conv1.weight": (1, 1, 64, 64),
        "layer1.0.downsample.0.weight": (1, 1, 64, 256),
        "layer3.5.conv2.weight": (3, 3, 256, 256),
        "layer4.2.bn3.running_var": (2048,),
        "fc.weight": (2048, 1000),
    },
    "wide_resnet50_2": {
        "layer2.1.conv2.weight": (3, 3, 256, 256),
        "layer2.1.conv3.weight": (1, 1, 256, 512),
        "layer2.0.downsample.0.weight": (1, 1, 256, 512),
    },
    "mobilenet_v1": {
        "model.2.0.weight": (3, 3, 1, 64),
        "model.2.0.bias": None,
        "model.2.3.weight": (1, 1, 64, 128),
        "model.13.1.running_var": (1024,),
        "model.13.4.bias": (1024,),
        "fc.weight": (1024, 1000),
    },
    "mobilenet_v2": {
        "features.0.0.weight": (3, 3, 3, 32),
        "features.1.conv.0.0.weight": (3, 3, 1, 32),
        "features.1.conv.1.weight": (1, 1, 32, 16),
        "features.2.conv.0.1.running_mean": (96,),
        "features.2.conv.1.0.weight": (3, 3, 1, 96),
        "features.17.conv.2.weight": (1, 1, 960, 320),
        "features.17.conv.3.bias": (320,),
        "features.18.0.weight": (1, 1, 320, 1280),
        "classifier.1.weight": (1280, 1000),
    },
    "vgg11_bn": {
        "features.4.bias": (128,),
        "features.26.running_var": (512,),
        "classifier.0.weight": (25088, 4096),
    },
    **{
        f"vgg{depth}_bn": {
            f"features.{last}.weight": (3, 3, 512, 512),
            f"features.{last + 1}.running_mean": (512,),
            f"features.{last + 3}.weight": None,
        }
        for depth, last in [(13, 31), (16, 40), (19, 49)]
    },
}

# Kernels, and the weights in them, as the original counts them.
KERNELS = {
    "resnet20": (9 * 2 + 1 + 2 + 1, None),
    "resnet50": (54, 25_502_912),
    "mobilenet_v1": (28, 4_209_088),
    "vgg11_bn": (8 + 3, None),
}


def image_shape_of(name):
    """Images on which the layers have the sizes that the parameters are counted for."""
    if name in ("mlp", "logistic_regression"):
        return (28, 28, 1)
    return (224, 224, 3) if name.startswith(("deit", "vit")) else (32, 32, 3)


def shapes(model, name):
    return shapes_of(model, jnp.zeros((1, *image_shape_of(name))))


@cache
def usual_shapes(name):
    return shapes(build_model(name), name)


def torch_shapes(name):
    leaves = leaves_by_path(usual_shapes(name))
    found = {torch_name(path): leaf.shape for path, leaf in leaves.items()}
    assert len(found) == len(leaves)
    return found


def test_every_model_is_counted():
    # Tests of training add a model "net" of their own.
    assert PARAMETERS.keys() == MODELS.keys() - {"net"}


@pytest.mark.parametrize(
    "name",
    [
        # Others than these differ from them in their numbers alone.
        pytest.param(name, marks=[] if name in FORMS else pytest.mark.slow)
        for name in PARAMETERS
    ],
)
def test_number_of_parameters(name):
    variables = usual_shapes(name)
    assert num_parameters(variables["params"]) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_published_checkpoints(name):
    found = torch_shapes(name)
    assert {key: found.get(key) for key in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize("name", KERNELS)
def test_number_of_kernels(name):
    kernels = [shape for shape in torch_shapes(name).values() if len(shape) > 1]
    count, weights = KERNELS[name]
    assert len(kernels) == count
    assert weights in (None, sum(np.prod(shape) for shape in kernels))


def test_deit_has_timms_names():
    block = {
        **{f"norm{i}.{leaf}": (384,) for i in (1, 2) for leaf in ("weight", "bias")},
        "attn.qkv.weight": (384, 1152),
        "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "mlp.fc1.weight": (384, 1536),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (1536, 384),
        "mlp.fc2.bias": (384,),
    }
    assert torch_shapes("deit_small") == {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (16, 16, 3, 384),
        "patch_embed.proj.bias": (384,),
        **{f"blocks.{i}.{name}": block[name] for i in range(12) for name in block},
        "norm.weight": (384,),
        "norm.bias": (384,),
        "head.weight": (384, 1000),
        "head.bias": (1000,),
    }


@pytest.mark.parametrize("name", FORMS)
def test_logits_have_one_row_an_image(name):
    model = build_model(name, num_classes=7)
    x = jax.ShapeDtypeStruct((2, *image_shape_of(name)), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize(
    "name",
    [
        *("cifarnet", "resnet20"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("deit_tiny", "resnet50", "mobilenet_v1", "vgg11_bn")
        ),
    ],
)
def test_mixed_precision_computes_all_but_the_logits_in_it(name):
    model = build_model(name, dtype="bfloat16")
    variables = shapes(model, name)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    apply = partial(model.apply, train=True, capture_intermediates=True, mutable=True)
    logits, updated = jax.eval_shape(
        apply, variables, jnp.zeros((2, *image_shape_of(name)))
    )

    assert logits.dtype == jnp.float32
    results = leaves_by_path(updated.pop("intermediates"))
    in_float32 = [p for p, leaf in results.items() if leaf.dtype != jnp.bfloat16]
    # The last layer's and the whole network's.
    assert len(in_float32) == 2
    assert len(results) > 3
    for leaf in jax.tree.leaves(updated):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize(
    "name", ["vgg11_bn", pytest.param("mobilenet_v2", marks=pytest.mark.slow)]
)
def test_dropout_needs_a_key_in_training_only(name):
    x = jnp.zeros((2, 32, 32, 3))
    model = build_model(name, dropout_rate=0.5)
    variables = shapes(model, name)
    apply = partial(model.apply, mutable=["batch_stats"])
    jax.eval_shape(apply, variables, x)
    train = partial(apply, train=True)
    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(train, variables, x)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(partial(train, rngs=rngs), variables, x)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet20", "bn2"),
        pytest.param("resnet50", "bn3", marks=pytest.mark.slow),
    ],
)
def test_zero_init_residual_zeroes_the_last_norm_of_each_block(name, last):
    model = build_model(name, zero_init_residual=True)

    @jax.jit
    def scales():
        params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        leaves = leaves_by_path(params)
        return {path: leaf for path, leaf in leaves.items() if path.endswith("/scale")}

    for path, scale in scales().items():
        assert np.all(scale == (0 if f"/{last}/" in path else 1)), path


def test_batch_statistics_change_in_training_only():
    model = build_model("resnet20")
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables, _ = random_variables(model, x)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))

    _, frozen = apply(variables, x, train=False, mutable=("batch_stats",))
    unchanged = {"batch_stats": variables["batch_stats"]}
    jax.tree.map(np.testing.assert_array_equal, frozen, unchanged)

    _, updated = apply(variables, x, train=True, mutable=("batch_stats",))
    old = leaves_by_path(variables["batch_stats"])
    for path, leaf in leaves_by_path(updated["batch_stats"]).items():
        assert not np.array_equal(leaf, old[path]), path


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet200", {}, r"mlp, .*resnet20, .*'resnet200'.*mean 'resnet20'"),
        ("mlp", {"depth": 3}, "expected settings among hidden, .*got 'depth'"),
        ("resnet20", {"num_clases": 3}, "Did you mean 'num_classes'"),
        ("resnet20", {"depth": 32}, "got 'depth'"),
    ],
)
def test_names_and_settings_that_do_not_exist(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **settings)


def mlp_reference(x, state):
    x = x.reshape(len(x), -1)
    for layer in ("fc1", "fc2"):
        x = relu(x @ state[f"{layer}._layer.weight"].T)
    return x @ state["fc3._layer.weight"].T


def resnet20_reference(x, state):
    x = relu(torch_conv_norm(x, state, "conv1", "bn1", padding=1))
    for layer, block in np.ndindex(3, 3):
        strides = (2 if layer > 0 and block == 0 else 1, 1)
        x = torch_residual(x, state, f"layer{layer + 1}.{block}.", (3, 3), strides)
    return torch_dense(x.mean((1, 2)), state, "fc")


# File, data set, mean and standard deviation of the original's normalisation, images of
# the test split that the original's checkpoint gets right.
CHECKPOINTS = {
    "mlp": ("mnist_25_epoch_93.97.ckpt", "mnist", 0.1307, 0.3081, 9_397),
    "resnet20": ("resnet20_cifar10.pth.tar", "cifar10", 0.5, 0.5, 9_143),
}


def apply_checkpoint(name, count, tfds_dir, checkpoints_dir):
    """The test split's first images and labels, the state dict, and the logits."""
    file, data_set, mean, std, _ = CHECKPOINTS[name]
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.data_source(data_set, split="test", data_dir=str(tfds_dir))
    records = source.__getitems__(range(count))
    images = (np.stack([record["image"] for record in records]) / 255.0 - mean) / std
    labels = np.array([record["label"] for record in records])
    state = read_state_dict(checkpoints_dir / file)
    model = build_model(name)
    variables, _ = to_variables(state, shapes(model, name))
    apply = jax.jit(model.apply)
    batches = np.split(np.float32(images), max(1, count // 500))
    return images, labels, state, np.concatenate([apply(variables, x) for x in batches])


@pytest.mark.parametrize(
    ("name", "reference"), [("mlp", mlp_reference), ("resnet20", resnet20_reference)]
)
def test_forward_pass_equals_an_independent_one(
    name, reference, tfds_dir, checkpoints_dir
):
    images, _, state, logits = apply_checkpoint(name, 5, tfds_dir, checkpoints_dir)
    state = {k.removeprefix("module."): np.float64(a) for k, a in state.items()}
    np.testing.assert_allclose(logits, reference(images, state), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("resnet20", marks=pytest.mark.slow)]
)
def test_accuracy_of_the_originals_checkpoints(name, tfds_dir, checkpoints_dir):
    _, labels, _, logits = apply_checkpoint(name, 10_000, tfds_dir, checkpoints_dir)
    assert np.sum(logits.argmax(-1) == labels) == CHECKPOINTS[name][-1]
