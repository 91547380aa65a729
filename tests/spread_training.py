"""Trains and prunes a small network and saves the outcome; run by test_distributed.py.

    python spread_training.py FOLDER NAME [PORT RANK PROCESSES [STOP]]

With STOP, process 1 is asked to stop after that step, and the run resumed; as ``kill``,
it is killed after the last one instead.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax import data, models
from woodfisher_jax.progress import silent
from woodfisher_jax.training import distributed, start
from woodfisher_jax.training import loop as train
from woodfisher_jax.training.config import Config, ConfigError, from_dict
from woodfisher_jax.training.resuming.preemption import Stopped


class Net(nn.Module):
    """A convolution with batch norm and a dense layer."""

    num_classes: int = 10
    dtype: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits."""
        conv = nn.Conv(4, (3, 3), (2, 2), use_bias=False, dtype=self.dtype, name="conv")
        norm = nn.BatchNorm(not train, dtype=self.dtype, name="bn")
        features = nn.relu(norm(conv(images)))
        return nn.Dense(self.num_classes, name="fc")(features.reshape(len(images), -1))


models.MODELS["net"] = Net
BATCH_SIZE, STEPS = 64, 22
"""Of an epoch of the 1,437 digits."""


def config(**values: Any) -> Config:
    """One epoch with a pruning step after 20 of its 22 steps."""
    return from_dict(
        {
            "model": {"name": "net"},
            "train": {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": 0.05},
            "prune": {
                "target_sparsity": 0.8,
                "unit": "steps",
                "end": 20,
                "frequency": 20,
                "num_samples": 48,
                "block_size": 50,
                "batch_norm_samples": 50,
            },
            **values,
        }
    )


def run(workdir: Path, given: Config, stop: str = "") -> dict[str, Any]:
    """A run; its losses step by step, and where it stopped, if it did."""
    losses: list[float] = []
    finish_step = train.finish_step

    def noting(step: int, metrics: Any, log: Any) -> bool:
        losses.append(float(metrics.loss))
        if stop and jax.process_index() == 1:
            if stop == "kill" and step == STEPS - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            elif stop == str(step):
                os.kill(os.getpid(), signal.SIGTERM)
        return finish_step(step, metrics, log)

    train.finish_step = noting
    message = ""
    try:
        train.run(given, workdir)
    except Stopped as stopped:
        message = str(stopped)
    finally:
        train.finish_step = finish_step
    return {"losses": losses, "message": message, "devices": jax.device_count()}


def refused(function: Any, *arguments: Any) -> str:
    """The message of what cannot be done."""
    try:
        function(*arguments)
    except (ConfigError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read(name: str) -> None:
    """Reads a file that is not there, but in process 1 only."""
    if jax.process_index() == 1:
        Path(name).read_text()


def prepare_few(given: Config) -> None:
    """Lays a run out, with too few examples in process 1."""
    load = data.load

    def few(*arguments: Any, **options: Any) -> data.DataSet:
        found = load(*arguments, **options)
        images, labels = found.train
        rest = 50 if jax.process_index() == 1 else len(labels)
        return found._replace(train=data.Split(images[:rest], labels[:rest]))

    data.load = few
    try:
        start.prepare(given, silent)
    finally:
        data.load = load


def main() -> None:
    """Runs, and notes what this process has seen."""
    folder, name, *rest = sys.argv[1:]
    values = {}
    if rest:
        keys = ("num_processes", "process_id", "heartbeat_timeout_seconds")
        numbers = (int(rest[2]), int(rest[1]), 10)
        place = {"coordinator": f"127.0.0.1:{rest[0]}"}
        values["distributed"] = place | dict(zip(keys, numbers, strict=True))
    given = config(**values)
    distributed.initialize(given.distributed)
    stop = rest[3] if len(rest) > 3 else ""
    workdir = Path(folder) / name
    found: dict[str, Any] = {}
    if stop:
        found["stopped"] = run(workdir, given, stop)
    found["run"] = run(workdir, given)
    if rest:
        other = config(seed=distributed.shard()[0])
        found["refused"] = [
            refused(distributed.check_config, other),
            refused(distributed.together, read, "nowhere"),
            refused(distributed.check_equal, 7 - jax.process_index(), "the number"),
            refused(distributed.check_config, given),
            refused(distributed.together, prepare_few, given),
        ]
        found["first"] = distributed.of_first(f"of {jax.process_index()}")
    rank = rest[1] if rest else "0"
    (Path(folder) / f"{name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
