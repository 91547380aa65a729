"""One-shot accuracy against sparsity on the original's two checkpoints.

    python scripts/one_shot.py mlp --checkpoint=mnist_25_epoch_93.97.ckpt
    python scripts/one_shot.py resnet20 --checkpoint=resnet20_cifar10.pth.tar

Prunes the dense network once to each sparsity, by each method and seed, and judges it
on the test split with the batch-norm statistics of the checkpoint. Prints a Markdown
table of mean and standard deviation of top-1 in percent; ``--out`` also keeps every
single run as a line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import woodfisher_jax as wf
from woodfisher_jax import data, models, report, torch_weights
from woodfisher_jax.data import batches
from woodfisher_jax.evaluate import evaluate
from woodfisher_jax.objective import frozen_loss
from woodfisher_jax.pruning.gradients import gradient_chunks
from woodfisher_jax.pruning.masks import num_kept
from woodfisher_jax.pruning.obs import obd_saliency


class Experiment(NamedTuple):
    """A network, and what is done to it.

    Attributes:
        model: Name of the model.
        dataset: Name of the data set.
        prunable: Regular expression on parameter paths.
        sparsities: Targets, each reached in one step from the dense network.
        methods: Name in the table -> arguments of ``wf.prune``.
        num_seeds: Seeds 0, 1, ... of the Fisher samples.
    """

    model: str
    dataset: str
    prunable: str | None
    sparsities: tuple[float, ...]
    methods: dict[str, dict[str, Any]]
    num_seeds: int


EXPERIMENTS = {
    "mlp": Experiment(
        "mlp",
        "mnist",
        None,
        (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
        {
            "globalmagni": {"method": "globalmagni"},
            "woodfisher, N = 1,000": {"method": "woodfisher", "num_samples": 1000},
            "woodfisherblock, N = 100": {
                "method": "woodfisherblock",
                "num_samples": 100,
            },
            "woodfisherblock, N = 1,000": {
                "method": "woodfisherblock",
                "num_samples": 1000,
            },
            "diagfisher, global": {"method": "diagfisher", "num_samples": 4096},
            "diagfisher, layer": {
                "method": "diagfisher",
                "num_samples": 4096,
                "scope": "layer",
            },
            "diagfisher, layer, as the original computes it": {"num_samples": 4096},
        },
        5,
    ),
    "resnet20": Experiment(
        "resnet20",
        "cifar10",
        r"layer\d/block\d+/conv\d/kernel",
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        {
            "globalmagni": {"method": "globalmagni"},
            "woodfisherblock, N = 1,000": {
                "method": "woodfisherblock",
                "num_samples": 1000,
            },
        },
        3,
    ),
    "mlp_bfloat16": Experiment(
        "mlp",
        "mnist",
        None,
        (0.8, 0.9, 0.95, 0.98),
        {
            f"{method}, N = {number:,}, {dtype}": {
                "method": method,
                "num_samples": number,
                "store_dtype": dtype,
            }
            for method, number in (("woodfisher", 100), ("woodfisherblock", 100))
            for dtype in ("float32", "bfloat16")
        },
        5,
    ),
}


def original_diagonal(
    loss_fn: Callable, params: Any, samples: Any, *, sparsity: float, num_samples: int
) -> Any:
    """The original's layer-wise diagonal pruner with its offset of 1e-4 in float32.

    The saliency ``(F w² / 2 + 1e-4)`` has few distinct values above the offset, and a
    strict comparison with the k-th largest removes all ties.
    """
    masks = wf.init_masks(params)
    squares = {path: jnp.zeros(mask.shape) for path, mask in masks.items()}
    for chunk in gradient_chunks(
        loss_fn, params, masks, samples, num_samples=num_samples
    ):
        squares = {p: squares[p] + jnp.sum(g * g, axis=0) for p, g in chunk.items()}
    for path, total in squares.items():
        weights = params[path.split("/")[0]]["kernel"]
        scores = np.asarray(obd_saliency(weights, total / num_samples) + 1e-4)
        kept = num_kept(scores.size, sparsity)
        masks[path] = jnp.asarray(scores > np.sort(scores.ravel())[-kept])
    return wf.apply_masks(params, masks)


def runs(experiment: Experiment, checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Yields a record of each run."""
    model = models.build_model(experiment.model)
    dataset = data.load(experiment.dataset)
    image = np.zeros((1, *dataset.train.images.shape[1:]), np.float32)
    variables, _ = torch_weights.to_variables(
        torch_weights.read_state_dict(checkpoint),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    params = jax.tree.map(jnp.asarray, variables["params"])
    stats = jax.tree.map(jnp.asarray, variables.get("batch_stats", {}))
    loss_fn = frozen_loss(model, stats)
    yield {"method": "dense", **evaluate(model, params, stats, dataset)}
    for name, arguments in experiment.methods.items():
        num_samples = arguments.get("num_samples", 0)
        for seed in range(experiment.num_seeds if num_samples else 1):
            samples = batches.fisher_samples(
                dataset, seed=seed, draw=0, count=max(1, num_samples)
            )
            for sparsity in experiment.sparsities:
                start = time.perf_counter()
                if "method" in arguments:
                    pruned, _, _ = wf.prune(
                        loss_fn,
                        params,
                        samples,
                        sparsity=sparsity,
                        prunable=experiment.prunable,
                        damping=1e-5,
                        **arguments,
                    )
                else:
                    pruned = original_diagonal(
                        loss_fn, params, samples, sparsity=sparsity, **arguments
                    )
                jax.block_until_ready(pruned)
                seconds = time.perf_counter() - start
                yield {
                    "method": name,
                    "seed": seed,
                    "sparsity": sparsity,
                    **evaluate(model, pruned, stats, dataset),
                    "seconds": seconds,
                }


def table(records: list[dict[str, Any]], sparsities: tuple[float, ...]) -> str:
    """A Markdown table: a row a method, a column a sparsity, top-1 mean ± deviation."""
    lines = [
        "| method | " + " | ".join(f"{s:g}" for s in sparsities) + " | s a step |",
        "|---" * (len(sparsities) + 2) + "|",
    ]
    for name in dict.fromkeys(r["method"] for r in records if "sparsity" in r):
        mine = [r for r in records if r["method"] == name]
        cells = []
        for sparsity in sparsities:
            values = [r["top1"] for r in mine if r["sparsity"] == sparsity]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        typical = statistics.median(r["seconds"] for r in mine)
        lines.append(f"| {name} | {' | '.join(cells)} | {typical:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs one experiment and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="file for one JSON line a run")
    arguments = parser.parse_args()
    experiment = EXPERIMENTS[arguments.experiment]
    records = []
    for record in runs(experiment, arguments.checkpoint):
        records.append(record)
        print(json.dumps(record), flush=True)
        if arguments.out:
            lines = "".join(json.dumps(r) + "\n" for r in records)
            arguments.out.write_text(lines)
    print(f"\ndense: {records[0]['top1']:.2f}\n")
    print(table(records, experiment.sparsities))
    print(f"\npeak memory {report.peak_rss_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
