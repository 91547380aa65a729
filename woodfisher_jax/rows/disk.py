"""Rows of gradients in a file: written behind the work and read ahead of it.

The file holds panel after panel, of each panel all samples, so that a panel is read in
one sweep. Plain reads and writes rather than a memory map: with a map a full disk or a
truncated file ends the process without a word, and pages count as memory of the
process.

The files of a run lie in a folder of their own, which is locked while the run lives.
The lock goes with the process, however that ends, and the next run that stores
gradients under the same parent removes the folders that nobody holds.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from woodfisher_jax.rows.tiles import Panel, Part

PREFIX = "woodfisher-gradients-"
LOCK = "lock"

FORGOTTEN_SECONDS = 3600.0
"""Age from which a folder without a lock is one whose removal was cut short."""


class StoreError(OSError):
    """The disk cannot hold the gradients, or does not give them back."""


@contextlib.contextmanager
def locked_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for this run's files, removed at the end with all that is in it.

    Folders that ended runs have left under the same parent are removed first.

    Args:
        parent: Where to make it; default the system's folder for temporary files.

    Raises:
        StoreError: If the parent is no folder that can be written to.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    folder = None
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(parent)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = stack.enter_context((folder / "making").open("w"))
            # Locked before it has its name: nobody finds it without its lock.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "making").rename(folder / LOCK)
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
        try:
            if folder.is_symlink() or not _abandoned(folder):
                continue
        except OSError:
            # Just being removed by somebody else, or not ours to look into.
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _abandoned(folder: Path) -> bool:
    """Whether no run holds the folder."""
    if not (folder / LOCK).exists():
        # Just being made; or its removal was cut short, long ago.
        return time.time() - folder.stat().st_mtime > FORGOTTEN_SECONDS
    with (folder / LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def free_bytes(parent: Path | None = None) -> int:
    """Room on the disk that a folder is, or would be, on."""
    parent = Path(tempfile.gettempdir() if parent is None else parent).absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


class File:
    """Rows of one device in a file; a :class:`~woodfisher_jax.rows.store.Shelf`."""

    def __init__(self, path: Path, num_samples: int, part: Part, dtype: str):
        self._path = path
        self._num_samples = num_samples
        self._panels = part.panels
        self._dtype = jnp.dtype(dtype)
        self._bytes = num_samples * part.columns * self._dtype.itemsize
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._failed("cannot be made", error) from error
        self._writer = ThreadPoolExecutor(1, "gradients to disk")
        self._writing: Future[None] | None = None
        try:
            # Says now, and not after half of the work, that there is no room.
            os.posix_fallocate(self._file, 0, max(1, self._bytes))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.close()
                raise self._failed("cannot be made", error) from error

    def _failed(self, what: str, error: OSError) -> StoreError:
        free = shutil.disk_usage(self._path.parent).free
        return StoreError(
            f"the gradient store {str(self._path)!r} {what}: {error.strerror}. It "
            f"needs {self._bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; name "
            "a larger disk in store_dir, or take store_dtype='bfloat16', fewer "
            "num_samples or store='recompute'"
        )

    def _offset(self, panel: Panel, sample: int) -> int:
        width = panel.num_blocks * panel.width
        numbers = self._num_samples * panel.start + sample * width
        return numbers * self._dtype.itemsize

    def write(self, start: int, rows: np.ndarray) -> None:
        """Hands the rows [n, columns] of the samples from ``start`` to the writer.

        Raises:
            StoreError: If a write before this one has failed.
        """
        # One chunk at a time: what waits takes memory.
        self.finish()
        self._writing = self._writer.submit(self._write, start, rows)

    def _write(self, start: int, rows: np.ndarray) -> None:
        for panel in self._panels:
            portion = np.ascontiguousarray(rows[:, panel.start : panel.stop])
            left = _bytes_of(portion)
            offset = self._offset(panel, start)
            while left:
                try:
                    written = os.pwrite(self._file, left, offset)
                except OSError as error:
                    raise self._failed("cannot be written", error) from error
                left, offset = left[written:], offset + written

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            StoreError: If a write has failed.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def read(self, panel: Panel) -> np.ndarray:
        """The panel's columns of all rows [N, num_blocks * width].

        Raises:
            StoreError: If the file does not hold them.
        """
        width = panel.num_blocks * panel.width
        found = np.empty((self._num_samples, width), self._dtype)
        left = _bytes_of(found)
        offset = self._offset(panel, 0)
        while left:
            try:
                number = os.preadv(self._file, [left], offset)
            except OSError as error:
                raise self._failed("cannot be read", error) from error
            if number == 0:
                raise StoreError(
                    f"the gradient store {str(self._path)!r} ends at byte {offset} of "
                    f"{self._bytes}: somebody has cut it short; nothing was changed, "
                    "start again"
                )
            left, offset = left[number:], offset + number
        return found

    def close(self) -> None:
        """Gives the room back; writes that wait are dropped."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def _bytes_of(array: np.ndarray) -> memoryview:
    # By way of bytes: bfloat16 has no buffer of its own in NumPy.
    return memoryview(array.view(np.uint8).reshape(-1).data)
