"""Files of gradients: what goes wrong with disks is said, and nothing is left behind.

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

import woodfisher_jax as wf
from woodfisher_jax.rows import disk
from woodfisher_jax.rows.disk import (
    LOCK,
    PREFIX,
    File,
    StoreError,
    free_bytes,
    locked_folder,
    remove_abandoned,
)
from woodfisher_jax.rows.tiles import Part, whole
from woodfisher_jax.trees.blocks import flat_order, within_tensors

ROOT = Path(__file__).parents[2]
SAMPLES = 6
WAYS = ("store_dir", "bfloat16", "num_samples", "recompute")


def part_of(weights: int = 20, block_size: int = 3, panel_bytes: int = 150) -> Part:
    order = flat_order({"w": np.zeros(weights)})
    return whole(
        order, within_tensors(order, block_size), SAMPLES, panel_bytes=panel_bytes
    )


def rows_of(part: Part) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.standard_normal((SAMPLES, part.columns)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path):
    """An open file of float32 rows."""
    made = File(tmp_path / "device0", SAMPLES, part_of(), "float32")
    yield made
    made.close()


def fails_from(call: int, function, error: int):
    """Replaces a system call: from that call on it fails."""
    calls = []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) > call:
            raise OSError(error, os.strerror(error))
        return function(*args, **options)

    return failing


# ----------------------------------------------------------------------- a file itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(6,), (2, 3, 1), (1,) * 6])
def test_rows_come_back_by_panel(tmp_path: Path, dtype, lengths) -> None:
    part = part_of()
    assert len(part.panels) > 2
    rows = rows_of(part).astype(jnp.dtype(dtype))
    made = File(tmp_path / "device0", SAMPLES, part, dtype)
    start = 0
    for length in lengths:
        made.write(start, rows[start : start + length])
        start += length
    made.finish()
    assert (tmp_path / "device0").stat().st_size == rows.nbytes
    for panel in (*part.panels, part.panels[0]):
        found = made.read(panel)
        assert found.dtype == rows.dtype
        np.testing.assert_array_equal(found, rows[:, panel.start : panel.stop])
    made.close()
    assert not list(tmp_path.iterdir())


def test_rows_that_are_not_in_one_piece_are_kept_as_they_read(file) -> None:
    part = part_of()
    rows = np.asfortranarray(rows_of(part))
    file.write(0, rows)
    file.finish()
    for panel in part.panels:
        np.testing.assert_array_equal(
            file.read(panel), rows[:, panel.start : panel.stop]
        )


def test_short_writes_and_reads_are_continued(file, monkeypatch) -> None:
    part = part_of()
    rows = rows_of(part)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, data, at: preadv(fd, [data[0][:5]], at)
    )
    file.write(0, rows)
    file.finish()
    for panel in part.panels:
        np.testing.assert_array_equal(
            file.read(panel), rows[:, panel.start : panel.stop]
        )


def test_a_file_that_is_there_already_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "device0").write_text("somebody's")
    with pytest.raises(OSError, match="exists"):
        File(tmp_path / "device0", SAMPLES, part_of(), "float32")
    assert (tmp_path / "device0").read_text() == "somebody's"


def test_files_are_for_their_owner_only(file, tmp_path: Path) -> None:
    assert (tmp_path / "device0").stat().st_mode & 0o077 == 0


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        os, "posix_fallocate", fails_from(0, os.posix_fallocate, errno.ENOSPC)
    )
    with pytest.raises(StoreError, match="No space left") as caught:
        File(tmp_path / "device0", SAMPLES, part_of(), "float32")
    for word in ("cannot be made", *WAYS):
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_disks_that_set_nothing_aside_are_written_to_all_the_same(
    tmp_path, monkeypatch, error
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fails_from(0, os.posix_fallocate, error))
    part = part_of()
    made = File(tmp_path / "device0", SAMPLES, part, "float32")
    made.write(0, rows_of(part))
    made.finish()
    np.testing.assert_array_equal(
        made.read(part.panels[-1]), rows_of(part)[:, part.panels[-1].start :]
    )
    made.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_file_that_cannot_even_be_opened(tmp_path, monkeypatch, error) -> None:
    monkeypatch.setattr(os, "open", fails_from(0, os.open, error))
    with pytest.raises(StoreError):
        File(tmp_path / "device0", SAMPLES, part_of(), "float32")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_is_said_by_the_next_or_at_the_end(
    file, monkeypatch, error
) -> None:
    rows = rows_of(part_of())
    monkeypatch.setattr(os, "pwrite", fails_from(9, os.pwrite, error))

    def write_all() -> None:
        for start in range(SAMPLES):
            file.write(start, rows[start : start + 1])

    with pytest.raises(StoreError, match="cannot be written") as caught:
        write_all()
    assert os.strerror(error) in str(caught.value)


def test_the_last_write_s_failure_is_said_at_the_end(file, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwrite", fails_from(0, os.pwrite, errno.ENOSPC))
    file.write(0, rows_of(part_of()))
    with pytest.raises(StoreError, match="No space left"):
        file.finish()


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_truncated_file_is_said(file, tmp_path: Path, left) -> None:
    part = part_of()
    file.write(0, rows_of(part))
    file.finish()
    os.truncate(tmp_path / "device0", left)
    with pytest.raises(StoreError, match="ends at byte") as caught:
        list(map(file.read, part.panels))
    assert str(left) in str(caught.value)
    assert "device0" in str(caught.value)


def test_a_read_that_fails_is_said(file, monkeypatch) -> None:
    part = part_of()
    file.write(0, rows_of(part))
    file.finish()
    monkeypatch.setattr(os, "preadv", fails_from(0, os.preadv, errno.EIO))
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        file.read(part.panels[0])


# ---------------------------------------------------------------------------- folders


def folders(parent: Path) -> list[Path]:
    return list(parent.glob(f"{PREFIX}*"))


def test_a_folder_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with locked_folder(tmp_path) as folder:
        (folder / "device0").write_text("gradients")
        assert folders(tmp_path) == [folder]
    assert not folders(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_goes_whatever_happens(tmp_path: Path, error) -> None:
    with contextlib.suppress(error), locked_folder(tmp_path) as folder:
        (folder / "device0").write_text("gradients")
        raise error
    assert not folders(tmp_path)


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
    abandoned = tmp_path / f"{PREFIX}abandoned"
    other = tmp_path / "somebody-elses"
    for folder in (abandoned, other):
        folder.mkdir()
        (folder / LOCK).touch()
        (folder / "device0").write_text("gradients")
    assert remove_abandoned(tmp_path) == [abandoned]
    assert sorted(tmp_path.iterdir()) == [other]
    assert (other / "device0").exists()


def test_what_a_link_points_to_is_never_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / LOCK).touch()
    inside = tmp_path / f"{PREFIX}abandoned"
    inside.mkdir()
    (inside / LOCK).touch()
    (inside / "device0").symlink_to(precious)
    (tmp_path / f"{PREFIX}link").symlink_to(precious)
    remove_abandoned(tmp_path)
    assert (precious / LOCK).exists()
    assert not inside.exists()


def test_a_folder_that_is_just_being_made_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir()
    (folder / "making").touch()
    assert remove_abandoned(tmp_path) == []
    assert folder.exists()


def test_a_removal_that_was_cut_short_is_taken_up_again(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}half-removed"
    folder.mkdir()
    (folder / "device0").write_text("gradients")
    long_ago = 0
    for path in (folder / "device0", folder):
        os.utime(path, (long_ago, long_ago))
    remove_abandoned(tmp_path)
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


def test_a_parent_that_cannot_be_made() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("/proc not found")
    with (
        pytest.raises(StoreError, match="/proc/nowhere"),
        locked_folder("/proc/nowhere"),
    ):
        pass


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_parent_that_cannot_be_written_to(tmp_path, monkeypatch, error) -> None:
    monkeypatch.setattr(
        disk.tempfile, "mkdtemp", fails_from(0, disk.tempfile.mkdtemp, error)
    )
    with (
        pytest.raises(StoreError, match="store_dir=") as caught,
        locked_folder(tmp_path),
    ):
        pass
    assert os.strerror(error) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission"), locked_folder(tmp_path):
        pass


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks(tmp_path: Path, monkeypatch, error) -> None:
    monkeypatch.setattr(fcntl, "flock", fails_from(0, fcntl.flock, error))
    with contextlib.suppress(StoreError), locked_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    there = free_bytes(tmp_path)
    assert there > 0
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(there, rel=0.05)
    assert free_bytes() > 0


# ------------------------------------------------------------------ whole pruning steps


def loss(params, batch):
    return jnp.mean(jnp.sum(params["w"] * batch, axis=(1, 2)))


def files(parent: Path) -> list[Path]:
    """The gradients that lie there."""
    return list(parent.rglob("device*"))


def step(parent: Path, **options):
    random = np.random.default_rng(1)
    params = {"w": jnp.asarray(random.standard_normal((30, 20)), jnp.float32)}
    samples = random.standard_normal((24, 30, 20)).astype(np.float32)
    before = np.array(params["w"])
    try:
        return wf.prune(
            loss,
            params,
            samples,
            sparsity=0.5,
            block_size=50,
            microbatch_size=8,
            damping=1e-2,
            store="disk",
            store_dir=parent,
            **options,
        )
    finally:
        np.testing.assert_array_equal(params["w"], before)


def test_a_step_leaves_nothing(tmp_path: Path) -> None:
    seen = []
    step(tmp_path, progress=lambda *_: seen.extend(folders(tmp_path)))
    assert seen
    assert not list(tmp_path.iterdir())


def test_a_parent_is_made_if_need_be(tmp_path: Path) -> None:
    step(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_disk_that_fills_up_in_mid_collection(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwrite", fails_from(1, os.pwrite, errno.ENOSPC))
    with pytest.raises(StoreError, match="No space left") as caught:
        step(tmp_path)
    for word in WAYS:
        assert word in str(caught.value)
    assert not files(tmp_path)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        os, "posix_fallocate", fails_from(0, os.posix_fallocate, errno.ENOSPC)
    )
    begun = []
    with pytest.raises(StoreError, match="No space left"):
        step(tmp_path, progress=lambda *call: begun.append(call))
    assert not begun
    assert not files(tmp_path)


def test_a_file_cut_short_between_the_phases(tmp_path: Path) -> None:
    def cut(label: str, done: int, total: int) -> None:
        if label == "update blocks" and done == 0:
            (folder,) = folders(tmp_path)
            os.truncate(folder / "device0", 100)

    with pytest.raises(StoreError, match=r"ends at byte 100 of 57600"):
        step(tmp_path, progress=cut)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
def test_nothing_is_left_after_a_disk_was_full(
    tmp_path: Path, monkeypatch, call
) -> None:
    monkeypatch.setattr(os, call, fails_from(0, getattr(os, call), errno.ENOSPC))
    with pytest.raises(StoreError) as caught:
        step(tmp_path)
    assert not list(tmp_path.iterdir()), caught


# --------------------------------------------------------------------- other processes


def python(code: str, *args: str, **options) -> subprocess.Popen:
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "rows")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


FULL = """
import contextlib, os, resource, sys
from pathlib import Path
import test_disk
from woodfisher_jax import StoreError
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most))
parent = Path(sys.argv[1])
def attempt():
    try:
        test_disk.step(parent)
    except StoreError as error:
        print(error)
