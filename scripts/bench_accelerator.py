"""All that is to be known of one accelerator, in one command of at most 8 minutes.

    python scripts/bench_accelerator.py

Prints the rate of float32 matrix products; a pruning step of ResNet-50 (c = 2,000,
N = 400) in seconds, share of that rate and peak memory for each phase, cold and warm;
and training images a second in float32 and bfloat16. Each as a table and a line of
JSON. ``--tiny`` runs the same on small sizes, on any machine.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import models
from woodfisher_jax.report.environment import environment
from woodfisher_jax.training.network import optimizer
from woodfisher_jax.training.network.train_step import TrainState, train_step

STEP = Path(__file__).parent / "bench_imagenet.py"


def images_a_second(
    name: str, side: int, batch_size: int, dtype: str, steps: int
) -> float:
    """Images a second of training steps on one device, the batch being there."""
    model = models.build_model(name).clone(dtype=dtype)
    random = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(
            random.standard_normal((batch_size, side, side, 3), np.float32)
        ),
        "label": jnp.asarray(random.integers(0, 10, batch_size)),
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])
    tx = optimizer.make_optimizer("sgd", lambda step: 0.01, 1e-4)
    params = variables["params"]
    state = TrainState(params, variables["batch_stats"], {}, tx.init(params))

    def several(state: TrainState, number: int) -> TrainState:
        for _ in range(number):
            state, _ = train_step(
                state, batch, jnp.zeros(1), model=model, tx=tx, label_smoothing=0.1
            )
        return jax.block_until_ready(state)

    state = several(state, 2)  # compiles, and warms up
    start = time.perf_counter()
    several(state, steps)
    return batch_size * steps / (time.perf_counter() - start)


def main() -> None:
    """Measures the pruning step in a process of its own, then training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, no result")
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    sizes = ["--model=resnet50", "--num-samples=400", "--block-size=2000", "--warm"]
    name, side, batch_size, steps = "resnet50", 224, arguments.batch_size, 20
    if arguments.tiny:
        sizes = ["--model=mobilenet_v1", "--num-samples=4", "--block-size=500"]
        name, side, batch_size, steps = "resnet20", 32, 2, 1
    # A process that has ended has given its memory back.
    done = subprocess.run([sys.executable, str(STEP), *sizes], timeout=400, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    for dtype in ("float32", "bfloat16"):
        rate = images_a_second(name, side, batch_size, dtype, steps)
        device = jax.devices()[0]
        print(f"training {name}, batch {batch_size}, {dtype}: {rate:.0f} images/s")
        result = {
            "benchmark": "training",
            "model": name,
            "dtype": dtype,
            "batch_size": batch_size,
            "images_per_second": rate,
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            **environment(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
