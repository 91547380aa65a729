"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import shutil
from pathlib import Path


class WriteError(OSError):
    """A file could not be written; the message has its path and the bytes it needs."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that would take a smaller file."""

ROOM = 10_000_000
"""Bytes that a run needs besides its saves: for its log, its metrics and its report."""


def user_cache() -> Path:
    """The package's folder in ``XDG_CACHE_HOME``, or without that in ``~/.cache``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "woodfisher_jax"
    return cache.expanduser()


def check_room(folder: str | os.PathLike[str], need: int = 0) -> None:
    """Raises unless the disk of a folder has room.

    Called before a run starts and before each save, so that the libraries which write
    their own files, some of them in other threads, do not meet a full disk.

    Args:
        folder: It exists.
        need: Bytes to write there, besides `ROOM`; default 0.

    Raises:
        WriteError: If there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < need + ROOM:
        raise WriteError(
            f"the disk of {folder} is full: {(need + ROOM) / 1e6:.4g} MB are needed, "
            f"and {free / 1e6:.4g} MB are free; make room and repeat the command, "
            "which resumes a run from its last save"
        )


def replace_file(
    path: str | os.PathLike[str], *content: str | bytes | bytearray | memoryview
) -> None:
    """Writes a file so that at any moment the old one or the new one is there whole.

    Args:
        path: The file; its folder is made where absent.
        *content: All of it, one after another; a string is written as UTF-8.

    Raises:
        WriteError: If the disk does not take it. An old file stays as it was.
    """
    path = Path(path)
    parts = [part.encode() if isinstance(part, str) else part for part in content]
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())  # Else a power cut can leave the new name empty.
        os.replace(partial, path)
    except OSError as error:
        needs = "expected a folder that can be written to"
        if error.errno in FULL:
            needs = f"it needs {sum(map(len, parts)):,} bytes{_free(path.parent)}"
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}; {needs}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _free(folder: Path) -> str:
    try:
        return f", and {shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return ""
