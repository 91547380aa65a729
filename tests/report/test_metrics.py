"""What a run leaves behind is valid, complete and never half-written."""

import contextlib
import csv
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from woodfisher_jax.report import metrics

NAN = float("nan")
ROWS = [
    {"event": "dense", "epoch": 0, "step": 0, "loss": 0.25, "top1": 97.5},
    {"event": "prune", "epoch": 0, "step": 0, "top1": np.float32(50), "sparsity/a": 1},
    {"event": "train", "epoch": 1, "step": 9, "loss": NAN, "train_loss": None},
]


def strict_json(text: str) -> Any:
    """Parses JSON as the standard has it: without NaN and infinities."""

    def refuse(token: str) -> Any:
        raise AssertionError(f"not JSON: {token}")

    return json.loads(text, parse_constant=refuse)


def test_results_are_valid_json(tmp_path: Path) -> None:
    metrics.write_results(
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
    metrics.write_metrics(tmp_path, ROWS)
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
    metrics.write_metrics(tmp_path, ROWS)
    metrics.write_metrics(tmp_path, ROWS[:2])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    metrics.write_results(tmp_path, {"run": 1})

    def disk_full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, broken, disk_full)
    with pytest.raises(OSError, match="No space left"):
        metrics.write_results(tmp_path, {"run": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert strict_json((tmp_path / "results.json").read_text()) == {"run": 1}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    metrics.write_results(tmp_path, {"run": 1})
    with pytest.raises(TypeError, match="set"):
        metrics.write_results(tmp_path, {"run": {2}})
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
    with contextlib.closing(metrics.EventWriter(tmp_path, ROWS[:1])) as writer:
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


def test_without_tensorboardx_no_events_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with contextlib.closing(metrics.EventWriter(tmp_path, ROWS)) as writer:
        writer.write(ROWS[0])
    assert not list(tmp_path.iterdir())


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
    record = metrics.macs_record(COSTS, PARAMS, MASKS)
    assert record["macs"] == {"dense": 610, "sparse": 210}
    rows = {row["path"]: row for row in record["layers"]}
    assert rows["a/bias"]["nonzero"] == 1
    assert rows["a/bias"]["dense"] == 0
    assert rows["b/kernel"]["sparse"] == 10
    metrics.write_layers(tmp_path, record["layers"])
    with (tmp_path / "layers.csv").open(newline="") as file:
        table = {line["path"]: line for line in csv.DictReader(file)}
    assert table["a/kernel"]["nonzero"] == "2"


def test_macs_that_cannot_be_counted_are_none() -> None:
    assert metrics.macs_record(None, PARAMS, MASKS) == {"macs": None, "layers": []}
