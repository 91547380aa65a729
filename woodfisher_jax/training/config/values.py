"""A config from a file's values, checked once at the start.

The sections and their defaults are in :mod:`woodfisher_jax.training.sections`.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.training.config_checks import (
    ConfigError,
    check,
    check_key,
    compared,
)
from woodfisher_jax.training.sections import (
    Config,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)

__all__ = [
    "OPEN_GROUPS",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruneConfig",
    "TrainConfig",
    "check_key",
    "compared",
    "field_types",
    "from_dict",
    "is_pruner",
    "to_dict",
    "value_type",
]

OPEN_GROUPS = ("config.model", "config.dense.optimizer", "config.train.optimizer")
"""Groups of a name and whatever settings what is named takes."""


def is_pruner(key: str) -> bool:
    """Whether a key of a config file names a further pruner, as ``prune_2`` does."""
    return re.fullmatch(r"prune_\d+", key) is not None


def field_types(section: type) -> dict[str, Any]:
    """The type of each field of a config dataclass."""
    return typing.get_type_hints(section)


def value_type(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed."""
    if isinstance(annotation, types.UnionType):
        plain = [part for part in typing.get_args(annotation) if part is not type(None)]
        return plain[0], True
    return typing.get_origin(annotation) or annotation, False


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values, as it is written to files."""
    values = _plain_dict(dataclasses.asdict(config))
    del values["also_prune"]
    for name, pruner in config.pruners.items():
        values[name] = _plain_dict(dataclasses.asdict(pruner))
    return values


def _plain_dict(section: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of a section, with the settings of a name beside it."""
    if section.keys() == {"name", "settings"}:
        return {"name": section["name"], **section["settings"]}
    return {
        key: _plain_dict(value)
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in section.items()
    }


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a config from nested dicts; what is absent has its default.

    Args:
        values: As a config file gives them.

    Raises:
        ConfigError: If a key is unknown (with the nearest known one), a value has the
            wrong type or is out of range, or values contradict one another.
    """
    config = _with_pruners(values)
    check(config)
    return config


def _with_pruners(values: Mapping[str, Any]) -> Config:
    """The config, further pruners with the values of the first where they have none."""
    further = sorted((k for k in values if is_pruner(k)), key=lambda k: int(k[6:]))
    for number, key in enumerate(further, start=2):
        if key != f"prune_{number}":
            raise ConfigError(
                f"config.{key} without config.prune_{number}; expected the sections "
                "prune, prune_2, prune_3 and so on without a gap"
            )
    config = _section(
        Config, {k: v for k, v in values.items() if k not in further}, "config"
    )
    others = [
        _section(PruneConfig, values[key], f"config.{key}", config.prune)
        for key in further
    ]
    return dataclasses.replace(config, also_prune=tuple(others))


def _section(
    section: type, values: Mapping[str, Any], where: str, defaults: Any = None
) -> Any:
    """A section from its values; what is absent is as in ``defaults``."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={values!r}; expected a group of fields")
    if where in OPEN_GROUPS:
        rest = {key: _plain(value) for key, value in values.items() if key != "name"}
        name = _value(str, values.get("name", section().name), f"{where}.name")
        return section(name, rest)
    hints = field_types(section)
    known = [key for key in hints if key != "also_prune"]
    fields = {}
    for key, value in values.items():
        check_key(key, known, where)
        annotation = hints[key]
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            fields[key] = _section(annotation, value, f"{where}.{key}")
        elif value is not None or defaults is None:
            fields[key] = _value(annotation, value, f"{where}.{key}")
    return dataclasses.replace(defaults or section(), **fields)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _value(annotation: Any, value: Any, where: str) -> Any:
    expected, optional = value_type(annotation)
    if optional and (value is None or value == "None"):
        return None  # A flag makes a string of it.
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if type(value) is not expected:
        what = f"{expected.__name__}{' or None' if optional else ''}"
        raise ConfigError(
            f"{where}={value!r} is of type {type(value).__name__}; expected {what}"
        )
    return value
