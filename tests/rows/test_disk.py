"""Files of gradients: disk failures are explained, and nothing is left behind.

Nothing means: no file, no folder, whether the run ended well, with an error, by an
interruption or by a kill.
"""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.rows import disk
from woodfisher_jax.rows.disk import (
    LOCK,
    PREFIX,
    FileTier,
    StoreError,
    free_bytes,
    locked_folder,
    remove_abandoned,
)
from woodfisher_jax.rows.store import collect, new_store
from woodfisher_jax.rows.tiles import whole
from woodfisher_jax.trees.blocks import flat_order, within_tensors

SAMPLES = 6
ORDER = flat_order({"w": np.zeros(20)})
PASS = whole(ORDER, within_tensors(ORDER, 3), SAMPLES, tile_bytes=150)
"""Several tiles and a column of padding."""
SUGGESTIONS = ("store_dir", "bfloat16", "num_samples", "recompute")
RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((SAMPLES, PASS.columns)).astype(np.float32)


def new_file(folder: Path, dtype="float32") -> FileTier:
    return FileTier(folder / "device0", SAMPLES, PASS, dtype)


@pytest.fixture
def file(tmp_path: Path):
    """An open file of float32 rows."""
    made = new_file(tmp_path)
    yield made
    made.close()


def assert_holds(file: FileTier, rows: np.ndarray) -> None:
    for tile in (*PASS.tiles, PASS.tiles[0]):
        columns = file.read(tile)
        assert columns.dtype == rows.dtype
        np.testing.assert_array_equal(columns, rows[:, tile.start : tile.stop])


def fails_from(call: int, function, error: int):
    """Replaces a system call: from that call on it fails."""
    calls = []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) > call:
            raise OSError(error, os.strerror(error))
        return function(*args, **options)

    return failing


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(6,), (2, 3, 1)])
def test_rows_come_back_by_tile(tmp_path: Path, dtype, lengths) -> None:
    assert len(PASS.tiles) > 2
    # Not in one piece in memory.
    rows = np.asfortranarray(ROWS.astype(jnp.dtype(dtype)))
    made, start = new_file(tmp_path, dtype), 0
    for length in lengths:
        made.write(start, rows[start : start + length])
        start += length
    assert (tmp_path / "device0").stat().st_size == rows.nbytes
    assert (tmp_path / "device0").stat().st_mode & 0o077 == 0  # its owner's alone
    assert_holds(made, rows)
    made.close()
    assert not list(tmp_path.iterdir())


def test_short_writes_and_reads_are_continued(file, monkeypatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, data, at: preadv(fd, [data[0][:5]], at)
    )
    file.write(0, ROWS)
    assert_holds(file, ROWS)


def test_a_file_that_exists_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "device0").write_text("somebody's")
    with pytest.raises(StoreError, match="exists"):
        new_file(tmp_path)
    assert (tmp_path / "device0").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("call", "error"),
    [("posix_fallocate", errno.ENOSPC), ("open", errno.EDQUOT), ("open", errno.EROFS)],
)
def test_a_file_that_cannot_be_made_is_refused_at_once(
    tmp_path: Path, monkeypatch, call, error
) -> None:
    monkeypatch.setattr(os, call, fails_from(0, getattr(os, call), error))
    with pytest.raises(StoreError, match="cannot be made") as caught:
        new_file(tmp_path)
    for word in (os.strerror(error), *SUGGESTIONS):
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_disks_that_reserve_no_space_are_used_all_the_same(
    tmp_path: Path, monkeypatch, error
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fails_from(0, os.posix_fallocate, error))
    made = new_file(tmp_path)
    made.write(0, ROWS)
    assert_holds(made, ROWS)
    made.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_failing_writes_and_reads_are_explained(file, monkeypatch, error) -> None:
    file.write(0, ROWS)
    monkeypatch.setattr(os, "preadv", fails_from(0, os.preadv, error))
    with pytest.raises(StoreError, match=f"cannot be read: {os.strerror(error)}"):
        file.read(PASS.tiles[0])
    monkeypatch.setattr(os, "pwrite", fails_from(1, os.pwrite, error))
    with pytest.raises(StoreError, match=f"cannot be written: {os.strerror(error)}"):
        file.write(0, ROWS)


def test_a_file_that_was_truncated_is_noticed(file, tmp_path: Path) -> None:
    file.write(0, ROWS)
    os.truncate(tmp_path / "device0", 100)
    with pytest.raises(StoreError, match=f"ends at byte 100 of {ROWS.nbytes}"):
        assert_holds(file, ROWS)


# ----------------------------------------------------------------------------- folders


def folders(parent: Path) -> list[Path]:
    return list(parent.glob(f"{PREFIX}*"))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_is_removed_whatever_happens(tmp_path: Path, error) -> None:
    parent = tmp_path / "is" / "made"
    with contextlib.suppress(*[error] * bool(error)), locked_folder(parent) as folder:
        (folder / "device0").write_text("gradients")
        assert folders(parent) == [folder]
        if error:
            raise error
    assert not list(parent.iterdir())


