"""Each format of the command restores the network of the run."""

from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import random_network, save_run

from woodfisher_jax import export, models
from woodfisher_jax.training import forward_passes
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.serving import load_stablehlo
from woodfisher_jax.weights.sparse_files import load_sparse
from woodfisher_jax.weights.state_dicts import to_state_dict
from woodfisher_jax.weights.torch_files import read_state_dict

MLP = {"name": "mlp", "hidden": (50,)}


@pytest.fixture(scope="module")
def network() -> tuple:
    return random_network("mlp", (8, 8, 1), 0.9, hidden=(50,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, network: tuple) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), MLP, {3: network})


@pytest.mark.parametrize("format", export.FORMATS)
def test_the_command(
    folder: Path, network: tuple, tmp_path: Path, capsys, format: str
) -> None:
    variables, masks = network
    suffix = "stablehlo" if format == "stablehlo" else "safetensors"
    out = tmp_path / f"net.{suffix}"
    latency = ["--latency"] if format == "csr" else []
    export.cli([str(folder), f"--format={format}", f"--out={out}", *latency])
    line, *more = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out}: {out.stat().st_size:,} bytes, ")
    assert ["batch 1," in line for line in more] == ([True, False] if latency else [])
    if format == "torch":
        found = read_state_dict(out)
        expected = to_state_dict(variables)
    elif format == "stablehlo":
        images = np.ones((3, 8, 8, 1), np.float32)
        model = models.build_model(**MLP)
        found = {"": load_stablehlo(out)(images)}
        expected = {"": jax.jit(model.apply)(variables, images)}
        assert "differ from the model's by 0e+00" in line
    else:
        found, kept = load_sparse(out)
        expected = leaves_by_path(variables)
        np.testing.assert_array_equal(kept["params/fc1/kernel"], masks["fc1/kernel"])
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        assert f"{100 * out.stat().st_size / dense:.1f} % of its {dense:,}" in line
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)


def test_a_small_network_comes_with_lines_that_build_it(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_network("mlp", (8, 8, 1), 0.0, hidden=(50,), widths={"fc1": 9})
    run = save_run(tmp_path / "run", {**MLP, "widths": {"fc1": 9}}, {3: network})
    out = tmp_path / "net.safetensors"
    export.cli([str(run), "--format=torch", f"--out={out}"])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"{tmp_path / 'net.py'}: load() builds the network")
    assert 'load(path="net.safetensors")' in (tmp_path / "net.py").read_text()
    assert read_state_dict(out)["fc1.weight"].shape == (9, 64)
    out.unlink()
    monkeypatch.setattr(forward_passes, "runs_onnx", lambda: False)
    lines = export.export(run, "masked", out, image_shape=(8, 8, 1), time_products=True)
    assert [line[:32] for line in lines[3:]] == [
        "forward pass, batch 1, jit on cp",
        "forward pass, batch 64, jit on c",
    ]
    out.unlink()
    with pytest.raises(FileExistsError, match=r"net\.py: there is"):
        export.export(run, "torch", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("format", "out", "words"),
    [
        ("torch", "x.pt", r"ends in \.safetensors, got \.pt"),
        ("stablehlo", "x.safetensors", r"ends in \.stablehlo"),
        ("csr", "there.safetensors", "there is such a file"),
        ("onnx", "x.onnx", r"format='onnx'; expected one of \['torch', 'masked'"),
    ],
)
def test_invalid_arguments_are_refused(
    folder: Path, tmp_path: Path, format: str, out: str, words: str
) -> None:
    there = tmp_path / "there.safetensors"
    there.touch()
    with pytest.raises((ValueError, OSError), match=words):
        export.export(folder, format, tmp_path / out)
    assert list(tmp_path.iterdir()) == [there]


def test_a_folder_without_a_run_ends_the_command(tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(SystemExit) as caught:
        export.cli([str(tmp_path), "--format=csr", f"--out={out}"])
    assert caught.value.code == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_missing_data_set_is_needed_for_its_shape_alone(tmp_path: Path) -> None:
    network = random_network("mlp", (28, 28, 1), 0.5)
    folder = save_run(tmp_path / "run", {"name": "mlp"}, {1: network}, data="mnist")
    out = tmp_path / "net.stablehlo"
    with pytest.raises(FileNotFoundError, match="Or give --image_shape"):
        export.export(folder, "stablehlo", out, data_dir=str(tmp_path))
    export.export(folder, "stablehlo", out, image_shape=(28, 28, 1))
    assert load_stablehlo(out)(np.ones((1, 28, 28, 1), np.float32)).shape == (1, 10)
