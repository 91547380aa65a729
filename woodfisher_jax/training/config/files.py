"""Config files: found by name or path, read over the defaults, overridden.

An *override* is an argument of a command line, ``--config.prune.damping=1e-4``.
"""

import ast
import dataclasses
import difflib
import functools
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config, ConfigError

_PACKAGE = Path(__file__).parents[1]

# Within the package where that is installed, beside it in a checkout.
SHIPPED = _PACKAGE / "configs"
if not SHIPPED.is_dir():
    SHIPPED = _PACKAGE.parent / "configs"
"""The folder of the configs that come with the package."""

_EXPECTED = {
    bool: "True or False",
    int: "a whole number, such as 100",
    float: "a number, such as 1e-5",
    tuple: 'values in brackets, such as "(40, 20)"',
}
"""What a value of a type looks like on the command line."""


# ------------------------------------------------------------------------------ files


def shipped() -> dict[str, str]:
    """The configs that come with the package, and what each is, in one line."""
    summaries = {}
    for path in sorted(SHIPPED.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summaries[path.stem] = docstring.partition("\n")[0]
    return summaries


def find(config: str) -> Path:
    """The file that ``--config`` names.

    Args:
        config: The name of a shipped config (``digits``) or the path of a file
            (``configs/digits.py``), either with a word for it (``resnet50:smoke``).

    Raises:
        ConfigError: If there is none; with the nearest name that there is.
    """
    given = config.partition(":")[0]
    is_path = given.endswith(".py") or Path(given).name != given
    path = Path(given) if is_path else SHIPPED / f"{given}.py"
    if path.is_file():
        return path
    names = [p.stem for p in sorted(SHIPPED.glob("*.py"))]
    close = difflib.get_close_matches(Path(given).stem, names, n=1)
    hint = f"; did you mean --config={close[0]}?" if close else ""
    what = f"there is no file {path} (from {Path.cwd()})"
    if not is_path:
        what = "no config of that name; a file of your own is named by its path, my.py"
    raise ConfigError(
        f"--config={config}: {what}. The package has {', '.join(names)}{hint}"
    )


def load_config(config: str) -> ml_collections.ConfigDict:
    """Reads a config file over the defaults.

    Args:
        config: As for `find`, of a Python file with ``get_config()``; with a word after
            a colon ``get_config("word")`` is called.

    Returns:
        A locked ConfigDict with every field.

    Raises:
        ConfigError: If there is no such file, it cannot be executed, or it names fields
            that do not exist.
    """
    path, word = find(config), config.partition(":")[2]
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except Exception as error:
        raise _in_file(path, error) from error
    if get_config is None:
        raise ConfigError(f"--config={config}: the file must define get_config()")
    try:
        values = get_config(word) if word else get_config()
    except ValueError as error:
        raise ConfigError(f"--config={config}: {error}") from error
    except Exception as error:
        raise _in_file(path, error) from error
    merged = defaults()
    for key in filter(config_.is_pruner, values):
        merged[key] = _further_pruner()
    _merge(merged, values, "config")
    return merged.lock()


def _in_file(path: Path, error: Exception) -> ConfigError:
    """What went wrong in a config file, and in which line."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    where = f", line {lines[-1]}" if lines else ""
    return ConfigError(f"{path}{where}: {type(error).__name__}: {error}")


def defaults(section: type = Config) -> ml_collections.ConfigDict:
    """The dataclass defaults as a ConfigDict; an absent value knows its type."""
    values = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        annotation = config_.field_types(section)[field.name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            values[field.name] = defaults(annotation)
        elif field.name in ("settings", "also_prune"):
            continue  # Keys of their own, where a config file has them.
        else:
            expected, _ = config_.value_type(annotation)
            default = field.default
            values[field.name] = (
                config_dict.placeholder(expected) if default is None else default
            )
    return values


def _further_pruner() -> ml_collections.ConfigDict:
    """The fields of ``prune_2`` and the like; what stays None is as in ``prune``."""
    values = ml_collections.ConfigDict()
    for name, annotation in config_.field_types(config_.PruneConfig).items():
        values[name] = config_dict.placeholder(config_.value_type(annotation)[0])
    return values


def _merge(target: ml_collections.ConfigDict, values: Any, where: str) -> None:
    for key, value in values.items():
        if where not in config_.OPEN_GROUPS:
            config_.check_key(key, target, where)
        if isinstance(target.get(key), ml_collections.ConfigDict):
            _merge(target[key], value, f"{where}.{key}")
        elif key not in target:
            target[key] = value
        else:
            try:
                target[key] = value
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{where}.{key}={value!r}: {error}") from error


# -------------------------------------------------------------------------- overrides


class Override(NamedTuple):
    """A field of the config given on the command line.

    Attributes:
        group: Where the field is, ``config.prune``.
        field: Its name.
        text: Its value as given; None if none was.
    """

    group: str
    field: str
    text: str | None


def override_of(argument: str) -> Override | None:
    """The override that an argument is, or None if it is none."""
    name, given, text = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or not name.startswith("config."):
        return None
    group, _, field = name.rpartition(".")
    return Override(group, field, text if given else None)


def override(arguments: Sequence[str], values: ml_collections.ConfigDict) -> list[str]:
    """Checks the names of overrides, and makes those that flags cannot.

    Flags are made of what ``values`` hold, by type: they neither add a setting to a
    model or an optimizer, nor take a number away, nor know a field by the name of a
    method.

    Args:
        arguments: Of the command line; what is no override passes.
        values: A config of `load_config`, which is changed.

    Returns:
        The arguments that are left.

    Raises:
        ConfigError: For a field that does not exist, with the nearest one, or a group,
            or where a value is missing.
    """
    left = []
    for argument in arguments:
        change = override_of(argument)
        if change is None:
            left.append(argument)
            continue
        group = _group(change, values)
        if change.group in config_.OPEN_GROUPS and change.field not in group:
            if change.text is not None:
                _set(group, change.field, _literal(change.text))
            continue
        config_.check_key(change.field, group, change.group)
        found = group[change.field]
        if isinstance(found, ml_collections.ConfigDict):
            name = f"{change.group}.{change.field}"
            raise ConfigError(
                f"{name} is a group of fields; expected --{name}.FIELD=VALUE "
                "(--helpfull lists them)"
            )
        if change.text == "None":
            _set(group, change.field, None)
        elif hasattr(ml_collections.ConfigDict, change.field):
            # A flag would read the method of that name, such as `update`.
            _set(group, change.field, _given(change))
        else:
            left.append(argument)
    return left


def _group(change: Override, values: ml_collections.ConfigDict) -> Any:
    """The group of fields that an override is in."""
    level, where = values, "config"
    for key in change.group.split(".")[1:]:
        config_.check_key(key, level, where)
        level, where = level[key], f"{where}.{key}"
        if not isinstance(level, ml_collections.ConfigDict):
            raise ConfigError(
                f"{where} is no group of fields, so there is no {where}.{change.field}"
            )
    return level


def _set(group: ml_collections.ConfigDict, field: str, value: Any) -> None:
    with group.unlocked(), group.ignore_type():
        group[field] = value


def _given(change: Override) -> str:
    if change.text is None:
        name = f"{change.group}.{change.field}"
        raise ConfigError(f"--{name} has no value; expected --{name}=VALUE")
    return change.text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def unreadable(message: str, values: ml_collections.ConfigDict) -> str:
    """The message of a flag with a value that cannot be read, in the user's terms.

    Args:
        message: What absl says, which begins with ``flag --name=text:``.
        values: The config.

    Returns:
        What was expected, or the message as it is where it says something else.
    """
    found = re.match(r"flag --([^=]+)=(.*?): ", message)
    if not found:
        return message
    change = override_of(f"--{found[1]}={found[2]}")
    kind: Any = bool if "Non-boolean" in message else None
    if change is not None:
        kind = _group(change, values).get_type(change.field)
    if kind not in _EXPECTED:
        return message
    return f"{found[1]}={found[2]!r}; expected {_EXPECTED[kind]}"


# ------------------------------------------------------------------------------- help


def explained(values: ml_collections.ConfigDict) -> str:
    """Every field of a config with its value and what it is, from the docstrings."""
    lines: list[str] = []
    _explain(Config, values, "config", lines)
    return "\n".join(lines)


def _explain(
    section: type, values: ml_collections.ConfigDict, where: str, lines: list[str]
) -> None:
    hints = config_.field_types(section)
    words = _attributes(section.__doc__ or "")
    groups = [k for k, v in values.items() if isinstance(v, ml_collections.ConfigDict)]
    lines.append(f"\n{where}")
    for key in values:
        if key not in groups:
            what = words.get(key, "a setting of what is named above")
            lines.append(f"  --{where}.{key}={values[key]}\n      {what}")
    for key in groups:
        inner = config_.PruneConfig if config_.is_pruner(key) else hints[key]
        _explain(inner, values[key], f"{where}.{key}", lines)


@functools.cache
def _attributes(docstring: str) -> dict[str, str]:
    """What the Attributes section of a docstring says of each name, in one line."""
    found = re.findall(r"^        (\w+): ((?:.+\n?(?: {12}.+\n?)*))", docstring, re.M)
    return {name: " ".join(text.split()) for name, text in found}
