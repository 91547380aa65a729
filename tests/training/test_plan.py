"""A config becomes phases and pruning steps, or is refused before anything starts."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import spread_training  # noqa: F401 (has the model "net")
from jax.sharding import AbstractMesh
from saved_runs import random_network, save_run
from small_runs import small

from woodfisher_jax.torch_weights import to_state_dict
from woodfisher_jax.training import plan as plan_
from woodfisher_jax.training.config import ConfigError, from_dict
from woodfisher_jax.training.plan import make_plan, prepare

STEPS_PER_EPOCH = 1437 // 64


def quiet(label: str, done: int, total: int) -> None:
    """Shows no progress."""


def test_devices_and_parts_divide_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan_.distributed, "all_devices", lambda: AbstractMesh((8,), ("devices",))
    )
    with pytest.raises(ConfigError) as caught:
        prepare(small(train__batch_size=180), quiet)
    message = str(caught.value)
    assert "config.train.batch_size=180; expected a multiple of 8" in message
    assert "such as 176 or 184" in message
    with pytest.raises(ConfigError, match="8 x 4, such as 32 or 64"):
        prepare(small(dense__batch_size=36, dense__accumulation_steps=4), quiet)
    # What is not trained may be of any size.
    prepare(small(dense__epochs=0, dense__batch_size=180), quiet)


def test_training_is_in_the_precision_of_the_config() -> None:
    changes = {"model": {"name": "net"}, "train__dtype": "bfloat16"}
    plan, _ = prepare(small(**changes), quiet)
    assert plan.train.model.dtype == "bfloat16"
    assert plan.dense.model is plan.model
    assert plan.model.dtype is None
    with pytest.raises(ConfigError, match="dtype='bfloat16', but MLP"):
        prepare(small(train__dtype="bfloat16"), quiet)


def test_settings_of_training_reach_the_optimizer() -> None:
    config = small(train__warmup_epochs=2, train__weight_decay_kernels_only=True)
    plan, _ = prepare(config, quiet)
    rates = [float(plan.train.schedule(step)) for step in (0, 21, 43, 60)]
    np.testing.assert_allclose(rates, 0.02 * np.array([1 / 44, 0.5, 1, 1]), rtol=1e-6)
    with pytest.raises(ConfigError, match="novograd"):
        prepare(
            small(
                train__optimizer={"name": "novograd"},
                train__weight_decay_kernels_only=True,
            ),
            quiet,
        )


def test_the_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"12 classes; expected the 10 of .*fit_to_data"
    ):
        prepare(small(model={"name": "mlp", "num_classes": 12}), quiet)


def test_pruning_steps_lie_after_the_dense_epochs() -> None:
    plan, _ = prepare(small(), quiet)
    assert plan.dense.last_step == plan.train.first_step == 2 * STEPS_PER_EPOCH
    assert plan.end == 5 * STEPS_PER_EPOCH
    epochs = [stage.time / STEPS_PER_EPOCH for stage in plan.stages]
    assert epochs == [2, 3, 4]
    assert plan.train.epoch_at(plan.end) == 5


def test_steps_count_from_the_start_of_train() -> None:
    plan, _ = prepare(small(prune__unit="steps", prune__start=7, prune__end=9), quiet)
    assert [s.time - plan.train.first_step for s in plan.stages] == [7, 8, 9]


def test_one_shot_has_no_training_after_it() -> None:
    plan, _ = prepare(small(prune__one_shot=True), quiet)
    assert plan.end == plan.train.first_step == plan.stages[0].time


def test_steps_of_several_pruners_are_in_order_of_time() -> None:
    config = small(
        prune__prunable="fc1",
        prune_2={"prunable": "fc2", "initial_sparsity": 0.1, "start": 1, "end": 3},
    )
    plan, _ = prepare(config, quiet)
    epochs = [
        (stage.time / STEPS_PER_EPOCH - 2, stage.pruner[-1]) for stage in plan.stages
    ]
    assert epochs == [(0, "e"), (1, "e"), (1, "2"), (2, "e"), (2, "2"), (3, "2")]


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune__num_samples": 2000}, ["num_samples", "2000", "1437"]),
        (
            {"prune__num_samples": 100, "prune__batch_size": 15},
            ["100 x 15 = 1500", "1437"],
        ),
        ({"train__batch_size": 1438}, ["config.train.batch_size=1438", "1437"]),
        ({"dense__batch_size": 1438}, ["config.dense.batch_size=1438", "1437"]),
        ({"prune__unit": "steps", "prune__end": 67}, ["end=67", "66 steps"]),
        (
            {"prune_2": {"prunable": "x", "num_samples": 1500}},
            ["config.prune_2", "1500", "1437"],
        ),
        ({"prune__batch_norm_samples": 1438}, ["batch_norm_samples=1438", "1437"]),
        ({"prune__loss_samples": 1438}, ["loss_samples=1438", "1437"]),
    ],
    ids=str,
)
def test_what_the_data_cannot_give_is_refused(
    changes: dict[str, Any], words: list[str]
) -> None:
    config = small()
    plan, _ = prepare(config, quiet)
    with pytest.raises(ConfigError) as caught:
        make_plan(small(**changes), plan.dataset, plan.model, quiet)
    for word in words:
        assert word in str(caught.value)
