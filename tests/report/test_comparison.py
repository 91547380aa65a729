"""Seeds are grouped, all else is told apart, and means are NumPy's."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_runs import STAGE, write_run

from woodfisher_jax.report.comparison import Comparison, compare, csv_text, spread
from woodfisher_jax.report.record import RunRecord, read_record


def records(folder: Path, *changes: dict[str, Any]) -> list[RunRecord]:
    """Runs numbered from 0, each with changes of its own."""
    return [
        read_record(write_run(folder / str(number), **change))
        for number, change in enumerate(changes)
    ]


def shape(found: Comparison) -> list[tuple[str, list[str]]]:
    """For each group its series and its runs."""
    return [(g.series, [r.folder.name for r in g.records]) for g in found.groups]


def test_the_mean_and_deviation_of_one_run() -> None:
    values = [90.0, 92.5, 91.0]
    found = spread([*values, None])
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert spread([1.0]) == (1.0, None)
    assert spread([None]) == (None, None)


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    level = {"prune__target_sparsity": 0.9, "stages": [STAGE | {"sparsity": 0.9}]}
    found = compare(
        records(
            tmp_path,
            {"seed": 0, "top1": 88.0},
            {"seed": 1, "top1": 86.0, "eval_batch_size": 7, "data__dir": "/elsewhere"},
            {"seed": 0, **level},
            {"seed": 0, "prune__method": "globalmagni"},
            {"seed": 0, "prune__diagnostics": True},
        )
    )
    assert shape(found) == [
        ("globalmagni", ["3"]),
        ("woodfisherblock", ["0", "1"]),
        ("woodfisherblock", ["2"]),
    ]
    assert [record.folder.name for record in found.repeated] == ["4"]
    assert found.groups[1].spread("final", "top1").mean == 87.0
    assert found.groups[2].spread("sparsity").mean == 0.9


def test_curves_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    found = compare(
        records(
            tmp_path,
            {"prune__num_samples": 50},
            {"prune__num_samples": 60, "prune__target_sparsity": 0.5},
            {"prune__num_samples": 60, "train__weight_decay": 0.5},
            {"prune__method": "globalmagni", "prune__num_samples": 100},
        )
    )
    assert sorted(group.series for group in found.groups) == [
        "globalmagni",
        "woodfisherblock, train.weight_decay=0.0001, num_samples=50",
        "woodfisherblock, train.weight_decay=0.0001, num_samples=60",
        "woodfisherblock, train.weight_decay=0.5, num_samples=60",
    ]


def test_a_dense_network_for_each_seed_goes_with_the_seed(tmp_path: Path) -> None:
    own = [{"seed": seed, "init_from": f"{seed}.npz"} for seed in (0, 1)]
    assert [len(g.records) for g in compare(records(tmp_path, *own)).groups] == [2]
    shared = [{"seed": s, "init_from": f} for s, f in ((0, "a"), (1, "a"), (0, "b"))]
    found = compare(records(tmp_path / "shared", *shared))
    assert shape(found) == [
        ("woodfisherblock, init_from=a", ["0", "1"]),
        ("woodfisherblock, init_from=b", ["2"]),
    ]


def test_unfinished_runs_count_in_no_mean(tmp_path: Path) -> None:
    found = compare(
        records(tmp_path, {"seed": 0}, {"seed": 1, "finished": False, "top1": 1.0})
    )
    assert shape(found) == [("woodfisherblock", ["0"])]
    assert [record.folder.name for record in found.unfinished] == ["1"]


def test_several_data_sets_are_refused(tmp_path: Path) -> None:
    runs = records(tmp_path, {}, {"data__name": "mnist"})
    with pytest.raises(ValueError, match=r"several data sets.*mnist: .*/1\); give"):
        compare(runs)


def test_the_table_has_a_line_a_run(tmp_path: Path) -> None:
    runs = records(
        tmp_path / 'with "quotes", and commas',
        {"seed": 0, "top1": 88.0},
        {"seed": 0, "top1": 87.0},
        {"seed": 1, "finished": False, "stages": []},
        {"seed": 2, "stages": [], "results": {"macs": None}},
    )
    lines = list(csv.DictReader(io.StringIO(csv_text(compare(runs)))))
    assert [line["run"] for line in lines] == [str(run.folder) for run in runs]
    assert [line["state"] for line in lines] == (
        ["finished", "repeated", "unfinished", "finished"]
    )
    assert [line["series"] for line in lines] == (
        ["woodfisherblock", "", "", "woodfisherblock"]
    )
    assert {k: lines[0][k] for k in ("final_top1", "dense_macs", "pruned_top1")} == (
        {"final_top1": "88.0", "dense_macs": "80.0", "pruned_top1": "81.0"}
    )
    assert (lines[3]["dense_macs"], lines[3]["pruned_top1"]) == ("", "")
