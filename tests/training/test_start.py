"""What a run starts from: random weights, a checkpoint or another run; or a refusal."""

from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import random_network, save_run
from small_runs import small

from woodfisher_jax.torch_weights import to_state_dict
from woodfisher_jax.training.config import ConfigError, from_dict
from woodfisher_jax.training.start import prepare

STEPS_PER_EPOCH = 1437 // 64


def quiet(label: str, done: int, total: int) -> None:
    """Shows no progress."""


def test_the_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"12 classes; expected the 10 of .*fit_to_data"
    ):
        prepare(small(model={"name": "mlp", "num_classes": 12}), quiet)


def test_multiply_accumulates_are_of_the_layers() -> None:
    plan, _ = prepare(small(), quiet)
    assert plan.costs == {"fc1/kernel": 1, "fc2/kernel": 1}


def test_the_seed_decides_the_first_weights() -> None:
    one, other, again = (
        prepare(small(seed=seed), quiet)[1][0]["params"]["fc1"]["kernel"]
        for seed in (0, 1, 0)
    )
    assert (np.asarray(one) != np.asarray(other)).any()
    np.testing.assert_array_equal(one, again)


@pytest.fixture
def dense_file(tmp_path: Path) -> Path:
    """A checkpoint of the small network, half of its first layer masked."""
    _, (variables, _) = prepare(small(seed=5), quiet)
    arrays = to_state_dict(variables)
    mask = np.arange(arrays["fc1.weight"].size).reshape(arrays["fc1.weight"].shape) % 2
    path = tmp_path / "dense.npz"
    np.savez(path, **arrays, **{"fc1._weight_mask": mask.astype(np.float32)})
    return path


def test_a_given_network_is_not_trained_first(dense_file: Path) -> None:
    plan, (variables, masks) = prepare(small(init_from=str(dense_file)), quiet)
    assert plan.dense.last_step == 0
    assert plan.stages[0].time == 0
    with np.load(dense_file) as saved:
        kept = saved["fc1._weight_mask"].T.astype(bool)
        weights = saved["fc1.weight"].T
    np.testing.assert_array_equal(masks["fc1/kernel"], kept)
    kernel = np.asarray(variables["params"]["fc1"]["kernel"])
    np.testing.assert_array_equal(kernel, np.where(kept, weights, 0))
    assert np.asarray(masks["fc2/kernel"]).all()


def test_another_run_is_a_start(tmp_path: Path) -> None:
    variables, masks = random_network("mlp", (8, 8, 1), 0.5, hidden=(16,))
    model = {"name": "mlp", "hidden": [16]}
    run = save_run(tmp_path / "run", model, {2: (variables, masks)})
    plan, (found, found_masks) = prepare(small(init_from=str(run)), quiet)
    assert plan.dense.last_step == 0
    for path in ("fc1/kernel", "fc2/kernel"):
        layer = path.partition("/")[0]
        kernel = found["params"][layer]["kernel"]
        np.testing.assert_array_equal(kernel, variables["params"][layer]["kernel"])
        np.testing.assert_array_equal(found_masks[path], masks[path])


@pytest.mark.parametrize("headless", [False, True])
def test_a_classifier_of_another_size_is_trained_first(
    dense_file: Path, tmp_path: Path, headless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(dense_file) as saved:
        arrays = dict(saved)
    del arrays["fc2.weight"]
    if not headless:
        arrays["fc2.weight"] = np.ones((7, 16))
    np.savez(tmp_path / "other.npz", **arrays)
    changes = {"init_from": str(tmp_path / "other.npz"), "seed": 3}
    changes["model"] = {"name": "mlp", "hidden": (16,), "num_classes": 10}
    with pytest.raises(ConfigError, match=r"other\.npz as mlp: .*fc2\.weight"):
        prepare(small(**changes), quiet)
    plan, (variables, masks) = prepare(small(**changes, fit_to_data=True), quiet)
    assert plan.dense.last_step == 2 * STEPS_PER_EPOCH
    assert plan.stages[0].time == plan.dense.last_step
    own = prepare(small(seed=3), quiet)[1][0]["params"]["fc2"]
    np.testing.assert_array_equal(variables["params"]["fc2"]["kernel"], own["kernel"])
    assert not np.asarray(masks["fc1/kernel"]).all()
    assert np.asarray(masks["fc2/kernel"]).all()
    had = "no weights" if headless else "7 outputs"
    assert f"fc2 of config.init_from has {had}, and the data 10 classes" in caplog.text
    assert "config.dense.epochs=2 before pruning" in caplog.text


def test_a_classifier_of_the_right_size_is_kept(dense_file: Path) -> None:
    model = {"name": "mlp", "hidden": (16,), "num_classes": 10}
    config = small(init_from=str(dense_file), model=model, fit_to_data=True)
    plan, (variables, _) = prepare(config, quiet)
    assert plan.dense.last_step == 0
    with np.load(dense_file) as saved:
        weights = saved["fc2.weight"].T
    np.testing.assert_array_equal(variables["params"]["fc2"]["kernel"], weights)


def test_a_network_of_another_shape_is_refused(dense_file: Path) -> None:
    config = small(init_from=str(dense_file), model={"name": "mlp", "hidden": (16, 8)})
    with pytest.raises(ConfigError, match=r"config\.init_from") as caught:
        prepare(config, quiet)
    message = str(caught.value)
    assert "fc3.weight" in message
    assert "fc2.weight" in message
    assert "(10, 16)" in message
    assert "(8, 16)" in message


@pytest.mark.parametrize("keep", [0, 10, 700])
def test_a_truncated_checkpoint_is_refused(
    dense_file: Path, tmp_path: Path, keep: int
) -> None:
    path = tmp_path / "short.npz"
    path.write_bytes(dense_file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"short\.npz"):
        prepare(small(init_from=str(path)), quiet)


@pytest.mark.slow
def test_the_originals_checkpoint_is_read(
    checkpoints_dir: Path,
    tfds_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = from_dict(
        {
            "init_from": str(checkpoints_dir / "mnist_25_epoch_93.97.ckpt"),
            "data": {"name": "mnist", "dir": str(tfds_dir)},
            "model": {"name": "mlp"},
        }
    )
    _, (variables, masks) = prepare(config, quiet)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 32_360
    assert all(np.asarray(mask).all() for mask in masks.values())
