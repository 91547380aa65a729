"""The command that evaluates a saved run.

python -m woodfisher_jax.evaluate runs/digits-20260101-120000
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from woodfisher_jax import data, models
from woodfisher_jax.exit_codes import FAILED, USAGE, exits
from woodfisher_jax.progress import live
from woodfisher_jax.report import metrics
from woodfisher_jax.report.elements import tables
from woodfisher_jax.report.elements.quantities import scaled
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.selection import patterns
from woodfisher_jax.training import distributed
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network.objective import axes_of, macs_per_weight
from woodfisher_jax.training.resuming.history import Log
from woodfisher_jax.training.resuming.saved_run import WHICH, read_run
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.paths import leaves_by_path


def evaluate_run(
    workdir: Path,
    which: str = "latest",
    data_dir: str | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """Evaluates the network of a saved run, averaged if the run has averaged it.

    Args:
        workdir: Folder of the run.
        which: "latest" or "best" checkpoint.
        data_dir: Where the data set is, if no longer where the config says.
        pattern: One that the kept weights have to obey, such as "2:4".

    Returns:
        ``top1``, ``top5``, ``loss``, and ``sparsity``, ``nonzero``, ``prunable`` of the
        masks; ``checkpoint``, its number, ``step``, and ``moment``, where the run was,
        in words; ``macs`` and ``layers``, as in the results of a run; ``groups``, how
        many obey the pattern, if one is given.

    Raises:
        ValueError: If the folder holds no run or no checkpoint.
        PatternError: If the weights do not obey the pattern.
    """
    config, variables, masks, meta = read_run(workdir, which)
    log = Log(**meta["log"])
    model = models.build_model(config.model.name, **config.model.settings)
    dataset = data.load(
        config.data.name,
        data_dir=data_dir or config.data.dir,
        options=config.data,
    )
    groups = {}
    if pattern is not None:
        leaves = leaves_by_path(variables["params"])
        weights = {path: leaves[path] for path in masks}
        axes = axes_of(model, variables, dataset.image_shape)
        groups["groups"] = patterns.check(weights, pattern, lambda *_: True, axes)
    mesh = distributed.all_devices()
    params, batch_stats = replicate(
        (variables["params"], variables.get("batch_stats", {})), mesh
    )
    kept, prunable = masks_.count(masks)
    try:
        costs = macs_per_weight(model, variables, dataset.image_shape)
    except ValueError:  # The run has logged the reason.
        costs = None
    size = config.eval_batch_size
    return {
        **evaluate(model, params, batch_stats, dataset, batch_size=size, mesh=mesh),
        "sparsity": (prunable - kept) / prunable,
        "nonzero": kept,
        "prunable": prunable,
        "checkpoint": log.event,
        "step": log.step,
        "moment": log.moment,
        **metrics.macs_record(costs, params, masks),
        **groups,
    }


def cli(arguments: Sequence[str] | None = None) -> None:
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
    add = parser.add_argument
    which_run = parser.add_mutually_exclusive_group(required=True)
    which_run.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="folder of a run, or one of its checkpoints/NUMBER",
    )
    which_run.add_argument("--workdir", type=Path, help="the same by name")
    add(
        "--which",
        choices=list(WHICH),
        default="latest",
        help="which checkpoint; best is chosen on the test split (default: latest)",
    )
    add("--data_dir", help="where the data set is, if it has moved")
    add(
        "--pattern",
        help="also check that the prunable weights obey it: 2:4, 4x1, filters, ...",
    )
    add(
        "--layers",
        action="store_true",
        help="also weights and multiply-accumulates of each layer",
    )
    given = parser.parse_args(arguments)
    codes = {patterns.PatternError: FAILED, ValueError: USAGE, OSError: USAGE}
    run = given.run or given.workdir
    with exits(codes), live(f"evaluating {run}"):
        results = evaluate_run(run, given.which, given.data_dir, given.pattern)
    print(
        f"checkpoint  {results['checkpoint']}: {results['moment']}\n"
        f"top-1       {results['top1']:.2f} %\n"
        f"top-5       {results['top5']:.2f} %\n"
        f"loss        {results['loss']:.4f} nats an image\n"
        f"sparsity    {100 * results['sparsity']:.2f} % "
        f"({results['nonzero']:,} of {results['prunable']:,} prunable weights left)"
    )
    if results["macs"]:
        sparse, dense = (scaled(results["macs"][kind]) for kind in ("sparse", "dense"))
        print(f"MACs        {sparse} of {dense} an image")
    if given.pattern:
        print(f"pattern     {given.pattern} in all {results['groups']:,} groups")
    if given.layers:
        tables.print_layers(results["layers"])


if __name__ == "__main__":
    cli()
