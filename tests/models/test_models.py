from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from numpy_layers import convolve, relu, torch_batch_norm, torch_convolution

from woodfisher_jax.models import MODELS, build_model, num_parameters
from woodfisher_jax.models.resnet import BasicBlock
from woodfisher_jax.torch_weights import read_state_dict, to_variables
from woodfisher_jax.trees.paths import leaves_by_path

MNIST_SHAPE = (28, 28, 1)
CIFAR_SHAPE = (32, 32, 3)


# Trainable parameters, as torchvision, timm and the original count them.
PARAMETERS = {
    "mlp": 32_360,
    "logistic_regression": 7_850,
    "cifarnet": 3 * 32 * 25 + 32 * 32 * 25 + 32 * 64 * 25 + 128 + 576 * 64 + 64 + 650,
    "resnet20": 272_474,
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
}

# One network of each form: the others only have other numbers.
FORMS = [
    *["mlp", "logistic_regression", "cifarnet", "resnet20", "resnet18", "resnet50"],
    *["mobilenet_v1", "mobilenet_v2", "vgg11_bn", "deit_tiny"],
]


def image_shape_of(name):
    """Images on which the layers have the sizes that the parameters are counted for."""
    if name in ("mlp", "logistic_regression"):
        return MNIST_SHAPE
    return (224, 224, 3) if name.startswith("deit") else CIFAR_SHAPE


