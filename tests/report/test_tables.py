"""Tables show every figure, at the width of a terminal."""

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from woodfisher_jax.report import tables

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


def printed(show: Callable[..., None], content: Any) -> str:
    shown = io.StringIO()
    show(content, Console(file=shown, width=80))
    return shown.getvalue()


def test_table_shows_every_step() -> None:
    text = printed(tables.print_table, RESULTS)
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
    text = printed(tables.print_table, unknown)
    assert "target sparsity - %" in text
    assert "multiply-accumulates" not in text


LAYERS = [
    {"path": "a/kernel", "size": 6, "nonzero": 2, "dense": 600, "sparse": 200},
    {"path": "b/kernel", "size": 14, "nonzero": 11, "dense": 10, "sparse": 10},
]


def test_layers_and_their_sum() -> None:
    text = printed(tables.print_layers, LAYERS)
    assert "│ a " in text
    (total,) = [line for line in text.splitlines() if "│ all" in line]
    assert "20" in total
    assert "13" in total


def test_comparison_has_a_line_a_run() -> None:
    runs = {"all [x=1]": RESULTS, "dense": RESULTS | {"stages": []}}
    lines = printed(tables.print_comparison, runs).splitlines()
    (pruned,) = [line for line in lines if "all [x=1]" in line]
    assert all(x in pruned for x in ("90.01", "93.33", "88.22", "91.44", "78.9"))
    (dense,) = [line for line in lines if "│ dense " in line]
    assert " - " in dense
