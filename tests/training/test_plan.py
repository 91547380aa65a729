"""A config becomes phases and pruning steps, or is refused before anything starts."""

from typing import Any

import numpy as np
import pytest
import spread_training  # noqa: F401 (has the model "net")
from jax.sharding import AbstractMesh
from small_runs import small

from woodfisher_jax.training import plan as plan_
from woodfisher_jax.training.config import ConfigError
from woodfisher_jax.training.plan import make_plan
from woodfisher_jax.training.start import prepare

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
