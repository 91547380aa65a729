"""One whole pruning step of an ImageNet-class network, phase by phase.

    python scripts/bench_imagenet.py --model=resnet50 --num-samples=400 \
        --block-size=2000 --memory-limit-gb=10

Random weights and 224 x 224 images: a step costs the same whatever they are. Prints
the plan, then seconds, arithmetic and share of this machine's float32 matrix rate for
each phase, and predicted against measured peak memory, as a table and a line of JSON.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_pruning import processor
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import woodfisher_jax as wf
from woodfisher_jax import models
from woodfisher_jax.equations.precision import matmul
from woodfisher_jax.progress import lines
from woodfisher_jax.report import environment, metrics
from woodfisher_jax.report.elements import tables
from woodfisher_jax.training.network.objective import frozen_loss


def matrix_rate(size: int = 4096, repeats: int = 5) -> float:
    """Floating-point operations a second of a float32 matrix product."""
    ones = jnp.ones((size, size), jnp.float32)
    product = jax.jit(matmul)
    jax.block_until_ready(product(ones, ones))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(ones, ones))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def network(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A loss and random weights, scaled so that activations stay of order one."""
    model = models.build_model(name)
    image = np.zeros((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    random = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if leaf.ndim < 2:
            return np.zeros(leaf.shape, np.float32)
        deviation = np.sqrt(1 / np.prod(leaf.shape[:-1]))
        values = random.standard_normal(leaf.shape, np.float32)
        return values * np.float32(deviation)

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    params = jax.tree.map(jnp.asarray, variables["params"])
    return frozen_loss(model, variables["batch_stats"]), params


def examples(number: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches of random images and labels, one image a batch."""
    random = np.random.default_rng(seed)
    return [
        {
            "image": random.standard_normal((1, 224, 224, 3), np.float32),
            "label": random.integers(0, 1000, 1),
        }
        for _ in range(number)
    ]


def main() -> None:
    """Runs one step and prints what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--block-size", type=int, default=2000)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--memory-limit-gb", type=float)
    parser.add_argument("--microbatch-size", type=int)
    parser.add_argument("--store", default="auto")
    parser.add_argument("--store-dtype", default="float32")
    parser.add_argument("--store-dir")
    parser.add_argument("--warm", action="store_true", help="time a second step")
    parser.add_argument("--all-devices", action="store_true")
    arguments = parser.parse_args()

    rate = matrix_rate()
    loss_fn, params = network(arguments.model)
    samples = examples(arguments.num_samples)
    limit = arguments.memory_limit_gb
    devices = np.asarray(jax.devices())
    options = {
        "sparsity": arguments.sparsity,
        "method": "woodfisherblock",
        "num_samples": arguments.num_samples,
        "block_size": arguments.block_size,
        "microbatch_size": arguments.microbatch_size,
        "store": arguments.store,
        "store_dtype": arguments.store_dtype,
        "store_dir": arguments.store_dir,
        "memory_limit": None if limit is None else limit * 1e9,
        "mesh": Mesh(devices, ("devices",)) if arguments.all_devices else None,
    }
    needs = wf.plan_pruning(loss_fn, params, samples, **options)
    assert needs is not None
    tables.print_needs(needs)
    for _ in range(1 + arguments.warm):
        start = time.perf_counter()
        _, _, info = wf.prune(loss_fn, params, samples, progress=lines(), **options)
        total = time.perf_counter() - start
    show(arguments, info, rate, total)


def show(
    arguments: argparse.Namespace, info: wf.PruneInfo, rate: float, total: float
) -> None:
    """Prints the table and the line of JSON."""
    needs = info.needs
    assert needs is not None
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", environment.peak_rss_bytes())
    seconds = [info.seconds_gradients, info.seconds_curvature, info.seconds_update]
    table = Table(
        title=f"{arguments.model}, {needs.num_weights:,} weights, "
        f"N = {needs.num_samples}, c = {arguments.block_size}, {processor()}, "
        f"{jax.devices()[0].device_kind}"
    )
    for heading in ("phase", "seconds", "TFLOP", "GFLOP/s", "% of matrix rate"):
        table.add_column(heading, justify="right" if heading != "phase" else "left")
    for phase, spent in zip(needs.phases, seconds, strict=True):
        table.add_row(
            phase.name,
            f"{spent:.1f}",
            f"{phase.flops / 1e12:.3g}",
            f"{phase.flops / spent / 1e9:.1f}",
            f"{100 * phase.flops / spent / rate:.0f}",
        )
    Console().print(table)
    print(
        f"whole step {total:.0f} s; matrix rate {rate / 1e9:.0f} GFLOP/s; "
        f"peak memory {peak / 1e9:.2f} GB, predicted {needs.peak_bytes / 1e9:.2f} GB"
    )
    result = {
        "benchmark": "pruning_step",
        "model": arguments.model,
        "processor": processor(),
        "device": jax.devices()[0].device_kind,
        "seconds": total,
        "seconds_by_phase": seconds,
        "flops_by_phase": [phase.flops for phase in needs.phases],
        "matrix_rate": rate,
        "peak_bytes": peak,
        "sparsity": info.sparsity,
        **metrics.needs_record(needs),
        **environment.environment(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
