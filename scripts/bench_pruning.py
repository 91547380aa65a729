"""One pruning step of the MLP against plain PyTorch and the sequential recursion.

    python scripts/bench_pruning.py --checkpoint=mnist_25_epoch_93.97.ckpt

Whole-layer blocks (31,360, 800 and 200 weights), N = 100 gradients of MNIST examples,
damping 1e-5, to 95 % in global scope. The recursion is the original's algorithm in
plain NumPy on the same gradients in the same process: one dense inverse a layer (3.9 GB
for the first), updated by one gradient at a time. `torch_step.py` is what one would
write in PyTorch; where that is installed the two take turns. Medians of wall time and
of processor time. Prints a table and a line of JSON.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import woodfisher_jax as wf
from woodfisher_jax import data, models
from woodfisher_jax.data import batches
from woodfisher_jax.report import environment
from woodfisher_jax.report.environment import processor
from woodfisher_jax.training.network.objective import frozen_loss
from woodfisher_jax.trees import blocks
from woodfisher_jax.weights.state_dicts import to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

NUM_SAMPLES, DAMPING, SPARSITY, REPEATS = 100, 1e-5, 0.95, 5
ROWS_AT_ONCE = 512


def sequential_inverse(gradients: np.ndarray, damping: float) -> np.ndarray:
    """The paper's recursion, one gradient at a time, float32, in place."""
    num_samples, width = gradients.shape
    inverse = np.zeros((width, width), np.float32)
    np.fill_diagonal(inverse, 1 / damping)
    for g in gradients:
        v = inverse @ g
        v /= np.sqrt(num_samples + g @ v)
        for start in range(0, width, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            inverse[rows] -= np.outer(v[rows], v)
    return inverse


def sequential_step(
    gradients: list[np.ndarray], weights: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Diagonals and updated weights by the recursion, layer after layer.

    All three inverses are kept until the global mask is known, as in the original.
    """
    inverses = [sequential_inverse(g, DAMPING) for g in gradients]
    diagonals = [np.diagonal(inverse).copy() for inverse in inverses]
    scores = np.concatenate([w**2 / d for w, d in zip(weights, diagonals, strict=True)])
    kept = round(len(scores) * (1 - SPARSITY))
    threshold = np.sort(scores)[-kept]
    updated = []
    for w, d, inverse in zip(weights, diagonals, inverses, strict=True):
        goes = w**2 / d < threshold
        updated.append((w - inverse @ np.where(goes, w / d, 0)) * ~goes)
    return diagonals, updated


def exact_step(
    gradients: np.ndarray, weights: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """diag(F⁻¹) and updated weights in float64, by the sample-space form."""
    g = gradients.astype(np.float64)
    inner = NUM_SAMPLES * DAMPING * np.eye(NUM_SAMPLES) + g @ g.T
    diagonal = (1 - np.einsum("nc,nc->c", g, np.linalg.solve(inner, g))) / DAMPING
    b = np.where(kept, 0, -weights / diagonal)
    step = (b - g.T @ np.linalg.solve(inner, g @ b)) / DAMPING
    return diagonal, np.where(kept, weights + step, 0)


def worst(found: list[Any], expected: list[Any]) -> float:
    """Largest relative difference."""
    return max(
        float(np.max(np.abs(np.asarray(a, np.float64) / b - 1)))
        for a, b in zip(found, expected, strict=True)
    )


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def in_torch(params: Any, samples: Any) -> Callable[[], Any] | None:
    """The step in PyTorch, if that is there."""
    if importlib.util.find_spec("torch") is None:
        return None
    from torch_step import TorchStep

    names = ("fc1", "fc2", "fc3")
    step = TorchStep([np.asarray(params[name]["kernel"]).T for name in names])
    images = np.asarray(samples["image"], np.float32)
    labels = np.asarray(samples["label"], np.int64)
    return lambda: step(images, labels, DAMPING, SPARSITY)


def main() -> None:
    """Runs all and prints the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    arguments = parser.parse_args()

    model = models.build_model("mlp")
    dataset = data.load("mnist")
    image = np.zeros((1, 28, 28, 1), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    state_dict = read_state_dict(arguments.checkpoint)
    params = to_variables(state_dict, shapes)[0]["params"]
    params = jax.tree.map(jnp.asarray, params)
    samples = batches.fisher_samples(dataset, seed=0, draw=0, count=NUM_SAMPLES)
    loss_fn = frozen_loss(model, {})

    options: dict[str, Any] = {
        "method": "woodfisherblock",
        "damping": DAMPING,
        "sparsity": SPARSITY,
    }

    def step() -> Any:
        return jax.block_until_ready(wf.prune(loss_fn, params, samples, **options)[:2])

    plain = in_torch(params, samples)
    seconds, in_turn = [], []
    for _ in range(1 + REPEATS):
        seconds.append(timed(step))
        in_turn.append(timed(plain) if plain else (np.nan, np.nan))
    (cold, cold_cpu), (warm, warm_cpu) = seconds[0], np.median(seconds[1:], axis=0)
    (torch_cold, _), (torch_warm, torch_cpu) = (
        in_turn[0],
        np.median(in_turn[1:], axis=0),
    )
    pruned, masks = step()
    peak = environment.peak_rss_bytes()

    order = blocks.flat_order(masks)
    rows = wf.gradient_rows(loss_fn, params, wf.init_masks(params), samples, order)
    cuts = order.offsets[1:-1]
    gradients = np.split(np.asarray(rows), cuts, axis=1)
    ours = [
        wf.curvature.inverse_diagonals(
            jnp.asarray(g)[None], DAMPING, "sample_space", [""]
        )
        for g in gradients
    ]
    kernels = {path: params[path.split("/")[0]]["kernel"] for path in order.paths}
    weights = np.split(np.asarray(blocks.flatten(order, kernels)), cuts)
    kept = np.split(np.asarray(blocks.flatten(order, masks)), cuts)
    exact = [exact_step(*layer) for layer in zip(gradients, weights, kept, strict=True)]
    start = time.perf_counter()
    diagonals, updated = sequential_step(gradients, weights)
    sequential = time.perf_counter() - start

    kernels = {path: pruned[path.split("/")[0]]["kernel"] for path in order.paths}
    after = np.asarray(blocks.flatten(order, kernels))
    reference = np.concatenate(updated)
    truth = np.concatenate([step for _, step in exact])
    largest = np.max(np.abs(truth))
    result = {
        "benchmark": "mlp_pruning_step",
        "processor": processor(),
        "seconds_cold": cold,
        "seconds_warm": warm,
        "cpu_seconds_cold": cold_cpu,
        "cpu_seconds_warm": warm_cpu,
        "seconds_torch_cold": torch_cold,
        "seconds_torch_warm": torch_warm,
        "cpu_seconds_torch_warm": torch_cpu,
        "seconds_sequential": sequential,
        "speedup_warm": sequential / warm,
        "diagonal_error": worst([o[0] for o in ours], [d for d, _ in exact]),
        "diagonal_error_sequential": worst(diagonals, [d for d, _ in exact]),
        "masks_differ": int(np.sum((after != 0) != (reference != 0))),
        "weights_error": float(np.max(np.abs(after - truth)) / largest),
        "weights_error_sequential": float(np.max(np.abs(reference - truth)) / largest),
        "peak_rss_bytes": peak,
        **environment.environment(),
    }
    table = Table(title=f"MLP, N = {NUM_SAMPLES}, whole layers, {processor()}")
    table.add_column("")
    table.add_column("sequential rank-1", justify="right")
    table.add_column("PyTorch", justify="right")
    table.add_column("woodfisher_jax", justify="right")
    table.add_row("seconds, first call", "", f"{torch_cold:.2f}", f"{cold:.2f}")
    table.add_row(
        "seconds, warm", f"{sequential:.1f}", f"{torch_warm:.3f}", f"{warm:.3f}"
    )
    table.add_row("processor seconds", "", f"{torch_cpu:.3f}", f"{warm_cpu:.3f}")
    table.add_row(
        "faster by", "1", f"{sequential / torch_warm:.0f}", f"{sequential / warm:.0f}"
    )
    table.add_row(
        "diagonal, largest relative error",
        f"{result['diagonal_error_sequential']:.1e}",
        "",
        f"{result['diagonal_error']:.1e}",
    )
    table.add_row(
        "updated weights, largest error / largest weight",
        f"{result['weights_error_sequential']:.1e}",
        "",
        f"{result['weights_error']:.1e}",
    )
    table.add_row("masks differ in", "", "", f"{result['masks_differ']} weights")
    table.add_row("peak memory", "", "", f"{peak / 1e9:.2f} GB")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
