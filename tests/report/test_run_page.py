"""The page of a run is right for every way a run can go."""

from pathlib import Path
from typing import Any

from read_pages import Page
from written_runs import LAYERS, STAGE, rows_of, write_run

from woodfisher_jax.report.quantities import NONE
from woodfisher_jax.report.record import read_record
from woodfisher_jax.report.run_page import run_page, write_run_page


def seen(folder: Path) -> Page:
    return Page(run_page(read_record(folder)))


def test_a_run_and_what_it_was_compared_with(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run")
    write_run(folder / "compare-globalmagni", top1=85.5, prune__method="globalmagni")
    text = write_run_page(folder).read_text()
    found = Page(text)
    assert (folder / "report.html").read_text() == text
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
    assert "woodfisherblock: 5 points, 70 at 1, 88 at 3, lowest 70" in text
    assert "globalmagni, just pruned: 1 point, 81 at 2" in text
    assert "not finished" not in found.text


def test_the_layers(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path))
    assert found.row("fc1") == ["fc1", "60", "20", "66.67 %", "60", "20"]
    assert found.row("all") == ["all", "80", "40", "50.00 %", "80", "40"]


def test_macs_that_could_not_be_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, results={"macs": None, "layers": []})
    text = seen(folder).text
    assert "could not be counted" in text
    assert "Table of the layers" not in text
    zero = [row | {"dense": 0.0, "sparse": 0.0} for row in LAYERS]
    folder = write_run(
        tmp_path, results={"macs": {"dense": 0, "sparse": 0}, "layers": zero}
    )
    assert "Table of the layers" in seen(folder).text


def test_one_shot_without_training_has_bars(tmp_path: Path) -> None:
    rows = [r for r in rows_of(81.0, [STAGE]) if r["event"] in ("dense", "prune")]
    changes: dict[str, Any] = {"rows": rows, "dense__epochs": 0}
    folder = write_run(tmp_path, **changes)
    write_run(folder / "compare-magni", **changes, prune__method="magni")
    text = run_page(read_record(folder))
    found = Page(text)
    assert "Nothing was trained here" in found.text
    assert "initial weights, not trained" in found.text
    assert "dense: 90.00; pruned, 50.0 %: 81.00" in text


def test_a_network_from_elsewhere(tmp_path: Path) -> None:
    folder = write_run(tmp_path, init_from="a <b>.ckpt")
    assert "Dense: from a <b>.ckpt." in seen(folder).text


def test_nothing_pruned(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, stages=[]))
    assert "mlp on digits, seed 0; nothing was pruned." in found.text
    assert "No pruning step has been done." in found.text


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, finished=False))
    assert "it has come to epoch 3, step 60, with 1 pruning step done" in found.text
    assert "Top-1, so far" in found.text
    assert "are counted when the run ends" in found.text


def test_a_run_that_has_only_started(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, finished=False, rows=[]))
    for words in (
        "it has not come to the end of an epoch yet",
        "nothing is pruned yet",
        "The dense network has not been judged yet.",
        "No epoch and no pruning step has ended yet.",
    ):
        assert words in found.text


def test_losses_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = rows_of(88.0, [STAGE])
    rows[3]["loss"] = float("nan")
    text = run_page(read_record(write_run(tmp_path, rows=rows)))
    assert "woodfisherblock: 4 points, 0.3 at 1" in text
    nowhere = [row | {"loss": None} for row in rows]
    found = seen(write_run(tmp_path, rows=nowhere))
    assert "test loss" not in found.text


def test_an_old_run_without_newer_fields(tmp_path: Path) -> None:
    keys = ("pruner", "epoch", "step", "sparsity", "top1_before", "top1_after")
    old = {key: STAGE[key] for key in keys}
    found = seen(write_run(tmp_path, stages=[old]))
    assert found.row("prune 1")[3:5] == [NONE, "50.00 %"]


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
    text = run_page(read_record(folder))
    assert Page(text).text.count(hostile) > 5
    assert "<img" not in text


def test_two_pruners_have_their_own_steps(tmp_path: Path) -> None:
    further = {"method": "globalmagni", "target_sparsity": 0.5, "prunable": "fc2"}
    folder = write_run(
        tmp_path,
        stages=[STAGE, STAGE | {"pruner": "prune_2"}],
        prune_2=further,
        results={"method": "woodfisherblock + globalmagni"},
    )
    found = seen(folder)
    assert found.row("prune_2 2")[2] == "40"
    assert "magnitude |w|" in found.text
