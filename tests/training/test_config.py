"""A config is checked once, and an error names the field and what to write there."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from woodfisher_jax import main
from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.curvature.method import Sampled
from woodfisher_jax.data import ImageOptions
from woodfisher_jax.methods import METHODS, applicable, resolve
from woodfisher_jax.options import Field, OptionError, option
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.training.config import (
    Config,
    ConfigError,
    PruneConfig,
    build,
    compared,
    from_dict,
    step_options,
    to_dict,
)
from woodfisher_jax.training.config.step_options import step_fields
from woodfisher_jax.training.config.values import section_fields, subsections


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
    assert config.prune.options == {"block_size": 50, "scope": "layer"}
    assert to_dict(config)["prune"]["damping"] == 1e-5
    assert from_dict(to_dict(config)) == config


def test_an_integer_is_a_float_where_one_is_expected() -> None:
    damping = from_dict({"prune": {"damping": 1}}).prune.value_of("damping")
    assert type(damping) is float


def test_how_images_are_read_is_part_of_data() -> None:
    given = {"name": "imagenet", "image_size": 64, "resize": 72, "workers": 3}
    data = from_dict({"data": given}).data
    assert isinstance(data, ImageOptions)
    assert (data.image_size, data.resize, data.workers) == (64, 72, 3)
    values = {"image_size": 300, "resize": 256}
    refused({"data": values}, ["config.data.resize=256", "image_size=300"])


# --------------------------------------------------------------------- single fields


def fields(section: type = Config, where: str = "") -> Iterator[tuple[str, Field]]:
    """Every field of a config, with its whole name."""
    for name, field in section_fields(section, {}).items():
        yield f"{where}{name}", field
    for name, inner in subsections(section).items():
        yield from fields(inner, f"{where}{name}.")


FIELDS = dict(fields())


def wrong(field: Field) -> list[Any]:
    """Values of another type, or beside the range of a field."""
    found: list[Any] = ["nothing"] if field.plain is not str or field.words else []
    if {int, float} & set(field.kinds):
        limits = field.range
        found += [math.nan, math.inf, -math.inf]
        found += [limit for limit in (limits.above, limits.below) if limit is not None]
        if limits.least is not None:
            below = limits.least - 1 if limits.least < 1e-6 else limits.least / 2
            found.append(int(below) if int in field.kinds else below)
        if limits.most is not None:
            found.append(2 * limits.most)
    return found


WRONG = [
    pytest.param(name, value, id=f"{name}={value}")
    for name, field in FIELDS.items()
    for value in wrong(field)
]


def nested(name: str, value: Any) -> dict[str, Any]:
    """The plain values of a config with one field."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_once_and_the_same_way_everywhere(
    name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.{name}=.*; expected "):
        from_dict(nested(name, value))
    with pytest.raises(SystemExit) as ended:
        main.main(["main", "--config=digits", f"--config.{name}={value}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: config.{name}")
    option_name = name.removeprefix("prune.")
    for method, row in METHODS.items():
        if option_name in step_fields(method) and hasattr(row, option_name):
            with pytest.raises(OptionError, match=f"^{option_name}="):
                resolve(method, Compute(), {option_name: value, "sparsity": 0.5})


def test_every_kind_of_field_is_among_them() -> None:
    names = {param.values[0] for param in WRONG}
    assert {"seed", "train.dtype", "prune.damping", "prune.recompute"} <= names
    assert {"prune.one_shot", "prune.solver", "train.decay_at_epochs"} <= names


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
        ({"seed": True}, ["config.seed=True", "a whole number"]),
        ({"seed": 1.5}, ["config.seed=1.5", "a whole number"]),
        ({"init_from": 3}, ["config.init_from=3", "a string or None"]),
        ({"prune": {"damping": None}}, ["config.prune.damping=None", "a number"]),
        ({"prune": {"weight_decay": 1.0}}, ["config.prune.weight_decay does not"]),
        ({"prune": {"options": {}}}, ["config.prune.options does not exist"]),
        ({"prune_2": {"dampng": 5.0}}, ["prune_2.dampng", "prune_2.damping?"]),
        ({"prune_2": {"damping": -5.0}}, ["config.prune_2.damping=-5.0"]),
        ({"prune_3": {}}, ["config.prune_3", "config.prune_2"]),
        ({"also_prune": ()}, ["config.also_prune does not exist"]),
        (
            {"prune": {"method": "woodfischer"}},
            ["method='woodfischer'", "woodfisherblock", "globalmagni"],
        ),
        ({"prune": {"method": ["kfac"]}}, ["config.prune.method=['kfac']"]),
        ({"prune": {"pattern": "rows"}}, ["prune.pattern", "'rows'", "heads:H"]),
        ({"train": {"schedule": "cosin"}}, ["did you mean 'cosine'?"]),
        ({"train": {"decay_at_epochs": 3}}, ["decay_at_epochs=3", "(30, 60)"]),
        ({"train": {"optimizer": {"name": "sdg"}}}, ["optimizer.name='sdg'", "'sgd'?"]),
        (
            {"train": {"optimizer": {"nestrov": True}}},
            ["config.train.optimizer.nestrov", "did you mean 'nesterov'?"],
        ),
        (
            {"train": {"optimizer": {"momentum": (1,)}}},
            ["train.optimizer.momentum=(1,)", "number"],
        ),
        (
            {"dense": {"optimizer": {"momentum": 1.0}}},
            ["dense.optimizer.momentum=1.0", "[0, 1)"],
        ),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(given: dict, words: list[str]) -> None:
    refused(given, words)


def refused(given: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(given)
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------ fields together


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"prune": {"initial_sparsity": 0.95}},
            ["target_sparsity=0.9", "at least initial_sparsity=0.95"],
        ),
        ({"compare_with": ["x"]}, ["config.compare_with", "method='x'", "globalmagni"]),
        ({"prune": {"method": "magni", "scope": "global"}}, ["scope='global'"]),
        ({"prune": {"end": 5}}, ["prune.end=5", "train.epochs=0"]),
        ({"prune": {"start": 3, "end": 1}}, ["end=1", "start=3"]),
        ({"train": {"schedule": "multistep"}}, ["train.decay_at_epochs=()"]),
        ({"train": {"decay_at_epochs": (3,)}}, ["decay_at_epochs=(3,)", "multistep"]),
        (
            {"train": {"final_learning_rate": 0.5}},
            ["final_learning_rate=0.5", "0 to learning_rate=0.01"],
        ),
        (
            {"train": {"accumulation_steps": 3}},
            ["train.accumulation_steps=3", "divisor of batch_size=64"],
        ),
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
        ({"prune": {"pattern": "2:4"}}, ["prune.pattern", "sparsity=0.9", "has 0.5"]),
        (
            {"prune": {"pattern": "2:4", "target_sparsity": 0.4}},
            ["prune.target_sparsity=0.4", "expected 0.5", "pattern='2:4'"],
        ),
        (
            {"prune": {"pattern": "heads:2", "scope": "layer"}},
            ["prune.pattern", "scope='layer'"],
        ),
        ({"prune_2": {"end": 5}}, ["config.prune_2.end=5"]),
        ({"prune_2": {"one_shot": True}}, ["prune.one_shot=False", "the same"]),
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
        # ----------------------------------------------- options and their method
        (
            {"prune": {"method": "kfac", "block_size": 7}},
            ["config.prune.block_size", "method='kfac'", "'woodfisher'"],
        ),
        (
            {"prune": {"method": "diagfisher", "damping": 1.0}},
            ["config.prune.damping", "'kfac'"],
        ),
        (
            {"prune": {"auto_damping": True, "method": "kfac"}},
            ["config.prune.auto_damping", "a number"],
        ),
        (
            {"prune": {"auto_damping": True, "damping_plus_weight_decay": True}}
            | {"train": {"weight_decay": 0.1}},
            ["config.prune.auto_damping", "weight_decay=0.1"],
        ),
        (
            {"prune": {"method": "diagfisher", "damping_search_samples": 9}},
            ["damping_search_samples=9", "no damping"],
        ),
        ({"prune": {"match": "labels"}}, ["config.prune.match", "first order"]),
        ({"prune": {"mean_samples": 9}}, ["config.prune.mean_samples", "first order"]),
        ({"prune": {"swaps": 9}}, ["config.prune.swaps=9", "update='joint'"]),
        (
            {"prune": {"swaps": 9, "update": "joint", "scope": "layer"}},
            ["config.prune.swaps=9", "scope='layer'"],
        ),
        (
            {"prune": {"method": "naivehess", "num_probes": 9}},
            ["config.prune.num_probes=9", "hutchinson"],
        ),
        (
            {"prune": {"method": "naivehess", "flops_power": 1.0}},
            ["config.prune.flops_power=1.0", "naivehess"],
        ),
        (
            {"prune": {"method": "magni", "flops_target": 1.0}},
            ["config.prune.flops_target=1.0", "threshold"],
        ),
        ({"prune": {"recompute_degree": 2.0}}, ["prune.recompute_degree=2.0", "poly"]),
        (
            {"prune": {"flops_power": 1.0}, "compare_with": ("naivehess",)},
            ["config.compare_with", "flops_power=1.0"],
        ),
    ],
    ids=str,
)
def test_what_contradicts_is_refused_by_name(given: dict, words: list[str]) -> None:
    refused(given, words)


