"""Figures are written, are real PNGs and are of a size one can read."""

from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from woodfisher_jax.report import plots


def gradual(drop: float) -> list[dict[str, Any]]:
    """Rows of twelve epochs with five prunings."""
    rows = [{"event": "dense", "epoch": 0, "top1": 91.0, "sparsity": 0.0}]
    for epoch in range(13):
        sparsity = min(0.95, 0.2 * (1 + epoch // 2))
        if epoch > 0:
            last = rows[-1]["sparsity"]
            rows.append(
                {"event": "train", "epoch": epoch, "top1": 90.0, "sparsity": last}
            )
        if epoch in (0, 2, 4, 6, 8):
            pruned = {"top1": 90 - drop * sparsity, "sparsity": sparsity}
            rows.append({"event": "prune", "epoch": epoch} | pruned)
    return rows


DENSE = {"event": "dense", "epoch": 0, "top1": 97.0, "sparsity": None}
PRUNED = {"event": "prune", "epoch": 0, "top1": 61.0, "sparsity": 0.9}
THREE = {"Dense_0/kernel": 0.95, "Dense_1/kernel": 0.8, "Dense_2/kernel": 0.0}
MANY = {f"layer{i // 14}/conv{i % 14}/kernel": i / 53 for i in range(54)}


def size(path: Path) -> tuple[int, int]:
    """Decodes the whole file, so that a cut one fails; returns width and height."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        darkest, lightest = image.convert("L").getextrema()
        assert darkest != lightest, "the figure is blank"
        return image.size


@pytest.mark.parametrize(
    "runs",
    [
        {"woodfisher": gradual(30)},
        {f"method {i}": gradual(10 * i) for i in range(8)},
        {"gradual": gradual(30), "one-shot": [DENSE, PRUNED]},
        {"woodfisher": [PRUNED]},
        {"woodfisher": [DENSE, PRUNED], "magnitude": [PRUNED]},
        {"evaluated": [DENSE, PRUNED], "not": [PRUNED | {"top1": None}]},
    ],
)
def test_accuracy(tmp_path: Path, runs: Any) -> None:
    plots.plot_accuracy(tmp_path / "new" / "accuracy.png", runs)
    width, height = size(tmp_path / "new" / "accuracy.png")
    assert 500 <= width <= 2000
    assert 500 <= height <= 2000


def test_accuracy_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected rows with a top1"):
        plots.plot_accuracy(tmp_path / "a.png", {"woodfisher": [{"event": "train"}]})


@pytest.mark.parametrize(("layers", "tall"), [(THREE, 300), (MANY, 2000)])
def test_layer_sparsity(tmp_path: Path, layers: dict[str, float], tall: int) -> None:
    path = tmp_path / "layers.png"
    plots.plot_layer_sparsity(path, layers, "90 % pruned")
    width, height = size(path)
    assert 1000 <= width <= 1300
    assert tall <= height <= 1.2 * tall
    plots.compare_layer_sparsity(path, {"a": layers, "b": THREE}, "90 % pruned")
    assert size(path)[1] >= height


def test_layer_sparsity_without_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        plots.plot_layer_sparsity(tmp_path / "a.png", {}, "nothing")


@pytest.mark.parametrize("test", [[], [0.5, 0.8, 1.5]])
def test_loss_path(tmp_path: Path, test: list[float]) -> None:
    losses = {
        "fractions": [0.0, 0.5, 1.0],
        "train": [0.1, 0.2, 0.9],
        "test": test,
        "quadratic": [0.1, 0.15, 0.3],
        "with_slope": [0.1, 0.17, 0.34],
    }
    plots.plot_loss_path(tmp_path / "new" / "path.png", losses, "prune 1")
    width, height = size(tmp_path / "new" / "path.png")
    assert 1000 <= width <= 1300
    assert 500 <= height <= 800


def test_the_settings_of_the_caller_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.plot_layer_sparsity(tmp_path / "a.png", THREE, "title")
    assert dict(matplotlib.rcParams) == before
