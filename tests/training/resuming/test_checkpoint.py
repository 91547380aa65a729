"""Saves come back as they were, and a broken one is never taken for a good one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.written_files import WriteError


def make_arrays(seed: int = 0, shape: tuple[int, ...] = (5, 4)) -> dict[str, Any]:
    """A small network's state after two momentum steps, halfway pruned."""
    rng = np.random.default_rng(seed)
    params = {
        "conv1": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)},
        "head": {"bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.sgd(optax.constant_schedule(0.1), momentum=0.9),
    )
    opt_state = optimizer.init(params)
    for _ in range(2):
        _, opt_state = optimizer.update(params, opt_state, params)
    return {
        "params": params,
        "batch_stats": {},
        "masks": {"layer1/block0/conv1/kernel": jnp.asarray(rng.random(shape) < 0.5)},
        "opt_state": opt_state,
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(actual: Any, expected: Any) -> None:
    assert abstract(actual) == abstract(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def save(
    manager: ocp.CheckpointManager,
    event: int,
    arrays: dict[str, Any] | None = None,
    stage: int = 0,
    top1: float = 50.0,
    **meta: Any,
) -> None:
    arrays = make_arrays(event) if arrays is None else arrays
    checkpoint.save(manager, event, arrays, meta, {"stage": stage, "top1": top1})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with one save, event 3, of `make_arrays(3)`."""
    with checkpoint.open_manager(tmp_path / "saves") as manager:
        save(manager, 3, epoch=1)
    return tmp_path / "saves"


def test_round_trip_keeps_values_dtypes_and_containers(saved: Path) -> None:
    expected = make_arrays(3)
    with checkpoint.open_manager(saved) as manager:
        for target in (expected, abstract(expected)):
            arrays, meta = checkpoint.restore(manager, 3, target)
            assert_same(arrays, expected)
            assert meta == {"epoch": 1}
    schedule_state = arrays["opt_state"][1][1]
    assert isinstance(schedule_state, optax.ScaleByScheduleState)
    assert int(schedule_state.count) == 2
    assert arrays["masks"].keys() == {"layer1/block0/conv1/kernel"}


def test_numpy_arrays_come_back_as_jax_arrays(tmp_path: Path) -> None:
    with checkpoint.open_manager(tmp_path) as manager:
        tree = {"a": np.arange(3, dtype=np.int32), "step": np.int32(7), "b": None}
        save(manager, 1, {"counters": tree})
        arrays, _ = checkpoint.restore(manager, 1, {"counters": tree})
    assert isinstance(arrays["counters"]["a"], jax.Array)
    assert int(arrays["counters"]["step"]) == 7
    assert arrays["counters"]["b"] is None


def test_restore_takes_the_sharding_of_the_target(saved: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(make_arrays(3)["params"], sharding)
    with checkpoint.open_manager(saved) as manager:
        arrays, _ = checkpoint.restore(manager, None, {"params": params})
    assert all(x.sharding == sharding for x in jax.tree.leaves(arrays))


def test_parts_can_be_restored_alone(saved: Path) -> None:
    expected = make_arrays(3)
    parts = {name: expected[name] for name in ("params", "batch_stats")}
    with checkpoint.open_manager(saved) as manager:
        arrays, _ = checkpoint.restore(manager, None, abstract(parts))
        assert checkpoint.restore(manager, None, {})[1] == {"epoch": 1}
        nothing, _ = checkpoint.restore(manager, None, {"batch_stats": {}})
    assert_same(arrays, parts)
    assert nothing == {"batch_stats": {}}


def test_latest_and_best_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two latest; the best save is of the highest stage, dense accuracy aside."""
    monkeypatch.chdir(tmp_path)
    history = [(0, 99.0), (1, 50.0), (1, 60.0), (2, 40.0), (2, 30.0), (2, 35.0)]
    kept = [[0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4, 5]]
    for event, (stage, top1) in enumerate(history):
        with checkpoint.open_manager("saves") as manager:
            save(manager, event, {"x": jnp.ones(2) * event}, stage, top1)
            assert sorted(manager.all_steps()) == kept[event]
    with checkpoint.open_manager("saves") as manager:
        assert checkpoint.latest_event(manager) == 5
        assert checkpoint.best_event(manager) == 3
        best, _ = checkpoint.restore(manager, 3, {"x": jnp.zeros(2)})
        latest, _ = checkpoint.restore(manager, None, {"x": jnp.zeros(2)})
    assert best["x"][0] == 3
    assert latest["x"][0] == 5


def test_empty_folder(tmp_path: Path) -> None:
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint.latest_event(manager) is None
        assert checkpoint.best_event(manager) is None
        with pytest.raises(ValueError, match="no complete checkpoint"):
            checkpoint.restore(manager, None, {})


@pytest.mark.parametrize("event", [2, 3])
def test_an_event_is_saved_once_and_in_order(saved: Path, event: int) -> None:
    with (
        checkpoint.open_manager(saved) as manager,
        pytest.raises(ValueError, match=f"expected more than 3.*got {event}"),
    ):
        save(manager, event)


def test_a_save_that_orbax_skips_raises(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkpoint.open_manager(saved) as manager:
        monkeypatch.setattr(manager, "save", lambda *args, **kwargs: False)
        with pytest.raises(RuntimeError, match="skipped the save of event 4"):
            save(manager, 4)


def test_unknown_event_lists_the_saves(saved: Path) -> None:
    with (
        checkpoint.open_manager(saved) as manager,
        pytest.raises(ValueError, match=r"no checkpoint 7 in .* one of \[3\]"),
    ):
        checkpoint.restore(manager, 7, {})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"conv1": {"kernel": jnp.zeros((5, 4), jnp.bfloat16)}},
            r"conv1/kernel: saved float32\[5,4\], expected bfloat16\[5,4\]",
        ),
        (
            {"conv1": {"kernel": jnp.zeros((4, 5))}},
            r"conv1/kernel: saved float32\[5,4\], expected float32\[4,5\]",
        ),
        (
            {"conv2": {"kernel": jnp.zeros((5, 4))}},
            r"conv2/kernel: saved nothing, expected float32\[5,4\]",
        ),
        ({}, r"conv1/kernel: saved float32\[5,4\], expected nothing"),
        ({str(i): {"a": jnp.zeros(1)} for i in range(9)}, "and 8 more"),
    ],
)
def test_a_target_that_differs_is_named(saved: Path, params: Any, message: str) -> None:
    with (
        checkpoint.open_manager(saved) as manager,
        pytest.raises(ValueError, match=message),
    ):
        checkpoint.restore(manager, 3, {"params": params})


