import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
from hypothesis import given
from hypothesis import strategies as st

from woodfisher_jax.models import build_model
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import (
    StateDictMismatchError,
    mask_name,
    num_outputs,
    to_state_dict,
    to_variables,
    torch_name,
)
from woodfisher_jax.weights.torch_files import read_state_dict


def shapes_of(name, **settings):
    image = jnp.zeros((1, 28, 28, 1) if name == "mlp" else (1, 32, 32, 3))
    return random_weights.shapes_of(build_model(name, **settings), image)


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), shapes)


def assert_bits_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv1/kernel", "conv1.weight"),
        ("bn1/scale", "bn1.weight"),
        ("layer1/block0/conv1/kernel", "layer1.0.conv1.weight"),
        ("layer3/block11/bn2/bias", "layer3.11.bn2.bias"),
        ("layer2/block0/downsample_conv/kernel", "layer2.0.downsample.0.weight"),
        ("layer2/block0/downsample_bn/var", "layer2.0.downsample.1.running_var"),
        ("bn1/mean", "bn1.running_mean"),
        ("model0/conv_0/kernel", "model.0.0.weight"),
        ("model13/pointwise_3/kernel", "model.13.3.weight"),
        ("model13/bn_4/mean", "model.13.4.running_mean"),
        ("features12/conv/expand_0/conv_0/kernel", "features.12.conv.0.0.weight"),
        ("features12/conv/project_2/kernel", "features.12.conv.2.weight"),
        ("features0/bias", "features.0.bias"),
        ("classifier6/kernel", "classifier.6.weight"),
        ("cls_token", "cls_token"),
        ("pos_embed", "pos_embed"),
        ("patch_embed_proj/bias", "patch_embed.proj.bias"),
        ("blocks10/attn/qkv/kernel", "blocks.10.attn.qkv.weight"),
        ("blocks0/norm1/scale", "blocks.0.norm1.weight"),
    ],
)
def test_names(path, name):
    collection = "batch_stats" if path.endswith(("mean", "var")) else "params"
    assert torch_name(f"{collection}/{path}") == name


def test_a_variable_without_a_name_in_pytorch():
    with pytest.raises(ValueError, match=r"'params/lstm/carry'.*kernel, scale"):
        torch_name("params/lstm/carry")


def test_layouts():
    state_dict = to_state_dict(
        {
            "params": {
                "conv": {"kernel": np.arange(120.0).reshape(2, 3, 4, 5)},
                "fc": {"kernel": jnp.arange(6.0).reshape(2, 3)},
            }
        }
    )
    conv, dense = state_dict["conv.weight"], state_dict["fc.weight"]
    assert conv.shape == (5, 4, 2, 3)
    for h, w, i, o in np.ndindex(2, 3, 4, 5):
        assert conv[o, i, h, w] == np.ravel_multi_index((h, w, i, o), (2, 3, 4, 5))
    np.testing.assert_array_equal(dense, [[0, 3], [1, 4], [2, 5]])
    assert conv.flags.c_contiguous
    assert conv.flags.writeable


def test_a_batch_norm_has_five_tensors_in_pytorch():
    norm = {"scale": np.ones(3), "bias": np.zeros(3)}
    stats = {"mean": np.zeros(3), "var": np.ones(3)}
    plain = {"params": {"norm1": norm}}
    assert to_state_dict(plain).keys() == {"norm1.weight", "norm1.bias"}
    state_dict = to_state_dict(plain | {"batch_stats": {"norm1": stats}})
    assert len(state_dict) == 5
    count = state_dict["norm1.num_batches_tracked"]
    assert (count.dtype, count.shape, int(count)) == (np.int64, (), 0)