def shapes(model, image_shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    variables = shapes(build_model(name), image_shape_of(name))
    assert num_parameters(variables["params"]) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def resnet_parameters(depth, num_classes=10):
    """Counted layer by layer: convolutions, two vectors a batch norm, the dense one."""
    blocks = (depth - 2) // 6
    total = 3 * 16 * 9 + 2 * 16
    before = 16
    for channels in (16, 32, 64):
        total += before * channels * 9 + (2 * blocks - 1) * channels**2 * 9
        total += 2 * blocks * 2 * channels
        if channels != before:
            total += before * channels + 2 * channels
        before = channels
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_resnets_have_the_parameters_of_their_depth(depth):
    variables = shapes(build_model(f"resnet{depth}"), CIFAR_SHAPE)
    assert num_parameters(variables["params"]) == resnet_parameters(depth)


def test_mlp_names_and_shapes():
    model = build_model("mlp", hidden=(7,), num_classes=3, use_bias=True)
    variables = shapes(model, MNIST_SHAPE)
    assert {p: leaf.shape for p, leaf in leaves_by_path(variables).items()} == {
        "params/fc1/bias": (7,),
        "params/fc1/kernel": (784, 7),
        "params/fc2/bias": (3,),
        "params/fc2/kernel": (7, 3),
    }


def test_resnet_names():
    variables = leaves_by_path(shapes(build_model("resnet20"), CIFAR_SHAPE))
    assert variables["params/conv1/kernel"].shape == (3, 3, 3, 16)
    assert variables["params/layer1/block0/conv1/kernel"].shape == (3, 3, 16, 16)
    assert variables["params/layer2/block0/conv1/kernel"].shape == (3, 3, 16, 32)
    downsample = variables["params/layer3/block0/downsample_conv/kernel"]
    assert downsample.shape == (1, 1, 32, 64)
    assert variables["batch_stats/layer3/block0/downsample_bn/mean"].shape == (64,)
    assert variables["params/fc/bias"].shape == (10,)
    # 9 blocks with two convolutions and norms each, the first pair, two shortcuts.
    assert sum(p.endswith("kernel") for p in variables) == 9 * 2 + 1 + 2 + 1
    assert sum(p.endswith("/mean") for p in variables) == 9 * 2 + 1 + 2
    assert "params/layer1/block0/downsample_conv/kernel" not in variables
    assert not any(p.endswith("conv1/bias") for p in variables)


@pytest.mark.parametrize("name", FORMS)
def test_logits_have_one_row_an_image(name):
    model = build_model(name, num_classes=7)
    x = jax.ShapeDtypeStruct((2, *image_shape_of(name)), jnp.float32)
    logits = jax.eval_shape(model.apply, shapes(model, image_shape_of(name)), x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize(
    "name",
    ["cifarnet", "resnet20", "resnet50", "mobilenet_v1", "vgg11_bn", "deit_tiny"],
)
def test_mixed_precision_computes_all_but_the_logits_in_it(name):
    model = build_model(name, dtype="bfloat16")
    variables = shapes(model, image_shape_of(name))
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


@pytest.mark.parametrize("name", ["mobilenet_v2", "vgg11_bn"])
def test_dropout_needs_a_key_in_training_only(name):
    x = jnp.zeros((2, *CIFAR_SHAPE))
    model = build_model(name, dropout_rate=0.5)
    variables = shapes(model, CIFAR_SHAPE)
    apply = partial(model.apply, mutable=["batch_stats"])
    jax.eval_shape(apply, variables, x)
    train = partial(apply, train=True)
    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(train, variables, x)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(partial(train, rngs=rngs), variables, x)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_zero_init_residual_zeroes_the_last_norm_of_each_block(name):
    model = build_model(name, zero_init_residual=True)
    ones_and_zeros = jax.jit(
        lambda key: scales(model.init(key, jnp.zeros((1, 32, 32, 3))))
    )
    for path, scale in ones_and_zeros(jax.random.key(0)).items():
        last = "bn3" if name == "resnet50" else "bn2"
        assert np.all(scale == (0 if f"/{last}/" in path else 1)), path


def scales(variables):
    leaves = leaves_by_path(variables["params"])
    return {path: leaf for path, leaf in leaves.items() if path.endswith("/scale")}


def random_variables(model, image_shape, seed=0):
    """Values for every variable, drawn in NumPy: compiling init takes seconds."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.05, 0.15, leaf.shape).astype(np.float32),
        shapes(model, image_shape),
    )


def test_batch_statistics_change_in_training_only():
    model = build_model("resnet20")
    variables = random_variables(model, CIFAR_SHAPE)
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))

    _, frozen = apply(variables, x, train=False, mutable=("batch_stats",))
    unchanged = {"batch_stats": variables["batch_stats"]}
    jax.tree.map(np.testing.assert_array_equal, frozen, unchanged)

    _, updated = apply(variables, x, train=True, mutable=("batch_stats",))
    old = leaves_by_path(variables["batch_stats"])
    for path, leaf in leaves_by_path(updated["batch_stats"]).items():
        assert not np.array_equal(leaf, old[path]), path
    first = convolve(x, np.float64(variables["params"]["conv1"]["kernel"]), 1, 1)
    expected = 0.9 * old["bn1/mean"] + 0.1 * first.mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["bn1"]["mean"], expected, 1e-5)


def test_convolutions_start_from_he_normal_by_output():
    x = jnp.zeros((1, 1, 1, 64))
    kernel = BasicBlock(64).init(jax.random.key(0), x)["params"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    # A truncated normal would end at about 2.3 standard deviations.
    assert np.abs(kernel).max() > 3.5 * np.std(kernel)


def test_every_row_of_the_table_builds():
    for name in MODELS:
        assert build_model(name, num_classes=3).num_classes == 3


def test_unknown_model_lists_the_models_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"mlp, .*resnet20, .*'resnet200'.*mean 'resnet20'"
    ):
        build_model("resnet200")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mlp", {"depth": 3}, "expected settings among hidden, .*got 'depth'"),
        ("resnet20", {"num_clases": 3}, "Did you mean 'num_classes'"),
        ("resnet20", {"depth": 32}, "got 'depth'"),
    ],
)
def test_settings_that_a_model_does_not_take(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **settings)


@pytest.mark.parametrize("depth", [18, 21, 0])
def test_depth_must_be_one_of_the_papers(depth):
    model = MODELS["resnet20"](depth=depth)
    with pytest.raises(ValueError, match=f"20, 32, 44, 56, 110.*got {depth}"):
        shapes(model, CIFAR_SHAPE)


# An independent forward pass, in float64 and in PyTorch's names and layouts.


def mlp_reference(state, x):
    x = x.reshape(len(x), -1)
    x = relu(x @ state["fc1._layer.weight"].T)
    x = relu(x @ state["fc2._layer.weight"].T)
    return x @ state["fc3._layer.weight"].T


def resnet20_reference(state, x):
    x = relu(torch_batch_norm(torch_convolution(x, state, "conv1", 1, 1), state, "bn1"))
    for layer in (1, 2, 3):
        for block in range(3):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = torch_convolution(x, state, f"{name}.conv1", stride, 1)
            y = relu(torch_batch_norm(y, state, f"{name}.bn1"))
            y = torch_convolution(y, state, f"{name}.conv2", 1, 1)
            y = torch_batch_norm(y, state, f"{name}.bn2")
            if stride == 2:
                x = torch_convolution(x, state, f"{name}.downsample.0", 2, 0)
                x = torch_batch_norm(x, state, f"{name}.downsample.1")
            x = relu(x + y)
    return x.mean((1, 2)) @ state["fc.weight"].T + state["fc.bias"]


CASES = {
    "mlp": (
        "mnist",
        MNIST_SHAPE,
        (0.1307, 0.3081),
        "mnist_mlpnet_93.97.npz",
        mlp_reference,
    ),
    "resnet20": (
        "cifar10",
        CIFAR_SHAPE,
        (0.5, 0.5),
        "resnet20_cifar10.npz",
        resnet20_reference,
    ),
}


def read_test_split(folder, data_set, count, normalisation):
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.data_source(data_set, split="test", data_dir=str(folder))
    records = source.__getitems__(range(count))
    images = np.stack([record["image"] for record in records])
    labels = np.array([record["label"] for record in records])
    mean, std = normalisation
    return (images / 255.0 - mean) / std, labels


@pytest.mark.parametrize("name", CASES)
def test_forward_pass_equals_an_independent_one(name, tfds_dir, checkpoints_dir):
    data_set, image_shape, normalisation, file, reference = CASES[name]
    images, _ = read_test_split(tfds_dir, data_set, 5, normalisation)
    with np.load(checkpoints_dir / file) as arrays:
        state = {k.removeprefix("module."): np.float64(arrays[k]) for k in arrays}
    model = build_model(name)
    variables, _ = to_variables(state, shapes(model, image_shape))

    logits = jax.jit(model.apply)(variables, np.float32(images))

    np.testing.assert_allclose(logits, reference(state, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "file", "correct"),
    [
        ("mlp", "mnist_25_epoch_93.97.ckpt", 9_397),
        ("resnet20", "resnet20_cifar10.pth.tar", 9_143),
    ],
)
def test_accuracy_of_the_originals_checkpoints(
    name, file, correct, tfds_dir, checkpoints_dir
):
    data_set, image_shape, normalisation, _, _ = CASES[name]
    images, labels = read_test_split(tfds_dir, data_set, 10_000, normalisation)
    model = build_model(name)
    state = read_state_dict(checkpoints_dir / file)
    variables, _ = to_variables(state, shapes(model, image_shape))
    apply = jax.jit(model.apply)

    batches = np.split(np.float32(images), 20)
    predicted = np.concatenate([apply(variables, x).argmax(-1) for x in batches])

    assert np.sum(predicted == labels) == correct
