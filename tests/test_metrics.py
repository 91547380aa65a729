"""What a run leaves behind is valid, complete and never half-written."""

import csv
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from woodfisher_jax import report

NAN = float("nan")
ROWS = [
    {"event": "dense", "epoch": 0, "step": 0, "loss": 0.25, "top1": 97.5},
    {"event": "prune", "epoch": 0, "step": 0, "top1": np.float32(50), "sparsity/a": 1},
    {"event": "train", "epoch": 1, "step": 9, "loss": NAN, "train_loss": None},
]
STAGE = {
    "pruner": "prune",
    "epoch": 3.0,
    "step": 1234,
    "target_sparsity": 0.8,
    "sparsity": 0.79994,
    "top1_before": 92.11,
    "top1_after": 88.22,
    "seconds": 4.56,
}
RESULTS = {
    "method": "woodfisher",
    "target_sparsity": 0.9,
    "sparsity": 0.90006,
    "nonzero": 26_000,
    "prunable": 260_000,
    "dense": {"top1": 93.33, "top5": 99.9, "loss": 0.2},
    "final": {"top1": 91.44, "top5": 99.8, "loss": 0.3},
    "stages": [STAGE, STAGE | {"step": 2345, "top1_before": None}],
    "macs": {"dense": 40.55e6, "sparse": 8.1234e6},
    "seconds_total": 78.9,
    "peak_rss_bytes": 1_230_000_000,
    "device": {"platform": "cpu", "kind": "a CPU [big]", "count": 2},
}


def strict_json(text: str) -> Any:
    """Parses JSON as the standard has it: without NaN and infinities."""

    def refuse(token: str) -> Any:
        raise AssertionError(f"not JSON: {token}")

    return json.loads(text, parse_constant=refuse)


def test_results_are_valid_json(tmp_path: Path) -> None:
    report.write_results(
        tmp_path / "new",
        {
            "nan": NAN,
            "nested": [{"infinity": float("inf")}, (1, None, True)],
            "numpy": np.float32(0.5),
            "jax": jnp.asarray([1.0, NAN]),
            "count": np.int64(3),
            "name": "größer",
        },
    )
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    assert strict_json(text) == {
        "nan": None,
        "nested": [{"infinity": None}, [1, None, True]],
        "numpy": 0.5,
        "jax": [1.0, None],
        "count": 3,
        "name": "größer",
    }
    assert text.startswith('{\n  "nan": null,\n')


