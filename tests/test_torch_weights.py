"""Weights out as PyTorch takes them, from files and runs; and in again, bit for bit."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
from random_weights import random_variables
from saved_runs import random_network, save_run

from woodfisher_jax.models import build_model
from woodfisher_jax.torch_weights import (
    cli,
    convert,
    model_shapes,
    read_state_dict,
    read_weights,
    write_state_dict,
)
from woodfisher_jax.weights.state_dicts import to_state_dict, to_variables

ROOT = Path(__file__).parents[1]
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


def test_a_run_goes_out_and_comes_back_bit_for_bit(
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
    # As a source of another run, with what it is given there.
    shapes = model_shapes("resnet20", {"num_classes": 7})
    for source, found_masks in ((out, {}), (folder, masks)):
        back, found = to_variables(read_weights(source), shapes)
        assert_same(to_state_dict(back), to_state_dict(variables))
        assert found.keys() == found_masks.keys()
        for path, mask in found.items():
            np.testing.assert_array_equal(mask, masks[path])
    with safetensors.safe_open(out, "np") as file:
        # What the loaders of other libraries look at.
        assert file.metadata() == {"format": "pt"}


def test_a_file_goes_out_under_the_models_names(tmp_path: Path) -> None:
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
    write_state_dict(source, wrapped)
    convert(
        source,
        out,
        model="mlp",
        settings={"hidden": (5,)},
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


def test_help_says_what_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "woodfisher_jax.torch_weights", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for word in ("--out", "--model", "--masks", "--image_shape", "load_state_dict"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--out": "x.pth"}, r"x\.pth: expected a name that ends in \.safetensors"),
        ({"--out": "x"}, "no suffix"),
        ({"--out": "none/x.safetensors"}, "no folder"),
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
    write_state_dict("there.safetensors", there)
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


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {"a": np.ones(3)})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_state_dict(path, {"a": np.zeros(3)}, overwrite=True)
    assert path.read_bytes() == before


def test_a_file_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_state_dict(tmp_path / "weights.safetensors", {"a": np.ones(3)})
    finally:
        os.umask(old)
    mode = (tmp_path / "weights.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644