def test_a_name_that_was_not_saved(saved: Path) -> None:
    with (
        checkpoint.open_manager(saved) as manager,
        pytest.raises(ValueError, match="ema was not saved"),
    ):
        checkpoint.restore(manager, 3, {"ema": {"w": jnp.zeros(2)}})


@pytest.mark.parametrize(
    ("arrays", "metrics", "error", "message"),
    [
        ({"meta": {}}, {}, ValueError, "rename"),
        ({"x": {"step": 3}}, {}, TypeError, "x/step: expected an array"),
        ({"x": np.zeros(2, np.float64)}, {}, TypeError, "float64"),
        ({"x": jax.random.key(0)}, {}, TypeError, "key_data"),
        (
            {"x": {"a/b": np.zeros(1, bool), "a": {"b": np.zeros(1, bool)}}},
            {},
            ValueError,
            "two leaves have the path 'a/b'",
        ),
        ({}, {"top1": float("nan")}, ValueError, "finite"),
        ({}, {"stage": None}, ValueError, "finite"),
    ],
)
def test_what_cannot_be_saved(
    tmp_path: Path, arrays: Any, metrics: Any, error: type[Exception], message: str
) -> None:
    metrics = {"stage": 0, "top1": 1.0} | metrics
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(error, match=message),
    ):
        checkpoint.save(
            manager, 1, arrays, {}, {k: v for k, v in metrics.items() if v is not None}
        )
    assert not (tmp_path / "1").exists()


def test_meta_that_is_not_json(saved: Path) -> None:
    with checkpoint.open_manager(saved) as manager:
        with pytest.raises(TypeError, match=r"meta: .*float32"):
            save(manager, 4, top1_history=[np.float32(1)])
        save(manager, 4, top1_history=[1.0])
        assert checkpoint.restore(manager, 4, {})[1] == {"top1_history": [1.0]}