# -------------------------------------------------------------------------- pruners


def test_a_further_pruner_states_what_differs_from_the_first() -> None:
    first = {"num_samples": 7, "block_size": 50, "target_sparsity": 0.8}
    second = {"prunable": "fc", "damping": 0.1}
    third = {"block_size": None}
    config = from_dict({"prune": first, "prune_2": second, "prune_3": third})
    base = PruneConfig(num_samples=7, options={"block_size": 50}, target_sparsity=0.8)
    options = {"block_size": 50, "damping": 0.1}
    assert config.pruners == {
        "prune": base,
        "prune_2": dataclasses.replace(base, prunable="fc", options=options),
        "prune_3": dataclasses.replace(base, options={}),
    }
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


# ------------------------------------------------------------- options of the method


def other_value(field: Field) -> Any:
    """A value within the range of a field that is not its default."""
    candidates = [*field.words, "4x1", not field.default, 0.5, 2]
    for value in candidates:
        try:
            found = PruneConfig(options={field.name: value})
        except OptionError:
            continue
        if found.options:
            return value
    raise AssertionError(field)


GOES_WITH = {
    "num_probes": {"hessian": "hutchinson"},
    "swaps": {"update": "joint"},
    "recompute_degree": {"recompute_schedule": "poly"},
}
"""What an option has no meaning without."""

