"""A saved run is read without its model and its data set."""

from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import random_network, save_run

from woodfisher_jax.training.resuming.saved_run import read_config, read_run
from woodfisher_jax.trees.masks import apply_masks

RESNET = {"name": "resnet20", "num_classes": 7}


@pytest.fixture(scope="module")
def networks() -> list:
    return [
        random_network("resnet20", (32, 32, 3), 0.5, seed=seed, num_classes=7)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, networks: list) -> Path:
    saves = dict(zip((4, 9), networks, strict=True))
    return save_run(tmp_path_factory.mktemp("run"), RESNET, saves)


@pytest.mark.parametrize(
    ("where", "which", "number"),
    [
        ("", "latest", 1),
        ("", "best", 0),
        ("checkpoints/4", "latest", 0),
        ("checkpoints/9", "best", 1),
    ],
)
def test_each_save_is_read(
    folder: Path, networks: list, where: str, which: str, number: int
) -> None:
    run = read_run(folder / where, which)
    assert run.config.model.name == "resnet20"
    assert run.config.model.settings == {"num_classes": 7}
    assert run.meta == {"log": {"step": (4, 9)[number]}}
    assert jax.tree.structure(networks[number]) == jax.tree.structure(
        (run.variables, run.masks)
    )
    for expected, found in zip(
        jax.tree.leaves(networks[number]),
        jax.tree.leaves((run.variables, run.masks)),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_averaged_weights_are_read_where_there_are_some(
    tmp_path: Path, networks: list
) -> None:
    (last, masks), (average, _) = networks
    average = {**average, "params": apply_masks(average["params"], masks)}
    folder = save_run(tmp_path, RESNET, {1: (last | {"average": average}, masks)})
    found = read_run(folder).variables
    assert jax.tree.structure(found) == jax.tree.structure(average)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(average), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_network_without_batch_norm_has_params_alone(tmp_path: Path) -> None:
    network = random_network("mlp", (8, 8, 1), 0.5)
    run = read_run(save_run(tmp_path, {"name": "mlp"}, {1: network}))
    assert run.variables.keys() == {"params"}


def test_folders_without_a_save_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint 5 in .* one of \[4, 9\]"):
        read_run(folder / "checkpoints" / "5")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert read_config(tmp_path) == read_config(folder)
    with pytest.raises(ValueError, match="nothing was saved"):
        read_run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