def test_metrics_have_the_union_of_the_columns(tmp_path: Path) -> None:
    report.write_metrics(tmp_path, ROWS)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        header, *cells = csv.reader(file)
    assert header == [
        "event",
        "epoch",
        "step",
        "loss",
        "top1",
        "sparsity/a",
        "train_loss",
    ]
    assert cells == [
        ["dense", "0", "0", "0.25", "97.5", "", ""],
        ["prune", "0", "0", "", "50.0", "1", ""],
        ["train", "1", "9", "", "", "", ""],
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [strict_json(line) for line in lines]
    assert rows[:2] == ROWS[:2]
    assert rows[2] == ROWS[2] | {"loss": None}


def test_metrics_are_rewritten_whole(tmp_path: Path) -> None:
    report.write_metrics(tmp_path, ROWS)
    report.write_metrics(tmp_path, ROWS[:2])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    report.write_results(tmp_path, {"run": 1})

    def disk_full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, broken, disk_full)
    with pytest.raises(OSError, match="No space left"):
        report.write_results(tmp_path, {"run": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert strict_json((tmp_path / "results.json").read_text()) == {"run": 1}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    report.write_results(tmp_path, {"run": 1})
    with pytest.raises(TypeError, match="set"):
        report.write_results(tmp_path, {"run": {2}})
    assert strict_json((tmp_path / "results.json").read_text()) == {"run": 1}


def read_events(path: Path) -> list[Event]:
    """Reads TensorBoard's records: length, its checksum, an event, its checksum."""
    content = path.read_bytes()
    events = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_events_hold_the_finite_numbers_of_the_rows(tmp_path: Path) -> None:
    with report.EventWriter(tmp_path, ROWS[:1]) as writer:
        for row in ROWS[1:]:
            writer.write(row)
    (path,) = tmp_path.iterdir()
    events = read_events(path)
    scalars = [
        (value.tag, event.step, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert scalars == [
        ("loss", 0, 0.25),
        ("top1", 0, 97.5),
        ("top1", 0, 50.0),
        ("sparsity/a", 0, 1.0),
    ]
    # TensorBoard hides what earlier files say about steps from this one on.
    (start,) = [e for e in events if e.WhichOneof("what") == "session_log"]
    assert start.step == 0


def test_environment() -> None:
    found = report.environment()
    assert found["device"] == {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"].keys() == {"python", *report.PACKAGES}
    strict_json(json.dumps(found))


def test_peak_memory_is_in_bytes() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system to compare with")
    (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
    kilobytes = int(line.split()[1])
    assert report.peak_rss_bytes() == pytest.approx(1024 * kilobytes, rel=0.2)


def printed(show: Callable[..., None], content: Any) -> str:
    shown = io.StringIO()
    show(content, Console(file=shown, width=80))
    return shown.getvalue()


def test_table_shows_every_step() -> None:
    text = printed(report.print_table, RESULTS)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    lines = {line.split("│")[1].strip(): line for line in rows}
    for label, figures in {
        "dense": ["93.33"],
        "prune 1": [" 3 ", "1234", "80.00", "79.99", "92.11", "88.22", "4.6"],
        "prune 2": ["2345", " - ", "88.22"],
        "final": ["90.01", "91.44", "78.9"],
    }.items():
        assert all(figure in lines[label] for figure in figures), lines[label]
    assert "woodfisher, target sparsity 90.00 %" in text
    assert "26,000 of 260,000" in text
    assert "8.123 of 40.55 M" in " ".join(text.split())
    assert "1.23 GB" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_target_in_macs_has_no_sparsity() -> None:
    unknown = RESULTS | {"target_sparsity": None, "macs": None}
    text = printed(report.print_table, unknown)
    assert "target sparsity - %" in text
    assert "multiply-accumulates" not in text


COSTS = {"a/kernel": 100.0, "b/kernel": 1.0}
PARAMS = {
    "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.ones((5, 2))},
}
MASKS = {
    "a/kernel": jnp.arange(6).reshape(2, 3) < 2,
    "a/bias": jnp.array([True, False, False, False]),
}


def test_macs_count_what_masks_leave(tmp_path: Path) -> None:
    record = report.macs_record(COSTS, PARAMS, MASKS)
    assert record["macs"] == {"dense": 610, "sparse": 210}
    rows = {row["path"]: row for row in record["layers"]}
    assert rows["a/bias"]["nonzero"] == 1
    assert rows["a/bias"]["dense"] == 0
    assert rows["b/kernel"]["sparse"] == 10
    report.write_layers(tmp_path, record["layers"])
    with (tmp_path / "layers.csv").open(newline="") as file:
        table = {line["path"]: line for line in csv.DictReader(file)}
    assert table["a/kernel"]["nonzero"] == "2"
    text = printed(report.print_layers, record["layers"])
    (total,) = [line for line in text.splitlines() if "│ all" in line]
    assert "20" in total
    assert "13" in total


def test_macs_that_cannot_be_counted_are_none() -> None:
    assert report.macs_record(None, PARAMS, MASKS) == {"macs": None, "layers": []}


def test_comparison_has_a_line_a_run() -> None:
    runs = {"all [x=1]": RESULTS, "dense": RESULTS | {"stages": []}}
    lines = printed(report.print_comparison, runs).splitlines()
    (pruned,) = [line for line in lines if "all [x=1]" in line]
    assert all(x in pruned for x in ("90.01", "93.33", "88.22", "91.44", "78.9"))
    (dense,) = [line for line in lines if "│ dense " in line]
    assert " - " in dense