REFUSED = {
    ("magni", "scope"),
    ("magni", "flops_power"),
    ("magni", "flops_target"),
    ("naivehess", "flops_power"),
}
"""Options of the goal that a method does not go with."""


@pytest.mark.parametrize("method", METHODS)
def test_an_option_reaches_the_step_or_is_refused(method: str) -> None:
    for name, field in step_fields(method).items():
        value = other_value(field)
        given = {"method": method, name: value, **GOES_WITH.get(name, {})}
        has = name in applicable(method, given)
        if (method, name) in REFUSED or (METHODS[method].needs_samples and not has):
            with pytest.raises(ConfigError, match=rf"config\.prune\..*{name}"):
                from_dict({"prune": given})
            continue
        config = from_dict({"prune": given})
        parts = step_options(config, config.prune)
        found = [getattr(part, name) for part in parts if hasattr(part, name)]
        if name == "pattern":
            found = [pattern.name for pattern in found]
        # Methods by magnitude are compared with others under their options.
        assert found == ([value] if has else [field.default][: len(found)])


def test_the_run_sets_what_the_config_says_in_other_words() -> None:
    config = from_dict(
        {
            "seed": 5,
            "train": {"weight_decay": 0.1},
            "prune": {
                "method": "naivehess",
                "hessian": "hutchinson",
                "memory_limit_gb": 2.0,
                "num_samples": 7,
                "target_sparsity": 0.6,
            },
            "prune_2": {
                "method": "kfac",
                "hessian": "exact",
                "damping_plus_weight_decay": True,
            },
        }
    )
    method, goal, compute = step_options(config, config.prune)
    assert (method.probe_seed, method.num_samples) == (5, 7)
    assert compute.memory_limit == 2e9
    assert goal.sparsity == 0.6
    kfac, *_ = step_options(config, config.also_prune[0])
    assert kfac.weight_decay == 0.1