@pytest.mark.parametrize(
    "name",
    [
        *["mlp", "logistic_regression", "cifarnet", "resnet20", "mobilenet_v1"],
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet18", "mobilenet_v2", "deit_tiny")
        ),
    ],
)
def test_round_trip_is_bit_exact(name):
    shapes = shapes_of(name)
    variables = random_like(shapes)
    back, masks = to_variables(to_state_dict(variables), shapes)
    assert_bits_equal(back, variables)
    assert masks == {}


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_kernel(shape, dtype, seed):
    bits = np.random.default_rng(seed).bytes(np.prod(shape) * np.dtype(dtype).itemsize)
    kernel = np.frombuffer(bits, dtype).reshape(shape)
    variables = {"params": {"layer": {"kernel": kernel}}}
    back, _ = to_variables(to_state_dict(variables), variables)
    assert_bits_equal(back, variables)


def test_resnet20_checkpoint_is_restored_bit_for_bit(checkpoints_dir):
    original = read_state_dict(checkpoints_dir / "resnet20_cifar10.pth.tar")
    variables, masks = to_variables(original, shapes_of("resnet20"))
    assert masks == {}
    expected = {key.removeprefix("module."): a for key, a in original.items()}
    back = to_state_dict(variables)
    for key in expected:
        if key.endswith("num_batches_tracked"):
            expected[key] = np.zeros((), np.int64)
    assert_bits_equal(back, expected)


def test_mlp_checkpoint_has_masks_in_our_layout(checkpoints_dir):
    original = read_state_dict(checkpoints_dir / "mnist_25_epoch_93.97.ckpt")
    variables, masks = to_variables(original, shapes_of("mlp"))
    assert {path: mask.shape for path, mask in masks.items()} == {
        "fc1/kernel": (784, 40),
        "fc2/kernel": (40, 20),
        "fc3/kernel": (20, 10),
    }
    assert all(mask.dtype == bool and mask.all() for mask in masks.values())
    np.testing.assert_array_equal(
        variables["params"]["fc1"]["kernel"], original["module.fc1._layer.weight"].T
    )


def test_values_take_the_dtype_of_the_model():
    variables = random_like(shapes_of("mlp"))
    state_dict = {
        k: a.astype(jnp.bfloat16) for k, a in to_state_dict(variables).items()
    }
    back, _ = to_variables(state_dict, variables)
    kernel = back["params"]["fc2"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, state_dict["fc2.weight"].T.astype(np.float32))


def wrapped(state_dict, masks):
    """The names of the original's DataParallel model of wrapped layers."""
    names = {}
    for key, array in state_dict.items():
        layer, _, parameter = key.rpartition(".")
        names[f"module.{layer}._layer.{parameter}"] = array
        if key in masks:
            names[f"module.{mask_name(key)}"] = np.float32(masks[key])
    return names


@pytest.mark.parametrize(
    ("name", "settings"), [("mlp", {"use_bias": True}), ("deit_tiny", {"depth": 1})]
)
def test_masks_beside_the_weights(name, settings):
    """Of every kernel, token and bias; of the MLP under the original's names."""
    shapes = shapes_of(name, **settings)
    variables = random_like(shapes)
    rng = np.random.default_rng(2)
    masks = {
        path: rng.integers(0, 2, leaf.shape).astype(bool)
        for path, leaf in leaves_by_path(shapes["params"]).items()
        if not path.endswith("scale")
    }
    stored, beside = to_state_dict(variables), to_state_dict({"params": masks})
    if name == "mlp":
        np.testing.assert_array_equal(beside["fc1.weight"], masks["fc1/kernel"].T)
        stored = wrapped(stored, beside)
    else:
        assert {"cls_token", "head/bias"} <= masks.keys()
        stored |= {mask_name(key): mask for key, mask in beside.items()}
    back, found = to_variables(stored, shapes)
    assert_bits_equal(found, masks)
    weights = leaves_by_path(variables["params"])
    for path, leaf in leaves_by_path(back["params"]).items():
        np.testing.assert_array_equal(
            leaf, np.where(masks.get(path, True), weights[path], 0)
        )


