"""Tables show every number, aligned, at the width of a terminal."""

import pytest

from woodfisher_jax.report.elements import tables
from woodfisher_jax.report.elements.quantities import NONE
from woodfisher_jax.rows.needs import Needs, Phase

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


LAYERS = [
    {"path": "a/kernel", "size": 6, "nonzero": 2, "dense": 600, "sparse": 200},
    {"path": "b/kernel", "size": 14, "nonzero": 11, "dense": 10, "sparse": 10},
]


def test_every_step_has_a_line(capsys: pytest.CaptureFixture) -> None:
    tables.print_table(RESULTS)
    title, headers, rule, *lines, weights, machine = (
        capsys.readouterr().out.splitlines()
    )
    assert title == "woodfisher, target sparsity 90.00 %"
    expected = [
        "dense 93.33",
        "prune 1 3 1,234 80.00 % 79.99 % 92.11 88.22 4.6 s",
        f"prune 2 3 2,345 80.00 % 79.99 % {NONE} 88.22 4.6 s",
        "final 90.01 % 91.44 78.9 s",
    ]
    assert [" ".join(line.split()) for line in lines] == expected
    assert weights == (
        "26,000 of 260,000 prunable weights and 8.12 M of 40.5 M multiply-accumulates "
        "left"
    )
    assert machine == "peak memory 1.23 GB; 2 x a CPU [big]"
    assert max(map(len, [headers, *lines, machine])) <= 80
    # Numbers end where their column ends.
    ends = [len(line) for line in (headers, rule, lines[1])]
    assert len(set(ends)) == 1


def test_a_target_in_macs_has_no_sparsity(capsys: pytest.CaptureFixture) -> None:
    tables.print_table(RESULTS | {"target_sparsity": None, "macs": None})
    text = capsys.readouterr().out
    assert f"target sparsity {NONE}" in text
    assert "multiply-accumulates" not in text


def test_layers_and_their_sum(capsys: pytest.CaptureFixture) -> None:
    tables.print_layers(LAYERS)
    *_, first, second, total = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "6", "2", "66.67", "%", "600", "200"]
    assert second.split()[0] == "b"
    assert total.split() == ["all", "20", "13", "35.00", "%", "610", "210"]


def test_a_comparison_has_a_line_a_run(capsys: pytest.CaptureFixture) -> None:
    tables.print_comparison({"all [x=1]": RESULTS, "dense": RESULTS | {"stages": []}})
    *_, pruned, dense = capsys.readouterr().out.splitlines()
    assert " ".join(pruned.split()) == (
        "all [x=1] woodfisher 90.01 % 93.33 88.22 91.44 78.9 s"
    )
    assert dense.split()[4:6] == ["93.33", NONE]


def test_a_memory_plan_has_units_that_fit(capsys: pytest.CaptureFixture) -> None:
    blocks = ((200, 1, "dense"), (500, 3, "sample_space"), (40, 2, "sample_space"))
    phases = (Phase("gradients", 1.1e7, 5_696, 4e8), Phase("update", 0.0, 0, 1.26e10))
    tables.print_needs(
        Needs(
            "disk", "float32", 5_696, 1, False, 64, 1780, 400, 1, blocks, phases, 17e9
        )
    )
    _, headers, _, first, second, line = capsys.readouterr().out.splitlines()
    assert headers.split("  ")[0] == "phase"
    assert first.split() == ["gradients", "11", "M", "5.7", "kB", "400", "MB"]
    assert second.split() == ["update", "0", "0", "B", "12.6", "GB"]
    assert line == (
        "a pruning step: 400 gradients of 1,780 weights on disk (5.7 kB, float32); 1 "
        "block by dense; 5 blocks by sample_space; peak 12.6 GB of 17 GB; microbatches "
        "of 64"
    )


def test_programs_say_what_they_take_of_a_device(capsys: pytest.CaptureFixture) -> None:
    one = {
        "name": "step of train",
        "arguments": 200_000_000,
        "results": 190_000_000,
        "aliased": 180_000_000,
        "temporaries": 590_000_000,
        "flops": 1.5e12,
        "collectives": {"all-reduce": 100, "all-gather": 2},
        "seconds": 12.34,
        "failure": "",
    }
    none = {key: 0 for key in one} | {"collectives": {}, "failure": "no room"}
    tables.print_programs([one, none | {"name": "update"}], 1_600_000_000)
    headers, _, step, update, kinds = capsys.readouterr().out.splitlines()
    assert "of 1.6 GB" in headers
    assert " ".join(step.split()) == (
        "step of train 200 MB 590 MB 180 MB 50 % 1.5 T 102 12.3"
    )
    assert " ".join(update.split()) == "update 0 B 0 B 0 B no 0 0 0.0"
    assert kinds == "step of train: 100 all-reduce, 2 all-gather"
