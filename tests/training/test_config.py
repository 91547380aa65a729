"""A config is checked once, and an error names the field and what to write there."""

import dataclasses
import math

import pytest

from woodfisher_jax.data import ImageOptions
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import (
    Config,
    ConfigError,
    PruneConfig,
    from_dict,
    to_dict,
)


def test_nothing_given_is_the_defaults() -> None:
    assert from_dict({}) == Config()


def test_to_dict_and_back() -> None:
    given = {
        "seed": 3,
        "compare_with": ["globalmagni"],
        "model": {"name": "mlp", "hidden": [8, 4]},
        "train": {"epochs": 9},
        "prune": {"end": 9, "block_size": 50, "scope": "layer"},
    }
    config = from_dict(given)
    assert config.model.settings == {"hidden": (8, 4)}
    assert from_dict(to_dict(config)) == config


def test_an_integer_is_a_float_where_one_is_expected() -> None:
    assert from_dict({"prune": {"damping": 1}}).prune.damping == 1.0


def test_none_may_come_from_the_command_line() -> None:
    assert from_dict({"prune": {"prunable": "None"}}).prune.prunable is None


def test_how_images_are_read_is_part_of_data() -> None:
    assert Config().data.image_options == ImageOptions()
    given = {"image_size": 64, "resize": 72, "autoaugment": True, "workers": 3}
    given |= {"prefetch": 4, "max_bad_images": 5}
    assert set(given) == set(ImageOptions._fields)
    assert from_dict({"data": given}).data.image_options == ImageOptions(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sede": 1}, ["config.sede", "did you mean config.seed?"]),
        (
            {"prune": {"num_sample": 1}},
            ["config.prune.num_sample", "did you mean config.prune.num_samples?"],
        ),
        ({"zzz": 1}, ["config.zzz", "there are", "seed"]),
        ({"prune": 3}, ["config.prune=3", "group"]),
        ({"seed": "x"}, ["config.seed='x'", "str", "expected int"]),
        ({"seed": True}, ["config.seed=True", "expected int"]),
        ({"seed": 1.5}, ["config.seed=1.5", "expected int"]),
        ({"init_from": 3}, ["config.init_from=3", "str or None"]),
        ({"prune": {"damping": None}}, ["config.prune.damping=None", "float"]),
        ({"seed": -1}, ["config.seed=-1", "0 or more"]),
        ({"prune": {"target_sparsity": 1.0}}, ["target_sparsity=1.0", "[0, 1)"]),
        ({"prune": {"target_sparsity": -0.1}}, ["target_sparsity=-0.1", "[0, 1)"]),
        ({"prune": {"target_sparsity": math.nan}}, ["target_sparsity=nan"]),
        (
            {"prune": {"initial_sparsity": 0.95}},
            ["target_sparsity=0.9", "at least initial_sparsity=0.95"],
        ),
        ({"prune": {"num_samples": 0}}, ["prune.num_samples=0", "1 or more"]),
        ({"prune": {"num_samples": -4}}, ["prune.num_samples=-4", "1 or more"]),
        ({"prune": {"batch_size": 0}}, ["prune.batch_size=0", "1 or more"]),
        ({"prune": {"block_size": -2}}, ["prune.block_size=-2", "1 or more"]),
        ({"prune": {"damping": 0.0}}, ["prune.damping=0.0", "positive"]),
        ({"prune": {"damping": -1.0}}, ["prune.damping=-1.0", "positive"]),
        ({"prune": {"damping": math.inf}}, ["prune.damping=inf", "positive"]),
        (
            {"prune": {"method": "woodfischer"}},
            ["method='woodfischer'", "woodfisherblock", "globalmagni"],
        ),
        ({"compare_with": ["x"]}, ["method='x'", "globalmagni"]),
        ({"prune": {"method": "magni", "scope": "global"}}, ["scope='global'"]),
        ({"prune": {"solver": "lu"}}, ["solver='lu'", "sample_space"]),
        ({"prune": {"unit": "days"}}, ["unit='days'", "epochs or steps"]),
        ({"prune": {"end": 5}}, ["prune.end=5", "train.epochs=0"]),
        ({"prune": {"start": 3, "end": 1}}, ["start=3", "end=1"]),
        ({"prune": {"frequency": 0}}, ["frequency=0"]),
        ({"prune": {"degree": 0.0}}, ["degree=0.0"]),
        ({"train": {"batch_size": 0}}, ["train.batch_size=0"]),
        ({"train": {"epochs": -1}}, ["train.epochs=-1"]),
        ({"dense": {"learning_rate": 0.0}}, ["dense.learning_rate=0.0"]),
        (
            {"dense": {"optimizer": {"momentum": 1.0}}},
            ["dense.optimizer.momentum=1.0", "[0, 1)"],
        ),
        (
            {"train": {"optimizer": {"name": "sdg"}}},
            ["train.optimizer", "'sdg'", "'sgd'?"],
        ),
        (
            {"train": {"optimizer": {"nestrov": True}}},
            ["config.train.optimizer.nestrov", "config.train.optimizer.nesterov?"],
        ),
        (
            {"train": {"optimizer": {"momentum": (1,)}}},
            ["train.optimizer.momentum=(1,)", "number"],
        ),
        ({"train": {"schedule": "multistep"}}, ["train.decay_at_epochs=()"]),
        ({"train": {"decay_at_epochs": (3,)}}, ["decay_at_epochs=(3,)", "multistep"]),
        (
            {"train": {"schedule": "multistep", "decay_at_epochs": (-1,)}},
            ["decay_at_epochs=(-1,)"],
        ),
        (
            {"train": {"final_learning_rate": 0.5}},
            ["final_learning_rate=0.5", "0 to learning_rate=0.01"],
        ),
        ({"train": {"decay_end_epoch": -1}}, ["decay_end_epoch=-1"]),
        ({"train": {"label_smoothing": 1.0}}, ["train.label_smoothing=1.0"]),
        ({"prune": {"label_smoothing": -0.1}}, ["prune.label_smoothing=-0.1"]),
        (
            {"prune": {"one_shot": True, "repeated_one_shot": True}},
            ["repeated_one_shot=True", "one_shot=True"],
        ),
        ({"prune": {"from_dense": True}}, ["from_dense=True", "repeated_one_shot"]),
        ({"prune": {"at_launch": True}}, ["at_launch=True", "initial_sparsity"]),
        (
            {"prune": {"loss_path_steps": 4, "loss_samples": 0}},
            ["loss_path_steps=4", "loss_samples=0"],
        ),
        ({"prune": {"batch_norm_samples": -1}}, ["batch_norm_samples=-1"]),
        ({"prune": {"pattern": "rows"}}, ["prune.pattern", "'rows'", "heads:H"]),
        ({"prune": {"pattern": "2:4"}}, ["prune.pattern", "sparsity=0.9", "has 0.5"]),
        (
            {"prune": {"pattern": "2:4", "target_sparsity": 0.4}},
            ["prune.pattern", "target_sparsity=0.4", "expected 0.5"],
        ),
        (
            {"prune": {"pattern": "heads:2", "scope": "layer"}},
            ["prune.pattern", "scope='layer'"],
        ),
        ({"prune_3": {}}, ["config.prune_3", "config.prune_2"]),
        ({"prune_2": {"end": 5}}, ["config.prune_2.end=5"]),
        ({"prune_2": {"dampng": 5.0}}, ["prune_2.dampng", "prune_2.damping?"]),
        ({"prune_2": {"damping": -5.0}}, ["prune_2.damping=-5.0"]),
        ({"prune_2": {"one_shot": True}}, ["prune.one_shot=False", "the same"]),
        ({"also_prune": ()}, ["config.also_prune does not exist"]),
        ({"train": {"schedule": "stepp"}}, ["train.schedule='stepp'", "cosine"]),
        (
            {"train": {"accumulation_steps": 3}},
            ["train.accumulation_steps=3", "divisor of batch_size=64"],
        ),
        ({"train": {"accumulation_steps": 0}}, ["train.accumulation_steps=0"]),
        ({"train": {"dtype": "float16"}}, ["train.dtype='float16'", "bfloat16"]),
        ({"dense": {"average_decay": 1.0}}, ["dense.average_decay=1.0", "[0, 1)"]),
        ({"train": {"warmup_epochs": -1}}, ["train.warmup_epochs=-1"]),
        (
            {"distributed": {"coordinator": "host"}},
            ["distributed.coordinator='host'", "host:port"],
        ),
        (
            {"distributed": {"coordinator": "host:1", "process_id": 0}},
            ["distributed.num_processes=None", "how many"],
        ),
        (
            {"distributed": {"coordinator": "host:1", "num_processes": 2}},
            ["distributed.process_id=None", "which process"],
        ),
        (
            {
                "distributed": {
                    "coordinator": "host:1",
                    "num_processes": 2,
                    "process_id": 2,
                }
            },
            ["distributed.process_id=2", "0 to 1"],
        ),
        ({"distributed": {"num_processes": 2}}, ["num_processes=2", "coordinator"]),
        (
            {"distributed": {"heartbeat_timeout_seconds": 0}},
            ["heartbeat_timeout_seconds=0", "1 or more"],
        ),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(given: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(given)
    for word in words:
        assert word in str(caught.value)


def test_a_further_pruner_states_what_differs_from_the_first() -> None:
    first = {"num_samples": 7, "block_size": 50, "target_sparsity": 0.8}
    second = {"prunable": "fc", "damping": 0.1, "block_size": None}
    config = from_dict({"prune": first, "prune_2": second})
    expected = PruneConfig(
        num_samples=7,
        block_size=50,
        target_sparsity=0.8,
        prunable="fc",
        damping=0.1,
    )
    assert config.pruners == {"prune": PruneConfig(**first), "prune_2": expected}
    assert from_dict(to_dict(config)) == config


def test_repeated_one_shot_takes_all_steps_at_the_start() -> None:
    prune = PruneConfig(
        repeated_one_shot=True,
        initial_sparsity=0.5,
        target_sparsity=0.9,
        start=1,
        end=5,
        degree=1.0,
    )
    assert [stage.time for stage in prune.stages] == [1] * 5
    levels = [stage.sparsity for stage in prune.stages]
    assert levels == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


def test_one_shot_after_some_epochs() -> None:
    assert PruneConfig(start=3, end=3, target_sparsity=0.7).stages == ((3, 0.7),)


def test_a_step_at_launch_comes_before_the_schedule() -> None:
    prune = PruneConfig(
        at_launch=True, initial_sparsity=0.2, target_sparsity=0.7, start=2, end=4
    )
    assert [stage.time for stage in prune.stages] == [0, 3, 4]
    assert prune.stages[0].sparsity == 0.2


def test_one_shot_is_one_step_to_the_target() -> None:
    prune = PruneConfig(one_shot=True, target_sparsity=0.7, start=1, end=9)
    assert prune.stages == ((0, 0.7),)


def test_every_field_is_documented() -> None:
    for section in (
        Config,
        PruneConfig,
        config_.TrainConfig,
        config_.DataConfig,
        config_.ModelConfig,
        config_.OptimizerConfig,
    ):
        for field in dataclasses.fields(section):
            assert f"{field.name}: " in (section.__doc__ or ""), field.name
