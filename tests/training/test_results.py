"""Rows are written once, by the first process; reports without matplotlib too."""

import json
import logging
import sys
from pathlib import Path

import pytest
from written_runs import write_run

from woodfisher_jax.report import metrics
from woodfisher_jax.training import results
from woodfisher_jax.training.resuming.history import Log

ROWS = [
    {"event": "train", "epoch": n, "step": 10 * n, "top1": 50.0 + n} for n in (1, 2, 3)
]


def test_each_start_writes_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(
        metrics.EventWriter, "write", lambda self, row: written.append(row["step"])
    )
    with results.open_events(tmp_path, Log()) as events:
        events(ROWS[:1])
        events(ROWS[:1])
    with results.open_events(tmp_path, Log(rows=ROWS[:1])) as events:
        events(ROWS[:3])
    # A second start begins a file of its own for TensorBoard with the history.
    assert written == [10, 10, 20, 30]
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [10, 20, 30]


def test_other_processes_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results.distributed, "is_first", lambda: False)
    with results.open_events(tmp_path, Log()) as events:
        events(ROWS)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_all_numbers_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run")
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        results.write_report(run, content)
    assert json.loads((run / "results.json").read_text()) == content
    assert (run / "layers.csv").exists()
    (message,) = caplog.messages
    assert "pip install 'woodfisher-jax[report]'" in message
    assert not [*run.glob("*.html"), *run.glob("*.png")]
    monkeypatch.undo()
    results.write_report(run, content)
    assert (run / "report.html").exists()
