"""A folder belongs to one run, once that run has left something in it."""

import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small

from woodfisher_jax.training.config import ConfigError, from_dict, to_dict
from woodfisher_jax.training.resuming.workdir import (
    LOCK,
    check_shared,
    claim_workdir,
    held,
    log_file,
    removed_unless_started,
)


def test_the_config_is_written_and_can_be_read_back(tmp_path: Path) -> None:
    workdir = tmp_path / "a" / "b"
    claim_workdir(workdir, small(seed=3))
    assert from_dict(json.loads((workdir / "config.json").read_text())) == small(seed=3)
    claim_workdir(workdir, small(seed=3))


def test_a_folder_with_files_of_somebody_s_is_none_of_a_run(tmp_path: Path) -> None:
    theirs = tmp_path / "config.json"
    theirs.write_text('{"name": "my app"}')
    with pytest.raises(ConfigError, match=r"no run's, such as 'config\.json'"):
        held(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    theirs.rename(tmp_path / ".hidden")
    for _ in range(2):  # Then it is that of a run that has stopped early.
        with held(tmp_path):
            (tmp_path / "config.json").touch()


def test_a_folder_without_a_checkpoint_is_free(tmp_path: Path) -> None:
    claim_workdir(tmp_path, small(seed=3))
    claim_workdir(tmp_path, small(seed=4))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 4


def test_the_run_of_another_config_is_protected(tmp_path: Path) -> None:
    claim_workdir(tmp_path, small())
    (tmp_path / "checkpoints" / "46").mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError) as caught:
        claim_workdir(tmp_path, small(seed=7, prune__num_samples=60))
    message = str(caught.value)
    assert "config.seed is 0 there, 7 here" in message
    assert "config.prune.num_samples is 50 there, 60 here" in message
    assert "--workdir" in message
    assert (tmp_path / "config.json").read_text() == before
    claim_workdir(tmp_path, small())


def test_where_a_run_is_may_change(tmp_path: Path) -> None:
    claim_workdir(tmp_path, small())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    place = {"coordinator": "host:1", "num_processes": 2, "process_id": 1}
    moved = small(
        distributed=place, compile_cache_dir="x", data={"dir": "y", "workers": 3}
    )
    claim_workdir(tmp_path, moved)
    with pytest.raises(ConfigError, match=r"config\.train\.dtype is 'float32' there"):
        claim_workdir(tmp_path, small(train__dtype="bfloat16"))


def test_a_field_that_is_newer_than_the_run_has_its_default(tmp_path: Path) -> None:
    claim_workdir(tmp_path, small())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["train"]["dtype"], values["distributed"]
    path.write_text(json.dumps(values))
    claim_workdir(tmp_path, small())


def test_a_workdir_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all processes share"):
        check_shared(tmp_path)
    claim_workdir(tmp_path, small())
    check_shared(tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "46").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged.*delete it"):
        claim_workdir(tmp_path, small())


def test_without_its_config_the_saves_say_which_run_it_is(tmp_path: Path) -> None:
    meta = tmp_path / "checkpoints" / "46" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"config": to_dict(small())}))
    with pytest.raises(ConfigError, match=r"config\.seed is 0 there, 1 here"):
        claim_workdir(tmp_path, small(seed=1))
    assert not (tmp_path / "config.json").exists()
    claim_workdir(tmp_path, small())
    assert (tmp_path / "config.json").exists()


HOLDS = """
import sys, time
from pathlib import Path
from woodfisher_jax.training.resuming.workdir import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_left_alone_until_its_process_is_dead(
    tmp_path: Path,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        words = rf"in use by process {child.pid} on {socket.gethostname()} since 20"
        for _ in range(2):  # The holder's line stays.
            with pytest.raises(ConfigError, match=words), held(tmp_path):
                pass
    finally:
        child.kill()
        child.communicate()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_disk_without_locks_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with held(tmp_path):
        assert "nothing keeps a second run out" in caplog.text


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"workdir=.*file/run cannot be used"
    ) as found:
        claim_workdir(tmp_path / "file" / "run", small())
    assert "(Not a directory: " in str(found.value)
    assert "choose with --workdir a folder that can be written" in str(found.value)
    assert "Errno" not in str(found.value)


def test_the_log_is_kept(tmp_path: Path) -> None:
    with log_file(tmp_path):
        logging.getLogger("woodfisher_jax.train").info("pruned to %.2f", 0.5)
    logging.getLogger("woodfisher_jax.train").info("later")
    assert (tmp_path / "log.txt").read_text().endswith(" pruned to 0.50\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_a_new_folder_is_removed_after_an_error_before_the_start(
    tmp_path: Path, error: type[BaseException]
) -> None:
    folder = tmp_path / "runs" / "run"

    def run(made: list[Path], starts: bool) -> None:
        with held(folder), removed_unless_started(made) as started:
            if starts:
                started()
            raise error

    for made, starts in (([folder], True), ([], False)):
        with pytest.raises(error):
            run(made, starts)
        assert (folder / LOCK).exists()
    other = tmp_path / "runs" / "other"
    other.mkdir()
    for there in (True, False):
        with pytest.raises(error):
            run([folder, tmp_path / "runs"], False)
        assert not folder.exists()
        assert (tmp_path / "runs").exists() == there
        if there:
            other.rmdir()
