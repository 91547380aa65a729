"""The folder of a run: the config that it belongs to, and its log."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.preemption import Stopped

MACHINE = (
    "distributed",
    "compile_cache_dir",
    "data.dir",
    "data.workers",
    "data.prefetch",
)
"""Fields of the config that may differ when a run is resumed."""

LOG_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")


def identity(config: Config) -> dict[str, Any]:
    """The config as plain values, without the fields of MACHINE."""
    values: dict[str, Any] = json.loads(json.dumps(config_.to_dict(config)))
    for field in MACHINE:
        section, _, name = field.rpartition(".")
        del (values[section] if section else values)[name]
    return values


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config to the workdir, or compares it with the one there.

    Raises:
        ConfigError: If it cannot be written, or holds the run of another config.
    """
    path = workdir / "config.json"
    differing = []
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A run that stopped before its first checkpoint has left nothing to protect.
        if path.exists() and any(workdir.glob("checkpoints/*")):
            # What did not exist when it was written has its default.
            found = config_.from_dict(json.loads(path.read_text()))
            differing = differences(identity(found), identity(config), "config")
        else:
            path.write_text(json.dumps(config_.to_dict(config), indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"workdir={workdir} cannot be used ({error}); choose another --workdir"
        ) from error
    if differing:
        raise ConfigError(
            f"workdir={workdir} holds the run of another config: "
            f"{'; '.join(differing[:5])}. Choose another --workdir, or repeat the "
            "overrides of that run to resume it"
        )


def check_shared(workdir: Path) -> None:
    """Checks that a process can read the workdir that the first one has claimed.

    Raises:
        ConfigError: If it does not.
    """
    if not (workdir / "config.json").is_file():
        raise ConfigError(
            f"workdir={workdir} is not there in this process; expected a folder that "
            "all processes share, such as one on a network file system"
        )


def differences(found: Any, expected: Any, where: str) -> list[str]:
    """A line for each value in which two nested dicts differ.

    Args:
        found: The values there.
        expected: The values here.
        where: The name of both.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(key for key in expected if key not in found)]
        return [
            line
            for key in keys
            for line in differences(found.get(key), expected.get(key), f"{where}.{key}")
        ]
    if found == expected:
        return []
    return [f"{where} is {found!r} there, {expected!r} here"]


@contextlib.contextmanager
def log_file(workdir: Path) -> Iterator[None]:
    """Copies this package's log messages to ``log.txt`` while the context is open.

    The traceback of an error that ends the context is written there too.
    """
    handler = logging.FileHandler(workdir / "log.txt")
    handler.setFormatter(LOG_FORMAT)
    logger = logging.getLogger("woodfisher_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except Stopped:
        raise
    except Exception:
        said = "ended by an error"
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, said, (), sys.exc_info()
        )
        handler.handle(record)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