def test_folders_that_are_in_use_are_left_alone(tmp_path: Path) -> None:
    with locked_folder(tmp_path) as one:
        (one / "device0").write_text("gradients")
        with locked_folder(tmp_path) as other:
            assert one != other
            assert (one / "device0").read_text() == "gradients"
        assert remove_abandoned(tmp_path) == []
        assert (one / "device0").exists()
    assert not folders(tmp_path)


def test_only_abandoned_folders_of_ours_are_removed(tmp_path: Path) -> None:
    abandoned, others = tmp_path / f"{PREFIX}abandoned", tmp_path / "somebody-elses"
    for folder in (abandoned, others):
        folder.mkdir()
        (folder / LOCK).touch()
        (folder / "device0").write_text("gradients")
    # What a link points to is never removed, inside our folder or beside it.
    (abandoned / "device1").symlink_to(others)
    (tmp_path / f"{PREFIX}link").symlink_to(others)
    assert remove_abandoned(tmp_path) == [abandoned]
    assert not abandoned.exists()
    assert sorted(path.name for path in others.iterdir()) == ["device0", LOCK]


def test_a_folder_without_a_lock_is_removed_once_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir()
    (folder / "device0").write_text("gradients")
    assert remove_abandoned(tmp_path) == []  # a run may be just making it
    os.utime(folder, (0, 0))
    assert remove_abandoned(tmp_path) == [folder]  # an earlier removal was cut short
    assert not folder.exists()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_parent_that_is_a_file(tmp_path: Path, below) -> None:
    (tmp_path / "file").write_text("mine")
    parent = tmp_path / "file" / below
    with (
        pytest.raises(StoreError, match="expected a folder") as caught,
        locked_folder(parent),
    ):
        pass
    assert str(parent) in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "call", "error"),
    [
        (disk.tempfile, "mkdtemp", errno.EACCES),
        (disk.tempfile, "mkdtemp", errno.ENOSPC),
        (fcntl, "flock", errno.ENOLCK),
    ],
)
def test_a_parent_without_permission_space_or_locks(
    tmp_path: Path, monkeypatch, module, call, error
) -> None:
    monkeypatch.setattr(module, call, fails_from(0, getattr(module, call), error))
    with (
        pytest.raises(StoreError, match="store_dir=") as caught,
        locked_folder(tmp_path),
    ):
        pass
    assert os.strerror(error) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    assert free > 0
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free, rel=0.05)
    assert free_bytes() > 0


# ----------------------------------------------------------------------- whole stores


def store_all(parent: Path, after=lambda start: None) -> list[np.ndarray]:
    """Stores all rows on disk, as a pruning step does, and reads them."""

    def chunks():
        for start in range(SAMPLES):
            yield jnp.asarray(ROWS[start : start + 1, : ORDER.size])
            after(start)

    with locked_folder(parent) as folder:
        store = new_store("disk", PASS, SAMPLES, "float32", folder=folder)
        try:
            collect(chunks(), PASS, store, "float32")
            return [np.asarray(tile) for tile in store.tiles(PASS.tiles)]
        finally:
            store.close()


def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwrite", fails_from(9, os.pwrite, errno.ENOSPC))
    with pytest.raises(StoreError, match="No space left") as caught:
        store_all(tmp_path)
    for word in SUGGESTIONS:
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def python(code: str, *args: str) -> subprocess.Popen:
    """Another process, which can import this module."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


FULL = """
import os, resource, sys
from pathlib import Path
import test_disk
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, most))
parent = Path(sys.argv[1])
for reserves in (True, False):
    if not reserves:  # then it is found to be full only half way
        os.posix_fallocate = test_disk.fails_from(0, None, test_disk.errno.EOPNOTSUPP)
    try:
        test_disk.store_all(parent)
    except test_disk.StoreError as error:
        print(error)
    assert not list(parent.iterdir())
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    child = python(FULL, str(tmp_path))
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    first, second = out.splitlines()
    assert "cannot be made: File too large" in first
    assert "cannot be written: File too large" in second
    for word in (f"{ROWS.nbytes / 1e9:.3g} GB", *SUGGESTIONS):
        assert word in first
        assert word in second


SLOW = """
import sys, time
from pathlib import Path
import test_disk
def after(start):
    if start == 3:
        print("half way", flush=True)
        time.sleep(600)
test_disk.store_all(Path(sys.argv[1]), after)
"""


def test_files_of_a_killed_run_are_removed_by_the_next(tmp_path: Path) -> None:
    child = python(SLOW, str(tmp_path))
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "half way\n"
        (left,) = folders(tmp_path)
        assert (left / "device0").stat().st_size == ROWS.nbytes
        # While it lives, nobody touches its files.
        with locked_folder(tmp_path):
            assert (left / "device0").exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (left / "device0").exists()
    finally:
        child.kill()
        child.communicate()
    tiles = store_all(tmp_path)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(tiles[0][0], ROWS[:, : PASS.tiles[0].width])
