"""A config takes its classes from the data set, and no more examples than it has."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from saved_runs import random_network
from small_runs import run, small

from woodfisher_jax.data import DataSet, Split
from woodfisher_jax.data.generated import Shape, write_folder
from woodfisher_jax.training import distributed, fitting
from woodfisher_jax.training.config import ConfigError, from_dict
from woodfisher_jax.training.config.files import load_config, override
from woodfisher_jax.training.fitting import fitted
from woodfisher_jax.training.resuming.saved_run import read_config
from woodfisher_jax.training.start import fit, outline, prepare
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.state_dicts import to_state_dict


def of_size(number: int, classes: int = 3) -> DataSet:
    """A data set with so many training images."""
    labels = np.arange(number, dtype=np.int32) % classes
    split = Split(np.zeros((number, 8, 8, 1), np.uint8), labels)
    return DataSet("few", split, split, classes, 255.0, (0.0,), (1.0,), None)


def test_what_fits_stays_as_it_is() -> None:
    config = small(model={"name": "mlp", "num_classes": 3})
    assert fitted(config, of_size(64)) == (config, [])


def test_classes_are_those_of_the_data_unless_given() -> None:
    config, notes = fitted(small(), of_size(100, classes=4))
    assert config.model.settings == {"hidden": (16,), "num_classes": 4}
    assert notes == ["config.model.num_classes=4, of the data set"]
    assert fitted(config, of_size(100, classes=5)) == (config, [])


@pytest.mark.parametrize(
    ("given", "lowered"),
    [
        ({"num_samples": 50, "batch_size": 9}, {"batch_size": 2}),
        (
            {"num_samples": 500, "batch_size": 9},
            {"num_samples": 100, "batch_size": 1},
        ),
        (
            {"batch_norm_samples": 200, "loss_samples": 101},
            {"batch_norm_samples": 100, "loss_samples": 100},
        ),
        (
            {"damping_search_samples": 90, "num_samples": 80},
            {"damping_search_samples": 50, "num_samples": 50},
        ),
        (
            {"damping_search_samples": 20, "num_samples": 80, "mean_samples": 400},
            {"mean_samples": 80},
        ),
    ],
    ids=str,
)
def test_samples_of_a_pruner_are_bounded(
    given: dict[str, Any], lowered: dict[str, int]
) -> None:
    given = {"method": "woodtaylor", **given}
    changes = {f"prune__{name}": value for name, value in given.items()}
    config, notes = fitted(small(**changes), of_size(100))
    expected = {f"prune__{name}": value for name, value in lowered.items()}
    model = {"name": "mlp", "hidden": (16,), "num_classes": 3}
    assert config == small(**{**changes, **expected, "model": model})
    assert notes[1:] == [
        f"config.prune.{name}={value} instead of {given[name]}: there are 100 training "
        "examples"
        for name, value in lowered.items()
    ]


def test_every_pruner_and_both_trainings_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = AbstractMesh((4,), ("devices",))
    monkeypatch.setattr(fitting.distributed, "all_devices", lambda: mesh)
    config, notes = fitted(
        small(
            dense__batch_size=64,
            train__batch_size=96,
            train__accumulation_steps=3,
            prune_2={"prunable": "x", "num_samples": 70},
        ),
        of_size(50),
    )
    assert config.dense.batch_size == 48
    assert config.train.batch_size == 48
    assert config.also_prune[0].num_samples == 50
    assert [note.partition("=")[0] for note in notes[1:]] == [
        "config.dense.batch_size",
        "config.train.batch_size",
        "config.prune_2.num_samples",
    ]


def test_the_shipped_config_asks_for_a_network_and_a_folder(tmp_path: Path) -> None:
    shape = Shape(classes=3, per_class=4, test_per_class=2, side=20)
    write_folder(tmp_path, shape)
    shutil.rmtree(tmp_path / "val")
    values = load_config("finetune")
    for field in (f"data.dir={tmp_path}", "data.image_size=16", "model.name=mlp"):
        override(values, f"--config.{field}")
    config, notes = fit(from_dict(values))
    assert len(notes) == 5  # Classes, two batch sizes, rows and examples of a row.
    plan, _ = prepare(config, quiet)
    assert plan.dataset.test.size == 3
    assert config.model.settings == {"num_classes": 3}
    assert plan.train.steps_per_epoch == plan.dense.steps_per_epoch == 1
    assert fit(config) == (config, [])


def quiet(label: str, done: int, total: int) -> None:
    """Shows no progress."""


def test_a_run_is_fitted_only_where_it_says_so() -> None:
    config = small(prune__num_samples=2000)
    assert fit(config) == (config, [])
    config, notes = fit(small(prune__num_samples=2000, fit_to_data=True))
    assert config.prune.num_samples == 1437
    assert len(notes) == 2
    prepare(config, quiet)


def test_a_run_keeps_what_it_was_fitted_to(tmp_path: Path) -> None:
    config = small(
        fit_to_data=True,
        dense__epochs=0,
        prune__method="magni",
        prune__one_shot=True,
        prune__loss_samples=5000,
    )
    first = run(config, tmp_path, quiet=True)
    saved = read_config(tmp_path)
    assert saved == fit(config)[0] != config
    log = (tmp_path / "log.txt").read_text()
    assert "config.prune.loss_samples=1437 instead of 5000" in log
    # The same command again, of a finished run.
    assert run(config, tmp_path, quiet=True)["final"] == first["final"]


def written(path: Path, **settings: Any) -> str:
    """A file with a network of 8 x 8 images and two hidden layers."""
    variables, _ = random_network("mlp", (8, 8, 1), 0.0, **settings)
    save_safetensors(path, to_state_dict(variables), {})
    return str(path)


def test_widths_are_those_of_a_smaller_network(tmp_path: Path) -> None:
    file = written(tmp_path / "small.safetensors", hidden=(5, 7))
    model = {"name": "mlp", "hidden": (16, 7)}
    config, notes = fit(small(init_from=file, model=model))
    assert config.model.settings["widths"] == {"fc1": 5}
    assert notes == [
        "config.model.widths, outputs of layers that config.init_from has of mlp: fc1 "
        "5 of 16"
    ]
    _, (variables, _) = prepare(config, quiet)
    assert variables["params"]["fc1"]["kernel"].shape == (64, 5)
    # Read once, they are the config's own.
    assert fit(config) == (config, [])


def test_more_outputs_and_other_classes_are_no_widths(tmp_path: Path) -> None:
    model = {"name": "mlp", "hidden": (16, 7)}
    for stored in ({"hidden": (20, 7)}, {"hidden": (16, 7), "num_classes": 3}):
        file = written(tmp_path / "other.safetensors", **stored)
        config = small(init_from=file, model=model)
        assert fit(config) == (config, [])
    with pytest.raises(ConfigError, match=r"fc3\.weight .*\(3, 7\), model \(10, 7\)"):
        prepare(config, quiet)


def test_the_model_is_named_where_it_is_what_is_wrong(tmp_path: Path) -> None:
    file = written(tmp_path / "small.safetensors", hidden=(5,))
    model = {"name": "mlp", "hidde": (16,)}
    with pytest.raises(ConfigError, match=r"^config\.model: .*'hidden'"):
        fit(small(init_from=file, model=model))


def test_widths_of_no_layer_are_refused() -> None:
    model = {"name": "mlp", "hidden": (16,), "widths": {"fc7": 3}}
    with pytest.raises(ConfigError, match=r"config\.model: widths\['fc7'\]: there is"):
        outline(small(model=model), distributed.all_devices())
