"""Commands of the package in this process: as from a shell, without a start."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec

# Defines flags as it is imported, which would be removed with those of a command.
import grain  # noqa: F401
import pytest
from absl.testing import flagsaver

from woodfisher_jax import main


def run_module(module: str, *arguments: str) -> object:
    """Exit code of ``python -m woodfisher_jax.MODULE ARGUMENTS``."""
    name = f"woodfisher_jax.{module}"
    spec = find_spec(name)
    assert spec, name
    with pytest.MonkeyPatch.context() as patch, _restored():
        patch.setattr(sys, "argv", [f"{module}.py", *arguments])
        try:
            if module == "main":
                main.main(main.parse(sys.argv))
            else:
                is_package = spec.submodule_search_locations is not None
                importlib.import_module(name + ".__main__" * is_package).cli()
        except SystemExit as ended:
            return ended.code
    return 0


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Restores the flags and the log, which a process has once."""
    logger = logging.getLogger("woodfisher_jax")
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "propagate", True)
        patch.setattr(logger, "level", logger.level)
        yield
