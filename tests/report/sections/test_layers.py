"""Layers on the page of a run."""

from pathlib import Path

from read_pages import seen
from written_runs import LAYERS, record_of, write_run

from woodfisher_jax.report.page import pictures


def test_layers_are_in_the_order_of_the_network(tmp_path: Path) -> None:
    order = ["stem", "blocks2/mlp", "blocks10/mlp", "head"]
    layers = [LAYERS[0] | {"path": f"{name}/kernel"} for name in order]
    levels = {f"{name}/kernel": 0.5 for name in sorted(order)}
    for given, expected in ((layers, order), ([], [*order[1:], order[0]])):
        results = {"sparsity_by_path": levels, "layers": given}
        folder = write_run(tmp_path, results=results)
        picture = pictures(record_of(folder))["sparsity"]
        names = [text.get_text() for text in picture.figure.axes[0].texts[::2]]
        assert names == expected


def test_the_table_of_the_layers(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path))
    assert found.row("fc1") == ["fc1", "60", "20", "66.67 %", "60", "20"]
    assert found.row("all") == ["all", "80", "40", "50.00 %", "80", "40"]
    assert "fc1: 20 of 60; fc2: 20 of 20" in found.figure("Multiply-accumulates")


def test_macs_that_could_not_be_counted(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, results={"macs": None, "layers": []}))
    assert "could not be counted" in found.text
    assert "Table of the layers" not in found.text
    zero = [row | {"dense": 0.0, "sparse": 0.0} for row in LAYERS]
    results = {"macs": {"dense": 0, "sparse": 0}, "layers": zero}
    found = seen(write_run(tmp_path, results=results))
    assert "Table of the layers" in found.text
    assert "Multiply-accumulates" not in found.titles