def test_half_written_save_is_ignored_and_overwritten(saved: Path) -> None:
    partial = saved / "4.orbax-checkpoint-tmp"
    (partial / "params").mkdir(parents=True)
    with checkpoint.open_manager(saved) as manager:
        assert checkpoint.latest_event(manager) == 3
        assert checkpoint.best_event(manager) == 3
        save(manager, 4)
        assert checkpoint.latest_event(manager) == 4
    assert not partial.exists()


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damage_is_named_and_the_save_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    arrays = {"x": jax.random.normal(jax.random.key(0), (100, 100))}
    with checkpoint.open_manager(tmp_path) as manager:
        save(manager, 1, arrays, stage=1)
        save(manager, 2, arrays)
    damage(largest_file(tmp_path / "2" / "x"))
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"2 is damaged.*falls back on an earlier save"),
    ):
        checkpoint.restore(manager, None, arrays)
    (line,) = checkpoint.set_damaged_aside(tmp_path)
    assert f"{tmp_path / '2'} is damaged" in line
    assert line.endswith("2.damaged")
    with checkpoint.open_manager(tmp_path) as manager:
        restored, _ = checkpoint.restore(manager, None, arrays)
        save(manager, 2, arrays)
    assert_same(restored, arrays)
    assert checkpoint.set_damaged_aside(tmp_path) == []


def test_one_flipped_bit_in_any_file_is_found(saved: Path) -> None:
    files = [path for path in (saved / "3").rglob("*") if path.stat().st_size]
    files = [path for path in files if path.is_file()]
    assert {"metadata", "metrics", checkpoint.SUMS} <= {path.name for path in files}
    with checkpoint.open_manager(saved) as manager:
        for path in files:
            flip_a_bit(path)
            with pytest.raises(ValueError, match=r"3 is damaged"):
                checkpoint.restore(manager, None, {})
            flip_a_bit(path)
        assert checkpoint.restore(manager, None, {})[1] == {"epoch": 1}


def test_a_save_under_another_number_is_damaged(saved: Path) -> None:
    (saved / "3").rename(saved / "4")
    assert "SHA256SUMS does not match 3/" in checkpoint.set_damaged_aside(saved)[0]


def test_a_save_without_its_checksums_is_incomplete(saved: Path) -> None:
    (saved / "3" / checkpoint.SUMS).unlink()
    assert "killed while it wrote" in checkpoint.set_damaged_aside(saved)[0]


def test_checksums_are_read_by_the_usual_command(saved: Path) -> None:
    command = ["sha256sum", "--check", "--strict", f"3/{checkpoint.SUMS}"]
    subprocess.run(command, cwd=saved, check=True, capture_output=True)


def test_damaged_metrics_do_not_stop_a_run(saved: Path) -> None:
    truncate(saved / "3" / "metrics" / "metrics")
    with pytest.raises(ValueError, match=r"cannot open the checkpoints in .*saves"):
        checkpoint.open_manager(saved)
    checkpoint.set_damaged_aside(saved)
    with checkpoint.open_manager(saved) as manager:
        assert checkpoint.latest_event(manager) is None


def test_a_full_disk_names_the_folder_and_the_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a page")

    with checkpoint.open_manager(tmp_path) as manager:
        monkeypatch.setattr(manager, "save", full)
        with pytest.raises(
            WriteError, match=rf"{tmp_path}/1 .*No space left.*0\.004 MB"
        ) as caught:
            save(manager, 1, {"x": jnp.zeros(1000)})
    assert "\n" not in str(caught.value)


INTERRUPTED = """
import sys
import jax.numpy as jnp
import numpy as np
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.written_files import WriteError

metrics = {"stage": 0, "top1": 1.0}
with checkpoint.open_manager(sys.argv[1]) as manager:
    checkpoint.save(manager, 1, {"x": jnp.arange(5)}, {"epoch": 1}, metrics)
    big = np.random.default_rng(0).normal(size=48_000_000).astype(np.float32)
    checkpoint.save(manager, 2, {"x": big}, {"epoch": 2}, metrics)
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_a_save_leaves_the_previous_one(tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    while not partial.exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    _, log = child.communicate()
    assert child.returncode == -signal.SIGKILL, log
    assert partial.exists()
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint.latest_event(manager) == 1
        arrays, meta = checkpoint.restore(manager, None, {"x": jnp.zeros(5, int)})
        save(manager, 2)
        assert checkpoint.latest_event(manager) == 2
    np.testing.assert_array_equal(arrays["x"], np.arange(5))
    assert meta == {"epoch": 1}
