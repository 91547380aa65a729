"""The ImageNet runs end to end on generated files: minutes each, so all are slow.

A run is killed after its first pruning step and resumed; its weights are those of a run
that nobody killed, to the bit. Then it is evaluated and exported, and read back.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from woodfisher_jax.evaluate import evaluate_run
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.training.resuming.saved_run import read_run
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

ROOT = Path(__file__).parents[1]
STEPS = 10
"""An epoch of 320 images."""

pytestmark = pytest.mark.slow


def start(config: str, workdir: Path, *overrides: str) -> subprocess.Popen:
    command = ["-m", "woodfisher_jax.main", f"--config=configs/{config}:smoke"]
    return subprocess.Popen(
        [sys.executable, *command, f"--workdir={workdir}", *overrides],
        cwd=ROOT,
    )


def kill_after(child: subprocess.Popen, workdir: Path, event: int) -> None:
    """Kills a run as soon as it has saved an event."""
    while child.poll() is None:
        names = [p.name for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
        if any(int(name) >= event for name in names):
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert child.wait() == -signal.SIGKILL


def restored(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        target = checkpoint.read_shapes(manager, None)
        return checkpoint.restore(manager, None, target)[0]


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ("resnet50.py", "generated_images"),
        ("resnet50.py", "generated_records"),
        ("mobilenet_v1.py", "generated_images"),
        ("vit_small.py", "generated_images"),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, source: str
) -> None:
    # Where the images are written.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = (f"--config.data.name={source}",)
    assert start(config, tmp_path / "whole", *overrides).wait() == 0
    # An epoch, the dense network's accuracy, the first pruning step.
    child = start(config, tmp_path / "cut", *overrides)
    kill_after(child, tmp_path / "cut", STEPS + 2)
    assert not (tmp_path / "cut" / "results.json").exists()
    assert start(config, tmp_path / "cut", *overrides).wait() == 0
    whole, cut = restored(tmp_path / "whole"), restored(tmp_path / "cut")
    for name, arrays in whole.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(cut[name][path], array, f"{name}/{path}")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert len(results["stages"]) == 2
    assert abs(results["sparsity"] - results["target_sparsity"]) < 1e-6
    found = evaluate_run(tmp_path / "cut")
    assert found["top1"] == results["final"]["top1"]
    assert found["nonzero"] == results["nonzero"]
    exported = tmp_path / "exported.safetensors"
    command = ["-m", "woodfisher_jax.torch_weights", str(tmp_path / "cut")]
    subprocess.run(
        [sys.executable, *command, f"--out={exported}"], cwd=ROOT, check=True
    )
    saved = read_run(tmp_path / "cut").variables
    again = leaves_by_path(to_variables(read_state_dict(exported), saved)[0])
    for path, leaf in leaves_by_path(saved).items():
        np.testing.assert_array_equal(again[path], leaf, path)