attempt()
assert not test_disk.files(parent)
# A disk that sets nothing aside is full only in mid-collection.
os.posix_fallocate = test_disk.fails_from(0, None, test_disk.errno.EOPNOTSUPP)
attempt()
assert not test_disk.files(parent)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    child = python(FULL, str(tmp_path))
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    first, second = out.splitlines()
    assert "cannot be made: File too large" in first
    assert "cannot be written: File too large" in second
    for word in ("5.76e-05 GB", *WAYS):
        assert word in first
        assert word in second


SLOW = """
import sys, time
from pathlib import Path
import test_disk
def progress(label, done, total):
    if label == "gradients" and done >= 16:
        print("half way", flush=True)
        time.sleep(600)
test_disk.step(Path(sys.argv[1]), progress=progress)
"""


def test_a_run_that_is_killed_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    child = python(SLOW, str(tmp_path))
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "half way\n"
        (left,) = folders(tmp_path)
        assert (left / "device0").stat().st_size == 24 * 600 * 4
        # While it lives, nobody touches its files.
        with locked_folder(tmp_path):
            assert (left / "device0").exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (left / "device0").exists()
    finally:
        child.kill()
        child.communicate()
    found = step(tmp_path)
    assert not list(tmp_path.iterdir())
    expected = step(tmp_path / "elsewhere")
    np.testing.assert_array_equal(found[0]["w"], expected[0]["w"])
