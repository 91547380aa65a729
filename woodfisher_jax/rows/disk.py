"""Gradients of one device in a file, in a folder that is removed with its run.

The file holds tile after tile, of each tile all samples, so that a tile is one
sequential read. The file is read and written, not memory-mapped: under a map, a full
disk or a truncated file kills the process with SIGBUS, and the pages count as memory of
the process.

The files of a run lie in a folder of their own, locked while the run lives. The kernel
releases the lock however the process ends, and the next run that stores gradients under
the same parent removes the folders that nobody has locked.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from woodfisher_jax.rows.tiles import Pass, Tile

PREFIX = "woodfisher-gradients-"
LOCK = "lock"

FORGOTTEN_SECONDS = 3600.0
"""Age at which a folder without a lock counts as left over from a partial removal."""


class StoreError(OSError):
    """The disk cannot hold the gradients, or does not return them."""


def free_bytes(parent: str | Path | None = None) -> int:
    """Free space on the disk that a folder is, or would be, on."""
    parent = Path(parent or tempfile.gettempdir()).absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


# ----------------------------------------------------------------------------- folders


@contextlib.contextmanager
def locked_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """A folder for this run's files, removed at the end with all its contents.

    Folders that killed runs left under the same parent are removed first.

    Args:
        parent: Where to make it; default the system's folder for temporary files.

    Raises:
        StoreError: If the parent is no folder that can be written to.
    """
    parent = Path(parent or tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(parent)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = stack.enter_context((folder / "unlocked").open("w"))
            # Renamed once locked: another run never sees a LOCK that is not held.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "unlocked").rename(folder / LOCK)
        except OSError as error:
            raise StoreError(
                f"store_dir={str(parent)!r}: {error.strerror}; expected a folder that "
                "can be written to, on a disk that has locks"
            ) from error
        yield folder


def remove_abandoned(parent: Path) -> list[Path]:
    """Removes the folders whose run has ended without removing them.

    Returns:
        The folders removed.
    """
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        # An OSError: another run is removing it, or it belongs to another user.
        with contextlib.suppress(OSError):
            if not folder.is_symlink() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_abandoned(folder: Path) -> bool:
    """Whether no run holds the folder's lock."""
    if not (folder / LOCK).exists():
        # Not locked yet, or an earlier removal stopped half way.
        return time.time() - folder.stat().st_mtime > FORGOTTEN_SECONDS
    with (folder / LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# ------------------------------------------------------------------------------- files


class FileTier:
    """Rows of one device in a file."""

    def __init__(self, path: Path, num_samples: int, pass_: Pass, dtype: str):
        self._path = path
        self._num_samples = num_samples
        self._tiles = pass_.tiles
        self._dtype = jnp.dtype(dtype)
        self._bytes = num_samples * pass_.columns * self._dtype.itemsize
        with self._explained("cannot be made"), contextlib.ExitStack() as stack:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            stack.callback(self.close)
            try:
                # A full disk shows now, and not after half of the work.
                os.posix_fallocate(self._file, 0, max(1, self._bytes))
            except OSError as error:
                # Some file systems cannot reserve space.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            stack.pop_all()

    def write(self, start: int, rows: np.ndarray) -> None:
        """Keeps the rows [n, columns] of the samples from ``start``.

        Raises:
            StoreError: If the disk does not take them.
        """
        for tile in self._tiles:
            left = _bytes_of(np.ascontiguousarray(rows[:, tile.start : tile.stop]))
            offset = self._offset(tile, start)
            while left:
                with self._explained("cannot be written"):
                    written = os.pwrite(self._file, left, offset)
                left, offset = left[written:], offset + written

    def read(self, tile: Tile) -> np.ndarray:
        """The tile's columns of all rows [N, num_blocks * width].

        Raises:
            StoreError: If the file does not hold them.
        """
        rows = np.empty((self._num_samples, tile.columns), self._dtype)
        left, offset = _bytes_of(rows), self._offset(tile, 0)
        while left:
            with self._explained("cannot be read"):
                number = os.preadv(self._file, [left], offset)
            if number == 0:
                raise StoreError(
                    f"the gradient store {str(self._path)!r} ends at byte {offset} of "
                    f"{self._bytes}: another program has truncated it; no weight was "
                    "changed, start again"
                )
            left, offset = left[number:], offset + number
        return rows

    def close(self) -> None:
        """Removes the file."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _offset(self, tile: Tile, sample: int) -> int:
        """Where a sample's columns of a tile start, in bytes."""
        numbers = self._num_samples * tile.start + sample * tile.columns
        return numbers * self._dtype.itemsize

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns the system's error into one that says what to do."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self._path.parent).free
            raise StoreError(
                f"the gradient store {str(self._path)!r} {what}: {error.strerror}. It "
                f"needs {self._bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; "
                "name a larger disk in store_dir, or take store_dtype='bfloat16', "
                "fewer num_samples or store='recompute'"
            ) from error


def _bytes_of(array: np.ndarray) -> memoryview:
    # By way of bytes: NumPy exports no buffer of bfloat16.
    return memoryview(array.view(np.uint8).reshape(-1).data)
