"""What the first calls of a process compile and take, and the later ones.

    python scripts/first_calls.py [CHECKOUT ...]

For this checkout, or for several in turn (an older version beside it): each call in a
process of its own, without a cache of compiled programs. Processor seconds of the first
call and the median of four later ones, and XLA programs of the first, on a network of
784-40-20-10 and 100 examples.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CALLS = {
    "prune, whole layers": 'wf.prune(*given, sparsity=0.9, method="woodfisherblock")',
    "prune, defaults": "wf.prune(*given, sparsity=0.9)",
    "prune, woodtaylor": 'wf.prune(*given, sparsity=0.9, method="woodtaylor", '
    'update="joint", damping="auto")',
    "prune_outputs": "wf.prune_outputs(net, params, batch[0], sparsity=0.9)",
}

MEASURED = """
import statistics, time
import jax, jax.monitoring, jax.numpy as jnp, numpy as np
import woodfisher_jax as wf

programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: programs.append(name)
    if name.endswith("backend_compile_duration") else None)

def net(params, x):
    for i in range(3):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        x = jax.nn.relu(x) if i < 2 else x
    return x

def loss(params, batch):
    logs = jax.nn.log_softmax(net(params, batch[0]))
    return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], 1))

random, params = np.random.default_rng(0), {}
for i, shape in enumerate([(784, 40), (40, 20), (20, 10)]):
    scale = shape[0] ** -0.5
    params[f"w{i}"] = np.float32(scale * random.normal(size=shape))
    params[f"b{i}"] = np.zeros(shape[1], np.float32)
batch = np.float32(random.normal(size=(100, 784))), random.integers(0, 10, 100)
params = jax.device_put(params)
given = loss, params, batch

def timed():
    start = time.process_time()
    jax.block_until_ready(CALL[0])
    return time.process_time() - start

first = timed()
number = len(programs)
print(number, first, statistics.median(timed() for _ in range(4)))
"""


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("checkouts", type=Path, nargs="*", default=[here])
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    table = Table("call", "checkout", "programs", "first, s", "later, s")
    for name, call in CALLS.items():
        for checkout in parser.parse_args().checkouts:
            done = subprocess.run(
                [sys.executable, "-c", MEASURED.replace("CALL", call)],
                capture_output=True,
                text=True,
                env=environment | {"PYTHONPATH": str(checkout.resolve())},
                cwd=checkout,
                check=True,
            )
            number, first, later = done.stdout.split()
            table.add_row(
                name,
                checkout.name,
                number,
                f"{float(first):.1f}",
                f"{float(later):.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
