"""Accuracy, sparsity and loss along a run, and its pruning steps."""

import math
from pathlib import Path
from typing import Any

from read_pages import seen
from written_runs import STAGE, record_of, rows_of, write_run

from woodfisher_jax.report.page import pictures


def test_the_line_a_pruning_step(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, stages=[STAGE, STAGE]))
    assert found.row("prune 2") == (
        ["prune 2", "2", "40", "50.00 %", "50.00 %", "90.00", "81.00", "4.0 s"]
    )


def test_what_a_step_found_is_said(tmp_path: Path) -> None:
    found = {"warnings": ["no weight is left of 'fc/kernel'"], "untouched": {"a": 0.25}}
    page = seen(write_run(tmp_path, stages=[STAGE, STAGE | found]))
    assert "Step 2: no weight is left of 'fc/kernel'." in page.text
    assert page.row("a") == ["a", "25.00 %", "0"]


def test_a_constant_accuracy_of_all_is_drawn_below_100(tmp_path: Path) -> None:
    rows = [row | {"top1": 100.0, "loss": 0.0} for row in rows_of(100.0, [STAGE])]
    picture = pictures(record_of(write_run(tmp_path, rows=rows)))["accuracy"]
    upper, lower = picture.figure.axes
    assert 0 <= upper.get_ylim()[0] < upper.get_ylim()[1] == 100
    assert lower.get_ylim() == (0, 100)


def test_one_shot_without_training_has_bars(tmp_path: Path) -> None:
    rows = [r for r in rows_of(81.0, [STAGE]) if r["event"] in ("dense", "prune")]
    changes: dict[str, Any] = {"rows": rows, "dense__epochs": 0}
    folder = write_run(tmp_path, **changes)
    write_run(folder / "compare-magni", **changes, prune__method="magni")
    found = seen(tmp_path)
    assert "Nothing was trained here" in found.text
    assert "initial weights, not trained" in found.text
    assert "dense: 90.00; pruned, 50.0 %: 81.00" in found.figure("Accuracy")
    axes = pictures(record_of(tmp_path))["comparison"].figure.axes[0]
    assert axes.get_xlim() == (0, 100)
    (other,) = axes.get_lines()
    assert list(other.get_xdata()) == [90, 81]


def test_losses_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = rows_of(88.0, [STAGE])
    rows[3]["loss"] = math.nan
    found = seen(write_run(tmp_path, rows=rows))
    assert "woodfisherblock: 4 points, 0.3 at 1" in found.figure("Loss")
    nowhere = [row | {"loss": None} for row in rows]
    assert "Loss" not in seen(write_run(tmp_path, rows=nowhere)).titles
