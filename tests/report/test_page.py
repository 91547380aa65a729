"""The page of a run is right for every way a run can go."""

from pathlib import Path

from read_pages import Page, seen
from written_runs import DEFAULTS, LAYERS, STAGE, write_run

from woodfisher_jax.report.elements.quantities import NONE
from woodfisher_jax.report.page import write_page


def test_a_run_and_what_it_was_compared_with(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run")
    write_run(folder / "compare-globalmagni", top1=85.5, prune__method="globalmagni")
    found = Page(write_page(folder, DEFAULTS).read_text())
    assert found.words.count("woodfisherblock on digits: my run") == 2
    assert "mlp on digits, pruned by woodfisherblock in one step until 50.00 %" in (
        found.text
    )
    assert found.row("woodfisherblock") == (
        ["woodfisherblock", "50.00 %", "88.00", "99.00", "0.1200", "2.00"]
    )
    assert found.row("globalmagni")[2] == "85.50"
    assert found.row("globalmagni")[5] == "4.50"
    for words in ("40 of 80 weights left", "1.23 GB", "of 80, for one image", "20.0 s"):
        assert words in found.text
    accuracy = found.figure("Accuracy and sparsity")
    assert "woodfisherblock: 5 points, 70 at 1, 88 at 3, lowest 70" in accuracy
    assert "globalmagni, just pruned: 1 point, 81 at 2" in accuracy
    assert "not finished" not in found.text
    assert found.titles == [
        "Accuracy and sparsity",
        "Loss",
        "Sparsity of the layers",
        "Multiply-accumulates",
        "prune 1, to 50.00 %",
        "Time",
    ]
    # The plots are beside the page, and not beside a page elsewhere.
    written = {path.name for path in folder.glob("*.png")}
    assert written == {"comparison.png", "sparsity.png"}
    write_page(folder / "compare-globalmagni", DEFAULTS, tmp_path / "page.html")
    assert not list((folder / "compare-globalmagni").glob("*.png"))


def test_a_run_that_has_only_started(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, finished=False, rows=[]))
    for words in (
        "it has not reached the end of an epoch yet",
        "nothing is pruned yet",
        "The dense network has not been evaluated yet.",
        "No epoch and no pruning step has ended yet.",
    ):
        assert words in found.text


def test_an_old_run_without_newer_fields(tmp_path: Path) -> None:
    keys = ("pruner", "epoch", "step", "sparsity", "top1_before", "top1_after")
    found = seen(write_run(tmp_path, stages=[{key: STAGE[key] for key in keys}]))
    assert found.row("prune 1")[3:5] == [NONE, "50.00 %"]
    assert "has recorded the saliencies" in found.text


def test_names_from_config_and_path_are_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>&\"'"
    folder = tmp_path / hostile
    paths = {f"{hostile}/kernel": 0.5}
    layers = [LAYERS[0] | {"path": f"{hostile}/kernel"}]
    write_run(
        folder,
        data__dir=hostile,
        init_from=hostile,
        results={"sparsity_by_path": paths, "layers": layers},
    )
    (folder / "command.txt").write_text(hostile)
    found = Page(write_page(folder, DEFAULTS).read_text())
    assert found.text.count(hostile) > 5
