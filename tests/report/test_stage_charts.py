"""What pruning steps did, with and without diagnostics, and in old records."""

from pathlib import Path
from typing import Any

import pytest
from read_pages import Page
from written_runs import STAGE, write_run

from woodfisher_jax.report import stage_charts
from woodfisher_jax.report.page import Html, page
from woodfisher_jax.report.record import RunRecord, read_record

PREDICTED = STAGE | {
    "predicted_loss_increase": 0.2,
    "gradient_term": 0.01,
    "magnitude_overlap": 0.75,
}
PATH = {
    "fractions": [0.0, 0.5, 1.0],
    "train": [0.25, 0.3, 0.5],
    "test": [],
    "quadratic": [0.25, 0.28, 0.4],
    "with_slope": [0.25, 0.29, 0.45],
}


def record(folder: Path, **changes: Any) -> RunRecord:
    return read_record(write_run(folder, **changes))


def seen(content: Html) -> Page:
    return Page(page("title", [], [("section", content)]))


def test_a_line_a_step(tmp_path: Path) -> None:
    found = seen(stage_charts.steps("x", record(tmp_path, stages=[STAGE, STAGE])))
    assert found.row("prune 2") == (
        ["prune 2", "2", "40", "50.00 %", "50.00 %", "90.00", "81.00", "4.0 s"]
    )


@pytest.mark.parametrize(("number", "folded"), [(1, 0), (3, 0), (5, 3)])
def test_histograms_first_and_last_in_sight(
    tmp_path: Path, number: int, folded: int
) -> None:
    content = stage_charts.saliencies(record(tmp_path, stages=[STAGE] * number))
    assert content.count('<svg class="chart"') == number
    inside = content.partition("<details>")[2]
    assert inside.count('<svg class="chart"') == folded
    assert "removed: 40; kept: 40" in content
    assert "saliency, nats" in content


def test_a_statistic_that_is_a_size_is_called_so(tmp_path: Path) -> None:
    zeros = STAGE["saliency_histogram"] | {"zeros": [3, 1200]}
    stage = STAGE | {"saliency_histogram": zeros}
    run = record(tmp_path, stages=[stage], prune__method="globalmagni")
    text = seen(stage_charts.saliencies(run)).text
    assert "magnitude |w|" in text
    assert "1,200 that went, 3 that stayed" in text


def test_runs_of_before_histograms_and_without_pruning(tmp_path: Path) -> None:
    old = {k: v for k, v in STAGE.items() if k != "saliency_histogram"}
    text = seen(stage_charts.saliencies(record(tmp_path, stages=[old]))).text
    assert "has recorded the saliencies" in text
    none = record(tmp_path, stages=[])
    for section in (stage_charts.saliencies, stage_charts.losses):
        assert "No pruning step has been done" in seen(section(none)).text


def test_predicted_beside_measured(tmp_path: Path) -> None:
    run = record(tmp_path, stages=[PREDICTED, PREDICTED])
    content = stage_charts.losses(run)
    found = seen(content)
    assert found.tables[0][0][1:] == [
        "loss before",
        "after",
        "increase",
        "predicted",
        "its linear term",
        "sum of saliencies",
        "kept as by magnitude",
    ]
    assert found.row("prune 1")[1:] == (
        ["0.25", "0.5", "0.25", "0.2", "0.01", "0.125", "0.75"]
    )
    assert "measured: 2 points, 0.25 at 1" in content
    assert "predicted: 2 points, 0.2 at 1" in content
    assert "diagnostics" not in found.text


def test_what_was_not_predicted_says_why(tmp_path: Path) -> None:
    text = seen(stage_charts.losses(record(tmp_path))).text
    assert "--config.prune.diagnostics=True" in text
    run = record(tmp_path, prune__method="globalmagni")
    assert "globalmagni has no model of the loss" in seen(stage_charts.losses(run)).text


def test_losses_that_were_not_measured_have_no_columns(tmp_path: Path) -> None:
    bare = {k: v for k, v in STAGE.items() if not k.startswith("train_loss")}
    found = seen(stage_charts.losses(record(tmp_path, stages=[bare])))
    assert found.tables[0][0] == ["", "sum of saliencies"]
    assert stage_charts.increase(bare) is None


def test_the_way_of_each_step(tmp_path: Path) -> None:
    stages = [PREDICTED | {"loss_path": PATH}] * 4
    content = stage_charts.losses(record(tmp_path, stages=stages))
    assert content.count('<svg class="chart"') == 5
    assert "2 more charts" in content
    assert "quadratic model: 3 points, 0.25 at 0, 0.4 at 1" in content
    beyond = PATH | {"train": [0.25, None, 0.5], "quadratic": [None] * 3}
    stage = PREDICTED | {"loss_path": beyond}
    content = stage_charts.losses(record(tmp_path, stages=[stage]))
    assert "training: 2 points" in content
    assert "quadratic model:" not in content
