"""Top-1, top-5 and loss over a data set; runnable on a saved run.

python -m woodfisher_jax.evaluate runs/digits-20260101-120000
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from woodfisher_jax import data, models
from woodfisher_jax.data import DataSet
from woodfisher_jax.data.batches import test_batches
from woodfisher_jax.exit_codes import FAILED, USAGE, exits
from woodfisher_jax.report import metrics, tables
from woodfisher_jax.rows.sharding import num_devices, replicate
from woodfisher_jax.selection import patterns
from woodfisher_jax.training import distributed
from woodfisher_jax.training.objective import (
    cross_entropy,
    macs_per_weight,
    predict,
    variables_of,
)
from woodfisher_jax.training.saved_run import read_run
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.paths import leaves_by_path


@functools.partial(jax.jit, static_argnames="model")
def _count(model: nn.Module, variables: Any, batch: dict) -> dict[str, jax.Array]:
    """Weighted sums over one batch."""
    logits = predict(model, variables, batch["image"])
    labels, weight = batch["label"], batch["weight"]
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == labels[:, None]
    return {
        "top1": jnp.sum(weight * hits[:, 0]),
        "top5": jnp.sum(weight * jnp.any(hits, axis=1)),
        "loss": jnp.sum(weight * cross_entropy(logits, labels)),
        "examples": jnp.sum(weight),
    }


def evaluate(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    dataset: DataSet,
    *,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Judges a classifier on the test split, on its running statistics.

    Args:
        model: A Linen classifier.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        dataset: Where the test split is.
        batch_size: Examples a step; it does not change the result. Over devices it is
            rounded up to a multiple of their number.
        mesh: The devices to spread the examples over, which all have the parameters;
            default one.

    Returns:
        ``top1`` and ``top5`` in percent, ``loss`` in nats an example.
    """
    variables = variables_of(params, batch_stats)
    devices = num_devices(mesh)
    size = -(-batch_size // devices) * devices
    sums: list[dict[str, jax.Array]] = []
    for batch in test_batches(dataset, size, distributed.shard()):
        sums.append(_count(model, variables, distributed.spread(batch, mesh)))
        # Reading batches goes on meanwhile, but no more than one ahead.
        jax.block_until_ready(sums[-2:-1])
    total = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    return {
        "top1": 100.0 * total["top1"] / total["examples"],
        "top5": 100.0 * total["top5"] / total["examples"],
        "loss": total["loss"] / total["examples"],
    }


def evaluate_run(
    workdir: Path,
    which: str = "latest",
    data_dir: str | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """Judges the network of a saved run, averaged if the run has averaged it.

    Args:
        workdir: Folder of the run.
        which: "latest" or "best" checkpoint.
        data_dir: Where the data set is, if no longer where the config says.
        pattern: One that the weights left have to obey, such as "2:4".

    Returns:
        ``top1``, ``top5``, ``loss``, and ``sparsity``, ``nonzero``, ``prunable`` of the
        masks; ``step`` of the checkpoint; ``macs`` and ``layers``, as in the results of
        a run; ``groups``, how many obey the pattern, if one is given.

    Raises:
        ValueError: If the folder holds no run or no checkpoint.
        PatternError: If the weights do not obey the pattern.
    """
    config, variables, masks, meta = read_run(workdir, which)
    groups = {}
    if pattern is not None:
        leaves = leaves_by_path(variables["params"])
        weights = {path: leaves[path] for path in masks}
        groups["groups"] = patterns.check(weights, pattern, lambda path, leaf: True)
    model = models.build_model(config.model.name, **config.model.settings)
    dataset = data.load(
        config.data.name,
        data_dir=data_dir or config.data.dir,
        options=config.data.image_options,
    )
    mesh = distributed.all_devices()
    params, batch_stats = replicate(
        (variables["params"], variables.get("batch_stats", {})), mesh
    )
    kept, prunable = masks_.count(masks)
    try:
        costs = macs_per_weight(model, variables, dataset.image_shape)
    except ValueError:  # The run has said why.
        costs = None
    size = config.eval_batch_size
    return {
        **evaluate(model, params, batch_stats, dataset, batch_size=size, mesh=mesh),
        "sparsity": (prunable - kept) / prunable,
        "nonzero": kept,
        "prunable": prunable,
        "step": meta["log"]["step"],
        **metrics.macs_record(costs, params, masks),
        **groups,
    }


def cli() -> None:
    """Entry point of ``python -m woodfisher_jax.evaluate``."""
    parser = argparse.ArgumentParser(
        prog="python -m woodfisher_jax.evaluate",
        description="Prints top-1, top-5, loss and sparsity of a saved run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m woodfisher_jax.evaluate runs/digits
  python -m woodfisher_jax.evaluate runs/digits --which=best --layers
  python -m woodfisher_jax.evaluate runs/resnet20 --pattern=2:4
exit codes: 0 done, 1 weights do not obey the pattern, 2 the command has to be
changed""",
    )
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="folder of a run, or one of its checkpoints/NUMBER",
    )
    run.add_argument("--workdir", type=Path, help="the same by name")
    parser.add_argument(
        "--which",
        choices=["latest", "best"],
        default="latest",
        help="which checkpoint; best is chosen on the test split (default: latest)",
    )
    parser.add_argument("--data_dir", help="where the data set is, if it has moved")
    parser.add_argument(
        "--pattern",
        help="also check that the prunable weights obey it: 2:4, 4x1, filters, ...",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="also weights and multiply-accumulates of each layer",
    )
    arguments = parser.parse_args()
    folder = arguments.run or arguments.workdir
    codes = {patterns.PatternError: FAILED, ValueError: USAGE, OSError: USAGE}
    with exits(codes):
        found = evaluate_run(
            folder, arguments.which, arguments.data_dir, arguments.pattern
        )
    print(
        f"step      {found['step']}\n"
        f"top-1     {found['top1']:.2f} %\n"
        f"top-5     {found['top5']:.2f} %\n"
        f"loss      {found['loss']:.4f} nats an image\n"
        f"sparsity  {100 * found['sparsity']:.2f} % "
        f"({found['nonzero']:,} of {found['prunable']:,} prunable weights left)"
    )
    if found["macs"]:
        sparse, dense = (found["macs"][kind] / 1e6 for kind in ("sparse", "dense"))
        print(f"MACs      {sparse:.4g} of {dense:.4g} million an image")
    if arguments.pattern:
        print(f"pattern   {arguments.pattern} in all {found['groups']:,} groups")
    if arguments.layers:
        tables.print_layers(found["layers"])


if __name__ == "__main__":
    cli()
