"""Packages that an extra installs, imported where a command first needs them."""

import importlib
from typing import Any

EXTRAS = {
    "flatbuffers": "export",
    "grain": "images",
    "matplotlib": "report",
    "sklearn": "digits",
    "tensorboardX": "report",
    "tokenizers": "text",
}
"""Top-level module to the extra of pyproject.toml that installs it."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message has the command for it."""


def require(module: str, purpose: str) -> Any:
    """Imports a module that the base install does without.

    Args:
        module: its dotted name; the part before the first dot is a key of `EXTRAS`.
        purpose: what needs it, such as "the data set digits".

    Returns:
        The module.

    Raises:
        MissingExtraError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs {_DISTRIBUTIONS.get(package, package)}: "
            f"pip install 'woodfisher-jax[{EXTRAS[package]}]'"
        ) from error
