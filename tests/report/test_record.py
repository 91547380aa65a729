"""A folder is read as it is: finished, interrupted, old, damaged, or of no run."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from saved_runs import random_network
from small_runs import small
from written_runs import DEFAULTS, STAGE, record_of, rows_of, write_run

from woodfisher_jax.report.record import (
    find_runs,
    no_run,
    write_command,
    write_latency,
)
from woodfisher_jax.training.config import to_dict
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.training.resuming.history import Log


def test_a_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_command(tmp_path, "python -m x")
    write_latency(tmp_path, {"cores": 2})
    found = record_of(tmp_path)
    assert found.finished
    assert found.config == json.loads(json.dumps(to_dict(small())))
    assert found.results["final"]["top1"] == 88.0
    assert len(found.rows) == 5
    assert (found.command, found.latency) == ("python -m x", {"cores": 2})
    assert found.compared == {}


def test_no_command_is_written_where_there_is_none(tmp_path: Path) -> None:
    write_command(tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_runs_that_it_was_compared_with(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path / "compare-globalmagni", prune__method="globalmagni")
    (tmp_path / "compare-nothing").mkdir()
    found = record_of(tmp_path)
    assert list(found.compared) == ["globalmagni"]
    assert find_runs(tmp_path) == [tmp_path, tmp_path / "compare-globalmagni"]


def test_an_interrupted_run_tells_what_its_last_save_holds(tmp_path: Path) -> None:
    write_run(tmp_path, finished=False)
    variables, masks = random_network("mlp", (8, 8, 1), 0.5, hidden=(3,))
    log = Log(stages=[STAGE], seconds=12.0)
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        arrays = {"params": variables["params"], "masks": masks}
        meta = {"log": dataclasses.asdict(log)}
        checkpoint.save(manager, 1, arrays, meta, {"stage": 1, "top1": 1.0})
    found = record_of(tmp_path)
    assert not found.finished
    assert found.results["stages"] == [STAGE]
    assert found.results["seconds_total"] == 12.0
    assert found.results["sparsity_by_path"] == {"fc1/kernel": 0.5, "fc2/kernel": 0.0}
    assert found.results["dense"]["top1"] == 90
    assert found.results["macs"] is None


def test_without_a_save_the_rows_tell_of_pruning(tmp_path: Path) -> None:
    write_run(tmp_path, finished=False)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)  # A damaged one.
    (stage,) = record_of(tmp_path).results["stages"]
    assert (stage["pruner"], stage["sparsity"], stage["top1_after"]) == (
        "prune",
        0.5,
        81.0,
    )
    assert record_of(tmp_path).results["seconds_total"] is None


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    write_run(tmp_path, finished=False, rows=[])
    (tmp_path / "metrics.jsonl").unlink()
    found = record_of(tmp_path)
    assert found.rows == []
    assert found.results["final"] is None


def test_a_config_of_before_a_field_has_its_default(tmp_path: Path) -> None:
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prune"]["loss_path_steps"], config["distributed"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert record_of(tmp_path).config == json.loads(json.dumps(to_dict(small())))


def test_a_further_pruner_has_the_defaults_of_the_first(tmp_path: Path) -> None:
    write_run(tmp_path, prune_2={"method": "magni", "target_sparsity": 0.5})
    config = json.loads((tmp_path / "config.json").read_text())
    config["prune_2"] = {"method": "magni"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = record_of(tmp_path)
    assert found.config["prune_2"] == found.config["prune"] | {"method": "magni"}
    assert found.defaults["prune_2"] == found.config["prune"]
    assert found.defaults["prune"] == DEFAULTS["prune"]


@pytest.mark.parametrize("name", ["results.json", "latency.json", "config.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, rows=rows_of(88.0, []))
    (tmp_path / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=str(tmp_path)):
        record_of(tmp_path)


def test_what_is_no_run_says_what_is_missing(tmp_path: Path) -> None:
    for read in (find_runs, record_of):
        with pytest.raises(ValueError, match=r"no config\.json; give the folder of a"):
            read(tmp_path)
        with pytest.raises(ValueError, match="no such folder"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/digts", "runs/digits"),
        ("runs/digit", "runs/digits"),
        ("rnus/digits", "runs/digits"),
        ("runs/mnist", "runs/mnist-20260101-120000"),
        ("runs", "runs/mnist-20260101-120000"),
        ("runs/digits/checkpoints", "runs/digits"),
        ("runs/digits/nowhere/45", "runs/digits"),
        ("runs/cifar10_resnet20", None),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_nearest_run_is_suggested(
    tmp_path: Path, monkeypatch, given: str, meant: str | None, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    # As they were made, the newest last.
    names = "digits", "digits-95", "mnist-20250101", "mnist-20260101-120000"
    for time, name in enumerate(names):
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (time, time))
    compared = tmp_path / "runs" / "mnist-20260101-120000" / "compare-magni"
    (compared / "checkpoints").mkdir(parents=True)
    (compared / "config.json").write_text("{}")
    # Other programs have files of that name as well.
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "runs" / "cifar10").mkdir()
    (tmp_path / "runs" / "cifar10" / "config.json").write_text("{}")
    root = tmp_path if absolute else Path()
    hint = f"; did you mean {root / meant}?" if meant else "; give the folder of a run"
    assert hint in str(no_run(root / given))
