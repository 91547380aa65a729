"""Time and memory on the page of a run."""

from pathlib import Path

from read_pages import seen
from written_runs import STAGE, record_of, write_run

from woodfisher_jax.report.sections import costs


def test_the_phases_add_up_to_the_whole_time(tmp_path: Path) -> None:
    assert costs.seconds_of_phases(record_of(write_run(tmp_path))) == {
        "training, dense": 6.0,
        "training, pruned": 3.0,
        "gradients": 1.0,
        "curvature, masks": 2.0,
        "update": 0.5,
        "evaluation after pruning": 0.5,
        "start, tests, saves": 7.0,
    }
    nothing = record_of(write_run(tmp_path, stages=[]))
    assert "update" not in costs.seconds_of_phases(nothing)
    unknown = record_of(write_run(tmp_path, results={"seconds_total": None}))
    assert costs.seconds_of_phases(unknown) == {}


def test_memory_planned_and_taken(tmp_path: Path) -> None:
    text = seen(write_run(tmp_path)).text
    for words in ("1.23 GB", "9 MB", "8 GB", "4 MB float32, device", "2 x a CPU"):
        assert words in text
    kept_none = seen(write_run(tmp_path, stages=[STAGE | {"store": ""}]))
    assert kept_none.row("prune, gradients")[1] == "none"
    bare = {k: v for k, v in STAGE.items() if k != "store"}
    assert "prune, planned" not in seen(write_run(tmp_path, stages=[bare])).text
