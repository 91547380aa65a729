"""The config on the page of a run, and a config file from it."""

import json
from pathlib import Path

import pytest
from read_pages import seen, text_of
from small_runs import small
from written_runs import record_of, write_run

from woodfisher_jax.report.sections import origin
from woodfisher_jax.training.config import Config, from_dict, to_dict
from woodfisher_jax.training.config.files import load_config

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
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    path = tmp_path / "config.py"
    path.write_text(origin.config_file(record_of(folder)))
    assert from_dict(load_config(str(path))) == config


def test_what_differs_from_the_defaults_is_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path, prune_2=FURTHER)
    found = seen(folder)
    short, whole = (t for t in found.tables if t[0] == ["field", "here", "default"])
    fields = [row[0] for row in short[1:]]
    assert "model.hidden" in fields
    assert "prune.target_sparsity" in fields
    assert "prune_2.target_sparsity" in fields
    assert "prune_2.num_samples" not in fields  # As in the first pruner.
    assert "eval_batch_size" not in fields
    assert ["eval_batch_size", "1000", "1000"] in whole
    marked = text_of(record_of(folder)).count('<tr class="marked">')
    assert marked == len(fields) + 1  # And the sum of the layers.


def test_the_command_and_versions(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "command.txt").write_text("python -m x '<b>'")
    found = seen(folder)
    assert "python -m x '<b>'" in found.text
    assert "def get_config()" in found.text
    assert found.row("woodfisher-jax") == ["woodfisher-jax", "not installed"]
