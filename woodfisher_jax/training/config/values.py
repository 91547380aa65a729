"""A config from nested dicts of plain values, as files have them, and back."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import (
    LONGEST_SHOWN,
    Field,
    OptionError,
    fields_of,
    shown,
)
from woodfisher_jax.training.config.language import TASK, LanguageConfig
from woodfisher_jax.training.config.sections import (
    Config,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
)
from woodfisher_jax.training.config.step_options import step_fields

NAMED = (ModelConfig, OptimizerConfig)
"""Sections of a name and any settings that the thing of that name takes."""


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field."""


def root_of(values: Mapping[str, Any]) -> type[Config] | type[LanguageConfig]:
    """The kind of config that a file states."""
    return LanguageConfig if values.get("task") == TASK else Config


def is_pruner(key: str) -> bool:
    """Whether a key of a config file names a further pruner, as ``prune_2`` does."""
    return re.fullmatch(r"prune_\d+", key) is not None


def subsections(section: type) -> dict[str, type]:
    """The sections within a section, by name."""
    hints = typing.get_type_hints(section).items()
    return {
        name: hint
        for name, hint in hints
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def section_fields(section: type, values: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of a section of plain values, by name.

    Args:
        section: Its dataclass.
        values: What is stated in it; options of a pruning step follow its method.
    """
    fields = dict(fields_of(section))
    if section is PruneConfig:
        method = str(values.get("method", fields["method"].default))
        fields = step_fields(method) | fields
    return fields


def check_key(key: str, known: Iterable[str], where: str) -> None:
    """Raises with the nearest known key unless the key is known.

    Raises:
        ConfigError: If it is not.
    """
    known = list(known)
    if key in known:
        return
    key = key if len(key) <= LONGEST_SHOWN else f"{key[:LONGEST_SHOWN]}..."
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {where}.{close[0]}?" if close else f"; there are {known}"
    raise ConfigError(f"{where}.{key} does not exist{hint}")


def in_config(
    error: OptionError, where: str, names: Mapping[str, str] | None = None
) -> ConfigError:
    """An error of an option under the name of its field.

    Args:
        error: Of an option.
        where: The section, such as ``config.prune``.
        names: From options to the fields that set them, where they differ.
    """
    name = (names or {}).get(error.name, error.name)
    message = str(error)
    if message.startswith(f"{name}="):
        return ConfigError(f"{where}.{message}")
    return ConfigError(f"{where}.{name}: {message}")


# ------------------------------------------------------------------ from plain values


def build(values: Mapping[str, Any]) -> Config:
    """Builds a config of which every field is checked by itself.

    A saved run may be of a method that is not in METHODS; its options are then taken as
    they are.

    Args:
        values: Nested dicts as a config file gives them; what is absent has its
            default, or in ``prune_2`` and the like the value of ``prune``.

    Raises:
        ConfigError: If a key is unknown (with the nearest known one), or a value has
            the wrong type or is out of range.
    """
    _check_keys(values, "config")
    further = sorted((k for k in values if is_pruner(k)), key=lambda k: int(k[6:]))
    for number, key in enumerate(further, start=2):
        if key != f"prune_{number}":
            raise ConfigError(
                f"config.{key} without config.prune_{number}; expected the sections "
                "prune, prune_2, prune_3 and so on without a gap"
            )
    rest = {key: value for key, value in values.items() if key not in further}
    config = _section(Config(), rest, "config")
    others = [_section(config.prune, values[key], f"config.{key}") for key in further]
    return dataclasses.replace(config, also_prune=tuple(others))


def build_language(values: Mapping[str, Any]) -> LanguageConfig:
    """As `build`, of a language model."""
    found: LanguageConfig = _section(LanguageConfig(), values, "config")
    return found


def _check_keys(values: Mapping[Any, Any], where: str) -> None:
    """Raises unless all keys are names."""
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {shown(key)}; expected names")


def _section(defaults: Any, values: Mapping[str, Any], where: str) -> Any:
    """A section from its values; what is absent is as in ``defaults``."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={shown(values)}; expected a group of fields")
    _check_keys(values, where)
    section = type(defaults)
    inner, known = subsections(section), section_fields(section, values)
    changes: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for key, value in values.items():
        if key in inner:
            changes[key] = _section(getattr(defaults, key), value, f"{where}.{key}")
        elif key in fields_of(section):
            changes[key] = value
        else:
            left[key] = tuple(value) if isinstance(value, list) else value
    if section in NAMED:
        changes["settings"] = left
    elif section is PruneConfig:
        changes["options"] = {**defaults.options, **left}
        if "damping" in left:
            changes.setdefault("auto_damping", False)
    method = str(changes.get("method", getattr(defaults, "method", "")))
    is_open = section in NAMED or (section is PruneConfig and method not in METHODS)
    for key in () if is_open else left:
        check_key(key, [*known, *inner], where)
    try:
        return dataclasses.replace(defaults, **changes)
    except OptionError as error:
        raise in_config(error, where) from error


# -------------------------------------------------------------------- to plain values


def to_dict(config: Config | LanguageConfig) -> dict[str, Any]:
    """The config as nested dicts of plain values, as it is written to files."""
    values = _plain(config)
    if isinstance(config, LanguageConfig):
        return values
    return values | {name: _plain(one) for name, one in config.pruners.items()}


def _plain(section: Any) -> dict[str, Any]:
    kind = type(section)
    values = {name: getattr(section, name) for name in fields_of(kind)}
    if kind in NAMED:
        values |= section.settings
    elif kind is PruneConfig:
        steps = {name: section.value_of(name) for name in step_fields(section.method)}
        values = steps | section.options | values
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return values | {name: _plain(getattr(section, name)) for name in subsections(kind)}