def test_automatic_damping_has_two_names() -> None:
    one, other = (
        from_dict({"prune": given})
        for given in ({"damping": "auto"}, {"auto_damping": True})
    )
    assert one == other
    assert step_options(one, one.prune).method.damping == "auto"
    with_number = from_dict({"prune": {"damping": "auto"}, "prune_2": {"damping": 0.1}})
    assert step_options(with_number, with_number.also_prune[0]).method.damping == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_comparison_leaves_out_what_the_method_does_not_have(method: str) -> None:
    first = {
        "method": "woodtaylor",
        "scope": "layer",
        "damping": 0.5,
        "block_size": 9,
        "batch_size": 2,
        "centered": True,
        "mean_samples": 9,
        "damping_search_samples": 9,
        "damping_plus_weight_decay": True,
    }
    config = from_dict({"prune": first, "compare_with": (method,)})
    pruner = compared(config, method).prune
    found = step_options(config, pruner)
    assert type(found.method) is type(METHODS[method])
    assert getattr(found.method, "damping", 0.5) == 0.5
    assert getattr(found.method, "block_size", 9) == 9
    assert found.goal.scope == METHODS[method].scopes[0]
    # The loss is measured on as many examples, whatever the method.
    assert pruner.num_examples == config.prune.num_examples == 200
    matched = from_dict(
        {
            "prune": {"method": "woodtaylor", "update": "joint", "match": "labels"}
            | {"auto_damping": True}
        }
    )
    from_dict(to_dict(compared(matched, method)))


@dataclasses.dataclass(frozen=True)
class Own(Sampled):
    """A method with an option of its own, and a default of its own."""

    power: float = option(1.0, "Of the gradient.", above=0)


@pytest.fixture
def own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "own", Own(power=3.0))


def test_a_method_from_outside_has_its_fields_in_the_config(own_method: None) -> None:
    config = from_dict({"prune": {"method": "own"}})
    assert to_dict(config)["prune"]["power"] == 3.0
    assert step_options(config, config.prune).method == Own(power=3.0, num_samples=100)
    given = {"method": "own", "power": 1.0}  # The default of its class.
    config = from_dict({"prune": given})
    assert step_options(config, config.prune).method.power == 1.0
    assert from_dict(to_dict(config)) == config
    refused({"prune": {"method": "own", "power": 0.0}}, ["config.prune.power=0.0"])
    refused({"prune": {"power": 2.0}}, ["config.prune.power", "['own']"])
    assert compared(config, "woodfisher").prune.options == {}


def test_a_saved_run_of_such_a_method_can_be_read_without_it(own_method: None) -> None:
    config = from_dict({"prune": {"method": "own", "power": 2.0}})
    saved = to_dict(config)
    del METHODS["own"]
    assert to_dict(build(saved)) == saved
    with pytest.raises(ConfigError, match=r"config.prune.method='own' does not"):
        from_dict(saved)


def test_numpy_values_become_pythons_own() -> None:
    config = from_dict({"seed": np.int64(3), "prune": {"damping": np.float32(0.5)}})
    assert type(config.seed) is int
    assert type(config.prune.value_of("damping")) is float
    assert isinstance(step_options(config, config.prune).method, WoodFisher)
