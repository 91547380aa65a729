"""The folder of a run: the config that it belongs to, and its log."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.resuming.preemption import Stopped
from woodfisher_jax.written_files import check_room, replace_file

MACHINE = (
    "distributed",
    "compile_cache_dir",
    "data.dir",
    "data.workers",
    "data.prefetch",
)
"""Fields of the config that may differ when a run is resumed."""

LOCK = "lock.json"
"""File that the process of a run holds locked; it says which process that is."""

logger = logging.getLogger(__name__)

LOG_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")


def identity(config: Config) -> dict[str, Any]:
    """The config as plain values, without the fields of MACHINE."""
    values: dict[str, Any] = json.loads(json.dumps(config_.to_dict(config)))
    for field in MACHINE:
        section, _, name = field.rpartition(".")
        del (values[section] if section else values)[name]
    return values


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of the folder of a run while the context is open.

    The kernel releases the lock however a process ends, so that the file of a dead one
    holds nobody up.

    Raises:
        ConfigError: If another process holds the folder, it cannot be made, or has
            files that are no run's.
    """
    path = workdir / LOCK
    _check_own(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # Not "w": the holder's line stays.
    except OSError as error:
        raise _unusable(workdir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"workdir={workdir} is in use by {_holder(path)}; wait for it, stop "
                "it, or choose another --workdir"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: its disk has no locks (%s); nothing keeps a second run out",
                workdir,
                error.strerror,
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        # For people alone: without it, a full disk is the checkpoint's to report.
        with contextlib.suppress(OSError):
            file.truncate(0)
            os.write(file.fileno(), f"{json.dumps(holder)}\n".encode())
        yield


def _check_own(workdir: Path) -> None:
    """Raises for a folder with files in which no run has ever been."""
    if not workdir.is_dir() or (workdir / "checkpoints").exists():
        return
    names = [path.name for path in workdir.iterdir() if path.name[0] != "."]
    if names and LOCK not in names:
        raise ConfigError(
            f"workdir={workdir} holds files that are no run's, such as "
            f"{min(names)!r}, which a run could replace; expected a run's folder, an "
            "empty one or a new one"
        )


def _holder(path: Path) -> str:
    """Who holds a folder, by the file that it has locked."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process ({path} does not say which)"


def _unusable(workdir: Path, error: Exception) -> ConfigError:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror}: {error.filename}"
    return ConfigError(
        f"workdir={workdir} cannot be used ({reason}); choose with --workdir a folder "
        "that can be written to"
    )


@contextlib.contextmanager
def removed_unless_started(
    made: Sequence[Path], errors: type[BaseException] = BaseException
) -> Iterator[Callable[[], None]]:
    """Removes the new folder of a run if an error ends the context too early.

    Args:
        made: The folder and those that it is in, as far as they were made for this run.
        errors: Which errors; default any.

    Yields:
        What to call once the run has started, from when on the folder stays.
    """
    started = threading.Event()
    try:
        yield started.set
    except errors:
        if made and not started.is_set():
            shutil.rmtree(made[0], ignore_errors=True)
            with contextlib.suppress(OSError):  # Another run is in one of them.
                for parent in made[1:]:
                    parent.rmdir()
        raise


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config to the workdir, or compares it with the one there.

    Raises:
        ConfigError: If it cannot be written, or holds the run of another config.
    """
    path = workdir / "config.json"
    differing = []
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_room(workdir)
        found = _found(workdir)
        if found is not None:
            # What did not exist when it was written has its default.
            was = config_.from_dict(found)
            differing = differences(identity(was), identity(config), "config")
        if not differing and (found is None or not path.exists()):
            content = json.dumps(config_.to_dict(config), indent=2) + "\n"
            replace_file(path, content)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _unusable(workdir, error) from error
    if differing:
        raise ConfigError(
            f"workdir={workdir} holds the run of another config: "
            f"{'; '.join(differing[:5])}. Choose another --workdir, or repeat the "
            "overrides of that run to resume it"
        )


def _found(workdir: Path) -> dict[str, Any] | None:
    """The config of the run in a folder; None before its first save.

    Raises:
        ConfigError: If it is damaged.
    """
    saves = list(workdir.glob("checkpoints/*"))
    path = workdir / "config.json"
    # A run that stopped before its first checkpoint has left nothing to protect.
    if saves and path.exists():
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}); delete it and repeat the command: the "
                "saves beside it hold the config too, and the run resumes from them"
            ) from error
    numbered = [save for save in saves if save.name.isdecimal()]
    for save in sorted(numbered, key=lambda save: int(save.name), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads((save / "meta" / "metadata").read_text())["config"])
    return None


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


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short, without a traceback for each message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing: the console has the message too."""

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_file(workdir: Path) -> Iterator[None]:
    """Copies this package's log messages to ``log.txt`` while the context is open.

    The traceback of an error that ends the context is written there too.
    """
    handler = _LogFile(workdir / "log.txt")
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