def test_classifier_stored_as_a_1x1_convolution():
    """As in STR's checkpoints, without a bias."""
    shapes = shapes_of("mobilenet_v1")
    variables = random_like(shapes)
    state_dict = to_state_dict(variables)
    state_dict["fc.weight"] = state_dict["fc.weight"][:, :, None, None]
    del state_dict["fc.bias"]
    state_dict["model.0.1.num_batches_tracked"] = np.array(7)
    back, masks = to_variables(
        {f"module.{key}": array for key, array in state_dict.items()}, shapes
    )
    assert masks == {}
    variables["params"]["fc"]["bias"] = np.zeros(1000, np.float32)
    assert_bits_equal(back, variables)


def test_masked_classifier_stored_as_a_1x1_convolution():
    shapes = shapes_of("logistic_regression")
    state_dict = to_state_dict(random_like(shapes))
    mask = np.random.default_rng(0).integers(0, 2, state_dict["fc.weight"].shape)
    stored = {
        "fc._layer.weight": state_dict["fc.weight"][:, :, None, None],
        "fc._layer.bias": state_dict["fc.bias"],
        "fc._weight_mask": mask[:, :, None, None],
    }
    back, masks = to_variables(stored, shapes)
    np.testing.assert_array_equal(masks["fc/kernel"], mask.T == 1)
    np.testing.assert_array_equal(
        back["params"]["fc"]["kernel"], (state_dict["fc.weight"] * mask).T
    )
    np.testing.assert_array_equal(back["params"]["fc"]["bias"], state_dict["fc.bias"])


def test_a_missing_bias_is_missing_where_the_layer_is_dense():
    state_dict = to_state_dict(random_like(shapes_of("logistic_regression")))
    del state_dict["fc.bias"]
    with pytest.raises(StateDictMismatchError, match=r"missing \(1\): fc\.bias"):
        to_variables(state_dict, shapes_of("logistic_regression"))


@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_whole_numbers_are_no_weights(dtype):
    variables = {"params": {"fc": {"kernel": np.zeros((2, 3), np.float32)}}}
    with pytest.raises(ValueError, match=rf"fc.weight has dtype {np.dtype(dtype)}"):
        to_variables({"fc.weight": np.ones((3, 2), dtype)}, variables)


def test_masks_are_zeros_and_ones():
    state_dict = to_state_dict(random_like(shapes_of("mlp")))
    masks = {key: np.ones(array.shape) for key, array in state_dict.items()}
    masks["fc2.weight"][3, 4] = 0.5
    with pytest.raises(ValueError, match=r"'module\.fc2\._weight_mask'.*got 0\.5"):
        to_variables(wrapped(state_dict, masks), shapes_of("mlp"))


def test_mismatch_names_all_three_kinds():
    state_dict = to_state_dict(random_like(shapes_of("mlp")))
    del state_dict["fc1.weight"]
    state_dict["module.fc9.weight"] = np.zeros(3)
    # The same weight twice.
    state_dict["module.fc3.weight"] = state_dict["fc3.weight"]
    state_dict["fc2.weight"] = np.zeros((20, 41), np.float32)
    state_dict["fc3._weight_mask"] = np.ones((20, 10))
    with pytest.raises(StateDictMismatchError) as caught:
        to_variables(state_dict, shapes_of("mlp"))
    message = str(caught.value)
    assert "missing (1): fc1.weight;" in message
    assert "unexpected (2): module.fc9.weight, module.fc3.weight;" in message
    assert "fc2.weight (state dict (20, 41), model (20, 40))" in message
    assert "fc3._weight_mask (state dict (20, 10), model (10, 20))" in message


