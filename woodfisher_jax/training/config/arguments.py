"""The arguments of a command line that name a config and override its fields."""

import copy
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from woodfisher_jax.layerwise.arguments import unused
from woodfisher_jax.training.config.checks import from_dict
from woodfisher_jax.training.config.files import (
    is_shipped,
    load_config,
    override,
    shipped,
)
from woodfisher_jax.training.config.language import LanguageConfig
from woodfisher_jax.training.config.sections import Config
from woodfisher_jax.training.config.values import ConfigError, build_language, root_of

PROGRAM = "python -m woodfisher_jax.main"
"""How the command is called."""


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments, ``--config.x value`` as ``--config.x=value``."""
    left, given = list(argv), []
    while left:
        argument = left.pop(0)
        is_open = re.fullmatch(r"--?config(\.[^=]+)?", argument)
        if is_open and left and not left[0].startswith("--"):
            argument += f"={left.pop(0)}"
        given.append(argument)
    return given


def names_config(argument: str) -> bool:
    """Whether an argument says which config it is."""
    return re.match(r"--?config(=|$)", argument) is not None


def is_config(argument: str) -> bool:
    """Whether an argument names a config or overrides a field of it."""
    return re.match(r"--?(config(\.|=|$)|noconfig\.)", argument) is not None


def read_config(arguments: Sequence[str]) -> tuple[str, Config | LanguageConfig]:
    """The config that a command line names, with its overrides, checked.

    Args:
        arguments: ``--config=NAME`` and ``--config.FIELD=VALUE``.

    Returns:
        The name or path, and the config.

    Raises:
        ConfigError: If there is none, or it cannot be run.
    """
    names = [a.partition("=")[2] for a in arguments if names_config(a)]
    if len(names) > 1:
        raise ConfigError(f"--config is given {len(names)} times; expected one")
    if not names or not names[0]:
        raise ConfigError(
            f"no config is given; expected one of\n{listed()}\nor a file of your "
            f"own, as in {PROGRAM} digits (--help says more)"
        )
    values = load_config(names[0])
    stated = copy.deepcopy(values) if is_shipped(names[0]) else {}
    for argument in arguments:
        if not names_config(argument):
            override(values, argument)
    if root_of(values) is LanguageConfig:
        given = {argument.lstrip("-").partition("=")[0] for argument in arguments}
        return names[0], _without_idle(values, stated, given)
    return names[0], from_dict(values)


def _without_idle(
    values: dict[str, Any], stated: dict[str, Any], given: set[str]
) -> LanguageConfig:
    """The config without what a shipped file states and overrides leave unused.

    Else a run would warn of an option that its user has not set.

    Args:
        values: Of the config, with its overrides.
        stated: By a shipped file; nothing for a file of the user's own.
        given: Names of the fields that the command line sets.
    """
    config = build_language(values)
    idle = [
        name
        for name in unused(config.prune)
        if name in stated.get("prune", {}) and f"config.prune.{name}" not in given
    ]
    for name in idle:
        del values["prune"][name]
    return build_language(values)


def listed() -> str:
    """The configs that come with the package, a line each."""
    lines = shipped().items()
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        f"  {name:{width}}  {textwrap.shorten(summary, 76 - width, placeholder=' ...')}"
        for name, summary in lines
    )
