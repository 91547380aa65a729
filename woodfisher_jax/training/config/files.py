"""Config files: found by name or path, executed, overridden by a command line, shown.

An *override* is an argument of a command line, ``--config.prune.damping=1e-4``.
"""

import ast
import contextlib
import difflib
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from woodfisher_jax.options import Field, shown
from woodfisher_jax.training.config.language import LanguageConfig
from woodfisher_jax.training.config.sections import Config, PruneConfig
from woodfisher_jax.training.config.values import (
    NAMED,
    ConfigError,
    check_key,
    is_pruner,
    root_of,
    section_fields,
    subsections,
    to_dict,
)

_PACKAGE = Path(__file__).parents[2]

# Within the package where that is installed, beside it in a checkout.
SHIPPED = _PACKAGE / "configs"
if not SHIPPED.is_dir():
    SHIPPED = _PACKAGE.parent / "configs"
"""The folder of the configs that come with the package."""


# ------------------------------------------------------------------------------ files


def shipped() -> dict[str, str]:
    """The configs that come with the package, each with its summary line."""
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


def is_shipped(config: str) -> bool:
    """Whether ``--config`` names a file that comes with the package."""
    return find(config).resolve().parent == SHIPPED.resolve()


def load_config(config: str) -> dict[str, Any]:
    """Executes a config file.

    Args:
        config: As for `find`, of a Python file with ``get_config()``; with a word after
            a colon ``get_config("word")`` is called.

    Returns:
        What it states, as nested dicts for :func:`~.values.from_dict`.

    Raises:
        ConfigError: If there is no such file, or it cannot be executed.
    """
    path, word = find(config), config.partition(":")[2]
    # A config may import a method that lies beside it.
    sys.path.append(str(path.parent.resolve()))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except (Exception, SystemExit) as error:
        raise _in_file(path, error) from error
    if get_config is None:
        raise ConfigError(f"--config={config}: the file must define get_config()")
    try:
        stated = get_config(word) if word else get_config()
    except ValueError as error:
        raise ConfigError(f"--config={config}: {_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise _in_file(path, error) from error
    if not isinstance(stated, (ConfigDict, dict)):
        raise ConfigError(
            f"{path}: expected a ConfigDict of get_config(), got {shown(stated)}"
        )
    values: dict[str, Any] = ConfigDict(stated).to_dict()
    return values


def _line(error: BaseException) -> str:
    """The words of an error as one line, not too long."""
    return f"{' '.join(str(error).split()):.300}"


def _in_file(path: Path, error: BaseException) -> ConfigError:
    """An error in a config file, with the line where it was raised."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    where = f", line {lines[-1]}" if lines else ""
    return ConfigError(f"{path}{where}: {type(error).__name__}: {_line(error)}")


# -------------------------------------------------------------------------- overrides


def override(values: dict[str, Any], argument: str) -> None:
    """Sets the field that an argument of a command line names.

    Args:
        values: As for :func:`~.values.from_dict`; changed.
        argument: ``--config.FIELD=VALUE``; of a switch also ``--config.FIELD`` and
            ``--noconfig.FIELD``.

    Raises:
        ConfigError: For a field that does not exist, with the nearest one, or a group
            of fields, or where a value is missing.
    """
    name, given, text = argument.lstrip("-").partition("=")
    if name.startswith("no"):
        name, text = name[2:], "False"
    elif not given:
        text = "True"
    _, *groups, key = name.split(".")
    section: type = root_of(values)
    level, where = values, "config"
    for group in groups:
        section = _inner(section, level, group, where)
        level, where = level.setdefault(group, {}), f"{where}.{group}"
        if not isinstance(level, dict):
            raise ConfigError(f"{where}={shown(level)}; expected a group of fields")
    fields = section_fields(section, level)
    if section in NAMED and key not in fields:
        level[key] = _setting(text, level.get(key))
        return
    if key in subsections(section) or (section is Config and is_pruner(key)):
        raise ConfigError(
            f"{name} is a group of fields; expected --{name}.FIELD=VALUE (--helpfull "
            "lists them)"
        )
    check_key(key, fields, where)
    if not given and bool not in fields[key].kinds:
        raise ConfigError(f"--{name} has no value; expected --{name}=VALUE")
    level[key] = parsed(text, fields[key])


def _inner(section: type, level: Any, group: str, where: str) -> type:
    """A section within a section."""
    if section is Config and is_pruner(group):
        return PruneConfig
    inner = subsections(section)
    fields = section_fields(section, level)
    check_key(group, [*inner, *fields], where)
    if group not in inner:
        raise ConfigError(f"{where}.{group} is no group of fields")
    return inner[group]


SWITCHES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
"""What a command line may say for True and False, in small letters."""


def parsed(text: str, field: Field) -> Any:
    """The value that a text stands for; the text itself if it is none of the field's.

    Args:
        text: From a command line.
        field: Of which it is a value.
    """
    if text == "None" and (field.optional or field.plain is not str):
        return None
    if text in field.words:
        return text
    if bool in field.kinds:
        return SWITCHES.get(text.lower(), text)
    for kind in (int, float):
        if kind in field.kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text if field.plain else _setting(text, ())


def _setting(text: str, present: Any) -> Any:
    """A Python literal or a word; of a tuple with one element, the element may do."""
    value = text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
    several = isinstance(present, (tuple, list))
    return (value,) if several and not isinstance(value, (tuple, list)) else value


# ------------------------------------------------------------------------------- help


def explained(config: Config | LanguageConfig) -> str:
    """Every field of a config with its value and its documentation."""
    return "\n".join(_explained(type(config), to_dict(config), "config"))


def _explained(section: type, values: Mapping[str, Any], where: str) -> list[str]:
    fields, inner = section_fields(section, values), subsections(section)
    lines = [f"\n{where}"]
    sections = {key for key in values if key in inner or is_pruner(key)}
    for key, value in values.items():
        if key not in sections:
            doc = fields[key].doc if key in fields else "A setting of the above."
            shown = tuple(value) if isinstance(value, list) else value
            lines.append(f"  --{where}.{key}={shown}\n      {doc}")
    for key, value in values.items():
        if key in sections:
            kind = PruneConfig if is_pruner(key) else inner[key]
            lines += _explained(kind, value, f"{where}.{key}")
    return lines