@pytest.mark.parametrize(
    "renamed",
    [
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "model.{}",
        "net.{}",
        "model._orig_mod.{}",
        "lightning.model.module.{}",
        "_fsdp_wrapped_module._orig_mod.{}",
        "fc.{}",
    ],
)
def test_wrappers_and_a_prefix_are_left_out(renamed):
    shapes = shapes_of("mlp")
    variables = random_like(shapes)
    stored = to_state_dict(variables)
    masks = {mask_name(key): np.ones(array.shape) for key, array in stored.items()}
    both = {renamed.format(key): array for key, array in (stored | masks).items()}
    # As torch.optim.swa_utils.AveragedModel adds it.
    back, found = to_variables(both | {"n_averaged": np.array(3)}, shapes)
    assert_bits_equal(back, variables)
    assert len(found) == len(masks)


def test_wrappers_of_single_modules_are_left_out():
    """Of DataParallel around the features, or torch.compile of a block."""
    shapes = shapes_of("mobilenet_v1")
    stored = to_state_dict(random_like(shapes))
    inner = {k.replace("model.3.", "model.3._orig_mod."): v for k, v in stored.items()}
    assert inner.keys() != stored.keys()
    for prefix in ("", "model."):
        given = {prefix + key: array for key, array in inner.items()}
        back, _ = to_variables(given, shapes)
        assert_bits_equal(back, to_variables(stored, shapes)[0])


def test_a_model_and_its_average_in_one_file_are_named():
    stored = to_state_dict(random_like(shapes_of("mlp")))
    both = {
        prefix + key: array
        for prefix in ("online_model.", "ema_model.module.")
        for key, array in stored.items()
    }
    message = r"several times, under the prefixes 'online_model.', 'ema_model.'"
    with pytest.raises(StateDictMismatchError, match=message):
        to_variables(both, shapes_of("mlp"))
    # With a part of the model beside it the rest is not taken for it.
    part = {"model." + key: array for key, array in stored.items()}
    part["criterion.fc1.weight"] = stored["fc1.weight"]
    with pytest.raises(StateDictMismatchError, match=r"unexpected \(1\): criterion"):
        to_variables(part, shapes_of("mlp"))


def test_a_classifier_of_another_size_stays_as_it_is():
    shapes = shapes_of("resnet20", num_classes=3)
    own = random_like(shapes)
    given = to_state_dict(random_like(shapes_of("resnet20", num_classes=7)))
    given = {f"model.{key}": array for key, array in given.items()}
    kernel = "params/fc/kernel"
    assert num_outputs(given, own)["fc"] == 7
    with pytest.raises(
        StateDictMismatchError, match=r"fc\.weight \(state dict \(7, 64"
    ):
        to_variables(given, own)
    masked = given | {"model.fc._weight_mask": np.ones((7, 64))}
    back, masks = to_variables(masked, own, own=[kernel, "params/fc/bias"])
    assert masks == {}
    assert_bits_equal(back["params"]["fc"], own["params"]["fc"])
    kept = back["params"]["conv1"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kept, given["model.conv1.weight"])
    headless = {key: array for key, array in given.items() if "fc" not in key}
    assert "fc" not in num_outputs(headless, own)
    back, _ = to_variables(headless, own, own=[kernel, "params/fc/bias"])
    assert_bits_equal(back["params"]["fc"], own["params"]["fc"])


def test_positions_of_another_image_size_are_named():
    stored, shapes = (
        random_weights.shapes_of(build_model("vit_tiny", depth=1), np.zeros(shape))
        for shape in ((1, 64, 64, 3), (1, 32, 32, 3))
    )
    with pytest.raises(StateDictMismatchError, match="settings, and the image size"):
        to_variables(to_state_dict(random_like(stored)), shapes)


def test_mismatch_lists_ten_keys_and_counts_the_rest():
    deeper = to_state_dict(random_like(shapes_of("resnet32")))
    with pytest.raises(StateDictMismatchError, match=r"unexpected \(60\): .* 50 more"):
        to_variables(deeper, shapes_of("resnet20"))
    with pytest.raises(StateDictMismatchError, match="missing") as caught:
        to_variables({}, shapes_of("resnet20"))
    assert str(caught.value).count("weight") <= 10
