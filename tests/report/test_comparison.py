"""Runs are grouped over seeds, means are NumPy's, and what is left out is named."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from read_pages import Page
from written_runs import STAGE, record_of, write_run

from woodfisher_jax.report.comparison import (
    INCIDENTAL,
    Comparison,
    compare,
    comparison_csv,
    comparison_page,
    spread,
)
from woodfisher_jax.report.elements.quantities import NONE
from woodfisher_jax.report.record import RunRecord
from woodfisher_jax.training.resuming.workdir import MACHINE


def records(folder: Path, *changes: dict[str, Any]) -> list[RunRecord]:
    """Runs numbered from 0, each with changes of its own."""
    return [
        record_of(write_run(folder / str(number), **change))
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
    assert spread([1.0, 2.0]).text() == "1.50 ± 0.71"


def test_where_a_run_is_does_not_distinguish_it() -> None:
    assert set(MACHINE) <= set(INCIDENTAL)


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
    assert found.groups[1].spread("final_top1").mean == 87.0
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
    lines = list(csv.DictReader(io.StringIO(comparison_csv(compare(runs)))))
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


# --------------------------------------------------------------------------- the page


def grid(folder: Path) -> Comparison:
    """Two methods, two levels, two seeds."""
    changes: list[dict[str, Any]] = [
        {
            "top1": 90 - 20 * level + lift + 2 * seed,
            "stages": [STAGE | {"sparsity": level}],
            "seed": seed,
            "prune__method": method,
            "prune__target_sparsity": level,
        }
        for method, lift in (("woodfisherblock", 4.0), ("globalmagni", 0.0))
        for level in (0.5, 0.9)
        for seed in (0, 1)
    ]
    return compare(records(folder, *changes))


def test_curves_and_groups(tmp_path: Path) -> None:
    found = Page(comparison_page(grid(tmp_path)))
    assert "8 finished runs in 4 groups" in found.text
    final, pruned = found.figures
    assert final.startswith("At the end of the run: top-1 on the test split, %")
    assert "woodfisherblock: 2 points, 85 at 50, 77 at 90" in final
    assert "dense, mean: 90" in final
    assert "81 at 50, 81 at 90" in pruned
    groups = found.tables[0]
    assert [row[:3] for row in groups[1:]] == [
        ["globalmagni", "50.00 %", "2"],
        ["globalmagni", "90.00 %", "2"],
        ["woodfisherblock", "50.00 %", "2"],
        ["woodfisherblock", "90.00 %", "2"],
    ]
    assert groups[1][5] == "81.00 ± 1.41"


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    whole, again, half, other = records(
        tmp_path, {}, {}, {"finished": False}, {"model": {"name": "cifarnet"}}
    )
    found = Page(comparison_page(compare([whole, again, half, other])))
    assert f"Not finished, and left out of all means: {half.folder}." in found.text
    assert f"same config and seed is there: {again.folder}." in found.text
    assert "several models: cifarnet, mlp" in found.text
    assert found.row(str(half.folder))[-1] == "not finished"


def test_with_no_run_finished_there_is_only_their_list(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"finished": False, "rows": []}
    runs = records(tmp_path, changes, changes | {"seed": 1})
    found = Page(comparison_page(compare(runs)))
    assert "None of them has finished" in found.text
    assert found.row(str(runs[0].folder))[3] == NONE
    assert "Groups" not in found.text
