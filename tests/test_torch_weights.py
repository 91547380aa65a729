"""Weights of files and runs as PyTorch reads them, restored bit for bit."""

import re
from pathlib import Path

import numpy as np
import pytest
from random_weights import random_variables, shapes_of
from saved_runs import random_network, save_run

from woodfisher_jax.models import build_model
from woodfisher_jax.torch_weights import cli, convert
from woodfisher_jax.training.resuming.saved_run import read_weights
from woodfisher_jax.weights.files import load_safetensors, save_safetensors
from woodfisher_jax.weights.state_dicts import to_state_dict, to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

RESNET = {"name": "resnet20", "num_classes": 7}


@pytest.fixture(scope="module")
def network() -> tuple:
    return random_network("resnet20", (32, 32, 3), 0.9, num_classes=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, network: tuple) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), RESNET, {3: network})


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == np.asarray(array).tobytes(), key


def test_a_run_is_written_and_restored_bit_for_bit(
    folder: Path, network: tuple, tmp_path: Path
) -> None:
    variables, masks = network
    out, beside = tmp_path / "out.safetensors", tmp_path / "masks.safetensors"
    convert(folder, out, masks=beside)
    assert_same(read_state_dict(out), to_state_dict(variables))
    kept = read_state_dict(beside)
    assert kept.keys() < to_state_dict(variables).keys()
    mask = kept["layer2.0.downsample.0.weight"]
    expected = np.asarray(masks["layer2/block0/downsample_conv/kernel"])
    np.testing.assert_array_equal(mask, expected.transpose(3, 2, 0, 1))
    # As the initial weights of another run.
    model = build_model("resnet20", num_classes=7)
    shapes = shapes_of(model, np.zeros((1, 32, 32, 3), np.float32))
    for source, found_masks in ((out, {}), (folder, masks)):
        back, found = to_variables(read_weights(source), shapes)
        assert_same(to_state_dict(back), to_state_dict(variables))
        assert found.keys() == found_masks.keys()
        for path, mask in found.items():
            np.testing.assert_array_equal(mask, masks[path])
    # What the loaders of other libraries read.
    assert load_safetensors(out)[1] == {"format": "pt"}


def test_a_file_is_written_under_the_models_names(tmp_path: Path) -> None:
    model = build_model("mlp", hidden=(5,))
    variables, _ = random_variables(model, np.zeros((1, 4, 4, 1)))
    stored = to_state_dict(variables)
    mask = np.random.default_rng(0).integers(0, 2, (5, 16)).astype(np.float32)
    wrapped = {
        "module.fc1._layer.weight": stored["fc1.weight"],
        "module.fc1._weight_mask": mask,
        "module.fc2._layer.weight": stored["fc2.weight"],
    }
    source, out, beside = (tmp_path / f"{n}.safetensors" for n in "abc")
    save_safetensors(source, wrapped, {})
    convert(
        source,
        out,
        model="mlp",
        # Of which the file has 5 outputs.
        settings={"hidden": (7,)},
        image_shape=(4, 4, 1),
        masks=beside,
    )
    masked = stored | {"fc1.weight": np.where(mask == 1, stored["fc1.weight"], 0)}
    assert_same(read_state_dict(out), masked)
    assert_same(read_state_dict(beside), {"fc1.weight": mask == 1})


def test_the_command(folder: Path, tmp_path: Path, capsys) -> None:
    dense, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    cli([str(folder), f"--out={dense}", "--which=best"])
    cli([str(dense), f"--out={again}", "--model=resnet20", "--set", "num_classes=7"])
    assert again.read_bytes() == dense.read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{again}: 128 tensors, {again.stat().st_size:,} bytes"
    assert len(read_state_dict(dense)) == 128


def test_help_has_all_options(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli(["--help"])
    assert caught.value.code == 0
    found = capsys.readouterr().out
    for word in ("--out", "--model", "--masks", "--image_shape", "load_state_dict"):
        assert word in found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--out": "x.pth"}, r"x\.pth: expected a name that ends in \.safetensors"),
        ({"--out": "there.safetensors"}, "there is such a file.*--overwrite"),
        ({"--masks": "there.safetensors"}, "there is such a file"),
        ({"source": "there.safetensors"}, "name the model.*resnet50"),
        ({"source": "absent.pth", "--model": "mlp"}, "found none"),
        ({"source": "empty"}, r"no config\.json"),
        ({"--model": "resnet18"}, r"missing \(25\): layer4.*Check the model"),
        ({"--model": "resnet20"}, r"fc\.weight \(state dict \(7, 64\), model"),
        ({"--model": "resnet"}, "Did you mean 'resnet"),
        ({"--model": "resnet20", "--set": "classes=7"}, "expected settings among"),
        ({"--set": "num_classes=7"}, "give the model"),
        (
            {
                "source": "there.safetensors",
                "--model": "logistic_regression",
                "--image_shape": "2,2,1",
                "--masks": "m.safetensors",
            },
            "has none",
        ),
    ],
)
def test_bad_input_ends_the_command_with_a_reason(
    folder: Path, tmp_path: Path, monkeypatch, capsys, changes: dict, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    there = {"fc.weight": np.zeros((10, 4), np.float32), "fc.bias": np.zeros(10)}
    save_safetensors("there.safetensors", there, {})
    before = sorted(tmp_path.iterdir())
    given = {"source": str(folder), "--out": "new.safetensors"} | changes
    source = given.pop("source")
    with pytest.raises(SystemExit) as caught:
        cli([source, *(f"{name}={value}" for name, value in given.items())])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(words, error), error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flag", ["--set=hidden", "--image_shape=32"])
def test_malformed_arguments_say_their_form(flag: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli(["run", "--out=x.safetensors", "--model=mlp", flag])
    assert "expected" in capsys.readouterr().err
