"""Times add up, sparse is called slower where it is, a config file gives the run."""

from pathlib import Path
from typing import Any

import pytest
from read_pages import Page
from small_runs import small
from written_runs import STAGE, write_run

from woodfisher_jax.report import provenance
from woodfisher_jax.report.page import Html, page
from woodfisher_jax.report.record import RunRecord, read_record
from woodfisher_jax.training.config import Config, from_dict, to_dict
from woodfisher_jax.training.config_files import load_config

LATENCY = {
    "processor": "a processor",
    "cores": 2,
    "sparsity": 0.9,
    "products": [
        {"batch_size": 1, "device": "cpu", "dense": 2.0, "bcoo": 6.0, "csr": 0.5},
        {"batch_size": 64, "device": "cpu", "dense": 2.0, "bcoo": 2.02, "csr": 4.0},
    ],
}


def seen(content: Html) -> Page:
    return Page(page("title", [], [("section", content)]))


def record(folder: Path, **changes: Any) -> RunRecord:
    return read_record(write_run(folder, **changes))


def test_the_phases_add_up_to_the_whole_time(tmp_path: Path) -> None:
    found = provenance.seconds_of_phases(record(tmp_path))
    assert found == {
        "training, dense": 6.0,
        "training, pruned": 3.0,
        "gradients": 1.0,
        "curvature, masks": 2.0,
        "update": 0.5,
        "judging pruned": 0.5,
        "start, tests, saves": 7.0,
    }


def test_phases_that_took_no_time_are_left_out(tmp_path: Path) -> None:
    found = provenance.seconds_of_phases(record(tmp_path, stages=[]))
    assert list(found) == [
        "training, dense",
        "training, pruned",
        "start, tests, saves",
    ]
    unknown = record(tmp_path, results={"seconds_total": None})
    assert provenance.seconds_of_phases(unknown) == {}


def test_memory_planned_and_taken(tmp_path: Path) -> None:
    text = seen(provenance.costs(record(tmp_path))).text
    for words in ("1.23 GB", "9 MB", "8 GB", "4 MB float32, device", "2 x a CPU"):
        assert words in text
    kept_none = STAGE | {"store": ""}
    text = seen(provenance.costs(record(tmp_path, stages=[kept_none]))).text
    assert "prune, gradients none" in text
    bare = {k: v for k, v in STAGE.items() if k != "store"}
    assert "prune," not in seen(provenance.costs(record(tmp_path, stages=[bare]))).text


def test_latency_says_which_is_slower() -> None:
    one, many = LATENCY["products"]
    assert provenance.verdict(one) == (
        "One row at a time: BCOO is slower than dense, by a factor of 3.0; CSR is "
        "faster than dense, by a factor of 4.0."
    )
    assert provenance.verdict(many) == (
        "64 rows at a time: BCOO is as fast as dense, to 5 %; CSR is slower than "
        "dense, by a factor of 2.0."
    )


def test_latency_measured_or_how_to_measure_it(tmp_path: Path) -> None:
    run = record(tmp_path)
    assert f"woodfisher_jax.report {tmp_path} --latency" in (
        seen(provenance.latency(run)).text
    )
    found = seen(provenance.latency(run._replace(latency=LATENCY)))
    assert found.row("1") == ["1", "2", "6", "0.5"]
    assert "a processor, 2 cores" in found.text
    assert "Sparsity then: 90.00 %" in found.text


FURTHER = {
    "target_sparsity": 0.5,
    "prunable": "fc2/kernel",
    "end": 2,
    "method": "globalmagni",
}


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        small(),
        small(
            seed=3,
            compare_with=("globalmagni",),
            dense={"epochs": 1, "optimizer": {"name": "adam", "b1": 0.8}},
            train={"epochs": 3, "schedule": "multistep", "decay_at_epochs": (1, 2)},
            prune__prunable="fc1/kernel",
            prune__block_size=7,
            prune_2=FURTHER,
        ),
    ],
    ids=["defaults", "small", "pruners"],
)
def test_the_config_file_gives_the_config(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.py"
    path.write_text(provenance.config_file(to_dict(config)))
    assert from_dict(load_config(str(path)).to_dict()) == config


def test_what_differs_from_the_defaults_is_marked(tmp_path: Path) -> None:
    content = provenance.origin(record(tmp_path, prune_2=FURTHER))
    found = seen(content)
    short, whole = found.tables[:2]
    fields = [row[0] for row in short[1:]]
    assert "model.hidden" in fields
    assert "prune.target_sparsity" in fields
    assert "prune_2.target_sparsity" in fields
    assert "prune_2.num_samples" not in fields  # As in the first pruner.
    assert "eval_batch_size" not in fields
    assert ["eval_batch_size", "1000", "1000"] in whole
    assert content.count('<tr class="marked">') == len(fields)


def test_the_command_and_versions(tmp_path: Path) -> None:
    run = record(tmp_path)._replace(command="python -m x '<b>'")
    found = seen(provenance.origin(run))
    assert "python -m x '<b>'" in found.text
    assert "def get_config()" in found.text
    assert found.row("woodfisher-jax") == ["woodfisher-jax", "not installed"]
    assert "summary" in found.names
