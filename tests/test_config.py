"""A config is checked once, and an error names the field and what to write there."""

import dataclasses
import math

import pytest

from woodfisher_jax import config as config_
from woodfisher_jax.config import Config, ConfigError, PruneConfig, from_dict, to_dict


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
        ({"dense": {"momentum": 1.0}}, ["dense.momentum=1.0"]),
        ({"train": {"schedule": "stepp"}}, ["train.schedule='stepp'", "cosine"]),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(given: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(given)
    for word in words:
        assert word in str(caught.value)


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
    ):
        for field in dataclasses.fields(section):
            assert f"{field.name}: " in (section.__doc__ or ""), field.name
