"""One device, eight, and two processes of two train alike, stop together and resume.

Devices are simulated on the CPU; spread_training.py runs in a process of its own each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import spread_training
from jax.sharding import Mesh, PartitionSpec

from woodfisher_jax.training import distributed
from woodfisher_jax.training.loop import run
from woodfisher_jax.training.resuming import checkpoint

HERE = Path(__file__).parents[1]
TWO = ("two.0", "two.1")


def start(folder: Path, devices: int, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, str(HERE / "spread_training.py"), str(folder)]
    return subprocess.Popen([*command, *arguments], env=environment)


def start_two(folder: Path, name: str, stop: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [start(folder, 2, name, port, str(rank), "2", stop) for rank in range(2)]


def ended(children: list[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended."""
    try:
        return [child.wait(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def restored(workdir: Path) -> dict[str, Any]:
    """Arrays of the latest checkpoint, on the one device of this process."""
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        target = checkpoint.read_shapes(manager, None)
        return checkpoint.restore(manager, None, target)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of two runs, and what each process has noted."""
    folder = tmp_path_factory.mktemp("runs")
    children = start_two(folder, "two", "5")
    found = {
        "one": {"run": spread_training.run(folder / "one", spread_training.config())}
    }
    assert ended(children) == [0, 0]
    for name in TWO:
        found[name] = json.loads((folder / f"{name}.json").read_text())
        first, rest = found[name]["stopped"], found[name]["run"]
        rest["losses"] = first["losses"] + rest["losses"]
    return folder, found


@pytest.mark.slow
def test_as_many_devices_as_claimed(runs: tuple[Path, dict]) -> None:
    assert [runs[1][name]["run"]["devices"] for name in ("one", *TWO)] == [1, 4, 4]


@pytest.mark.slow
def test_the_loss_curve_does_not_depend_on_the_devices(runs: tuple[Path, dict]) -> None:
    _, found = runs
    expected = found["one"]["run"]["losses"]
    assert len(expected) == spread_training.STEPS
    assert expected[-1] < expected[0] / 2
    for name in TWO:
        np.testing.assert_allclose(
            found[name]["run"]["losses"], expected, atol=1e-4, rtol=0
        )
    assert found["two.0"]["run"]["losses"] == found["two.1"]["run"]["losses"]


def assert_alike(one: Path, other: Path) -> None:
    """Masks identical; weights, statistics and momentum to 1e-4."""
    expected, got = restored(one), restored(other)
    for path, mask in expected["masks"].items():
        assert 0 < mask.mean() < 1
        np.testing.assert_array_equal(got["masks"][path], mask)
    for part in ("params", "batch_stats", "opt_state"):
        assert got[part].keys() == expected[part].keys()
        for path, array in expected[part].items():
            np.testing.assert_allclose(got[part][path], array, atol=1e-4)


@pytest.mark.slow
def test_nor_do_masks_statistics_and_weights(runs: tuple[Path, dict]) -> None:
    folder, _ = runs
    assert_alike(folder / "one", folder / "two")


@pytest.mark.slow
def test_eight_devices_of_one_process_train_alike(runs: tuple[Path, dict]) -> None:
    folder, found = runs
    assert ended([start(folder, 8, "eight")]) == [0]
    eight = json.loads((folder / "eight.0.json").read_text())["run"]
    assert eight["devices"] == 8
    expected = found["one"]["run"]["losses"]
    np.testing.assert_allclose(eight["losses"], expected, atol=1e-4, rtol=0)
    assert_alike(folder / "one", folder / "eight")


@pytest.mark.slow
def test_only_the_first_process_reports(runs: tuple[Path, dict]) -> None:
    folder, _ = runs
    one, two = (
        json.loads((folder / name / "results.json").read_text())
        for name in ("one", "two")
    )
    assert two["sparsity"] == one["sparsity"]
    assert abs(two["final"]["top1"] - one["final"]["top1"]) < 0.5
    # It was started twice, each time by two processes.
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 2
    log = (folder / "two" / "log.txt").read_text()
    assert log.count(f"workdir {folder / 'two'}") == 2


@pytest.mark.slow
def test_all_processes_stop_where_one_is_asked_to(runs: tuple[Path, dict]) -> None:
    _, found = runs
    messages = {found[name]["stopped"]["message"] for name in TWO}
    assert len(messages) == 1
    # Asked after step 5 of 0, 1, ..., told with the next, heard of one later.
    step = next(n for n in range(30) if f"after step {n}," in min(messages))
    assert 6 < step <= 10
    assert all(found[name]["run"]["message"] == "" for name in TWO)


@pytest.mark.slow
def test_processes_that_disagree_all_stop(runs: tuple[Path, dict]) -> None:
    _, found = runs
    first, second = (found[name]["refused"] for name in TWO)
    # Another config.
    assert "process 1 of 2 cannot start" in first[0]
    assert "process 1 differs from process 0" in second[0]
    assert "config.seed is 0 there, 1 here" in second[0]
    # A file that one of them misses.
    assert "process 1 of 2 cannot start" in first[1]
    assert second[1].startswith("FileNotFoundError")
    # A number.
    for messages in (first, second):
        assert messages[2] == (
            "ConfigError: the number; found 7 in process 0, 6 in process 1"
        )
        # The same but for the process's own number.
        assert messages[3] == ""
    # Fewer examples than a batch.
    assert "process 1 of 2 cannot start" in first[4]
    assert "batch_size=64; expected at most the 50" in second[4]
    assert found["two.0"]["first"] == found["two.1"]["first"] == "of 0"


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_resumes(tmp_path: Path) -> None:
    children = start_two(tmp_path, "two", "kill")
    codes = ended(children)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    workdir = tmp_path / "two"
    assert not (workdir / "results.json").exists()
    # The pruning step after step 20 is saved.
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        assert checkpoint.latest_event(manager) == 22
    results = run(spread_training.config(), workdir)
    assert [stage["step"] for stage in results["stages"]] == [20]
    spread_training.run(tmp_path / "one", spread_training.config())
    expected, got = restored(tmp_path / "one"), restored(workdir)
    for path, mask in expected["masks"].items():
        np.testing.assert_array_equal(got["masks"][path], mask)
        np.testing.assert_allclose(
            got["params"][path], expected["params"][path], atol=1e-4
        )


def test_alone_nothing_is_spread() -> None:
    batch = {"image": np.ones((4, 2))}
    assert distributed.all_devices() is None
    assert distributed.spread(batch, None) is batch
    assert distributed.shard() == (0, 1)
    assert distributed.is_first()
    np.testing.assert_array_equal(distributed.per_device(3, None), [3])
    assert distributed.of_first({"a": (1, None)}) == {"a": [1, None]}
    distributed.check_config(spread_training.config())
    distributed.check_equal(3, "the number")


def test_rows_of_a_batch_keep_their_order() -> None:
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    batch = {"image": np.arange(6.0).reshape(3, 2), "label": np.arange(3)}
    spread = distributed.spread(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(spread[name], array)
    assert spread["image"].sharding.spec == PartitionSpec("devices")


def test_a_failure_of_this_process_is_its_own() -> None:
    with pytest.raises(FileNotFoundError):
        distributed.together(Path("nowhere").read_text)


@pytest.mark.slow
def test_a_process_that_does_not_find_the_others_ends() -> None:
    """JAX ends it by itself; what it waited for is in the log."""
    code = (
        "import logging\nlogging.basicConfig(level=logging.INFO)\n"
        "from woodfisher_jax.training import config, distributed\n"
        "section = config.DistributedConfig('localhost:1', 2, 1, 1)\n"
        "distributed.initialize(section)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=120,
    )
    assert done.returncode != 0
    assert "waiting for the other processes at localhost:1, at most 1 s" in done.stderr
