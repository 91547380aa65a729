"""One-shot accuracy against sparsity on the original's two checkpoints.

    python scripts/one_shot.py mlp --checkpoint=mnist_25_epoch_93.97.ckpt
    python scripts/one_shot.py resnet20 --checkpoint=resnet20_cifar10.pth.tar

Prunes the dense network once to each sparsity, by each method and seed, and judges it
on the test split with the batch-norm statistics of the checkpoint, or also with
re-estimated ones. Each method runs in a process of its own, so that its peak memory is
its own. Prints a Markdown table of mean and standard deviation of top-1 in percent;
``--out`` also keeps every single run as a line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from structures import NETWORKS

import woodfisher_jax as wf
from woodfisher_jax import data
from woodfisher_jax.data import batches
from woodfisher_jax.equations.obs import obd_saliency
from woodfisher_jax.methods import applicable
from woodfisher_jax.report import environment
from woodfisher_jax.rows.gradients import as_partial, row_chunks
from woodfisher_jax.rows.moments import moments
from woodfisher_jax.stages.matching import outputs_of
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network.batch_norm import reestimate
from woodfisher_jax.training.network.objective import (
    frozen_errors,
    frozen_loss,
    frozen_outputs,
)
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.masks import num_kept
from woodfisher_jax.weights.state_dicts import to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

BATCH_NORM_IMAGES = 10_000
"""Augmented training images that batch-norm statistics are re-estimated from."""


LAYERWISE_BATCH_SIZE = 50
"""Images that pass through the network at once, where layers are pruned in turn."""


class Experiment(NamedTuple):
    """A network, and what is done to it.

    Attributes:
        model: Name of the network, in ``structures.NETWORKS``.
        prunable: Regular expression on parameter paths.
        targets: Sparsities, each reached in one step from the dense network; or
            millions of multiply-accumulates, each reached from the target before.
        methods: Name in the table -> arguments of ``wf.prune``; with ``held_out``, a
            number of training images, of ``wf.prune_searched``, which lowers their
            ``measure``, "loss" or "errors". ``source`` says what the rows are gradients
            of, see :func:`rows_of`. Method "layerwise" is ``wf.prune_layerwise``.
        num_seeds: Seeds 0, 1, ... of the Fisher samples.
        goal: What the targets are: "sparsity" or "flops_target".
        reestimate: Whether to judge with re-estimated batch-norm statistics as well.
        memory_limit: Bytes that a step may take; default what is free.
    """

    model: str
    prunable: str | None
    targets: tuple[float, ...]
    methods: dict[str, dict[str, Any]]
    num_seeds: int
    goal: str = "sparsity"
    reestimate: bool = False
    memory_limit: float | None = None


def every_method(num_samples: int) -> dict[str, dict[str, Any]]:
    """Arguments for each method of the table, with so many samples.

    Damping is 1e-5, and for methods of first order the 0.1 of the original's sweep.
    The Hessian's diagonal is estimated, from 100 samples and 16 vectors.
    """
    chunks = {"block_size": 2000}
    slope = {"damping": 0.1}
    rows: dict[str, dict[str, Any]] = {
        "globalmagni": {},
        "magni": {},
        "diagfisher": {},
        "naivehess, hutchinson, N = 100": {
            "num_samples": 100,
            "hessian": "hutchinson",
            "num_probes": 16,
        },
        "kfac": {},
        "kfac, pi": {"pi": True},
        "woodfisher": {},
        "woodfisherblock": {},
        "woodfisherblock, c = 2,000": chunks,
        "woodfisherblockdynamic, c = 2,000": chunks,
        "woodfisherblockgroup, c = 2,000": chunks,
        "woodfisherblock_flops, power 0.3": {"flops_power": 0.3},
        "woodtaylor, damping 0.1": slope,
        "woodtaylorblock, damping 0.1": slope,
    }
    found = {}
    for name, options in rows.items():
        method = name.partition(",")[0]
        samples = {} if method.endswith("magni") else {"num_samples": num_samples}
        found[name] = {"method": method, **samples, **options}
    return found


def defaults(num_samples: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """Updates and dampings, among them those of ``wf.prune`` without a method.

    Args:
        num_samples: N.
        batch_size: m, of the rows that are means.
    """
    found: dict[str, dict[str, Any]] = {"globalmagni": {"method": "globalmagni"}}
    for method in ("woodfisherblock", "woodfisher"):
        for m in (1, batch_size):
            for update, damping in (
                ("sum", 1e-5),
                ("joint", 1e-5),
                ("joint", 1e-3),
                ("joint", "auto"),
            ):
                found[f"{method}, {update}, damping {damping}, m = {m}"] = {
                    "method": method,
                    "num_samples": num_samples,
                    "batch_size": m,
                    "update": update,
                    "damping": damping,
                }
    return found


def layerwise(num_samples: int) -> dict[str, dict[str, Any]]:
    """Layers one after another from images alone, beside one step of WoodFisher."""
    common = {"num_samples": num_samples, "batch_size": 1}
    own = common | {"method": "layerwise"}
    budgets = {"scope": "global", "metric": "softmax", "sensitivity_examples": 250}
    step = {"method": "woodfisherblock", "update": "joint", "damping": "auto"}
    return {
        "globalmagni": {"method": "globalmagni"},
        "magni": {"method": "magni"},
        "woodfisherblock, joint, damping auto": common | step,
        "layerwise": own,
        "layerwise, global budgets": own | budgets,
        "layerwise, global budgets, distil": own | budgets | {"distil": 10},
    }


MLP_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
STAGES = r"layer\d/block\d+/conv\d/kernel"
BLOCKS = r"blocks\d+/(attn|mlp).*kernel"

EXPERIMENTS = {
    "mlp": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
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
        STAGES,
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
    "mlp_methods": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
        every_method(1000)
        | {"naivehess, exact, N = 100": {"method": "naivehess", "num_samples": 100}},
        1,
    ),
    "mlp_joint": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
        {
            f"woodfisher, {update}": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": update,
            }
            for update in ("none", "sum", "joint")
        },
        3,
    ),
    "mlp_defaults": Experiment(
        "mlp", None, (0.8, 0.9, 0.95, 0.98), defaults(1000, 16), 3
    ),
    "resnet20_defaults": Experiment(
        "resnet20",
        STAGES,
        (0.5, 0.7, 0.8),
        defaults(500, 4),
        3,
        reestimate=True,
    ),
    "mlp_damping": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
        {
            f"woodfisher, joint, damping {damping}": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": "joint",
                "damping": damping,
            }
            for damping in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, "auto")
        }
        | {
            f"woodfisher, joint, damping searched, {measure}": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": "joint",
                "damping": "auto",
                "held_out": 5000,
                "measure": measure,
            }
            for measure in ("loss", "errors")
        },
        3,
    ),
    "mlp_sources": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
        {
            f"woodfisher, joint, damping auto, {source}": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": "joint",
                "damping": "auto",
                "source": source,
            }
            for source in ("labels", "labels of the model", "identity", "softmax")
        },
        3,
    ),
    "mlp_swaps": Experiment(
        "mlp",
        None,
        MLP_SPARSITIES,
        {
            f"woodfisher, joint, damping auto, swaps {swaps}": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": "joint",
                "damping": "auto",
                "swaps": swaps,
            }
            for swaps in (0, 20)
        },
        3,
    ),
    "mlp_one_step": Experiment(
        "mlp",
        None,
        (0.98,),
        {
            f"woodfisher, joint, damping {damping}, swaps 20": {
                "method": "woodfisher",
                "num_samples": 1000,
                "update": "joint",
                "damping": damping,
                "swaps": 20,
            }
            for damping in ("auto", 1e-3)
        },
        3,
    ),
    "mlp_kfac": Experiment(
        "mlp",
        None,
        (0.95,),
        {
            "kfac": {"method": "kfac", "num_samples": 100},
            "kfac, pi": {"method": "kfac", "num_samples": 100, "pi": True},
        },
        5,
    ),
    "mlp_kfac_joint": Experiment(
        "mlp",
        None,
        (0.8, 0.9, 0.95),
        {
            f"kfac, {update}, damping {damping}": {
                "method": "kfac",
                "num_samples": 1000,
                "update": update,
                "damping": damping,
            }
            for update in ("none", "sum", "joint")
            for damping in (1e-5, 1e-3)
        },
        3,
    ),
    "mlp_recompute": Experiment(
        "mlp",
        None,
        (0.98,),
        {
            name: {
                "method": "woodfisher",
                "num_samples": 500,
                "batch_size": 16,
                "recompute": steps,
                "recompute_schedule": schedule,
            }
            for name, steps, schedule in (
                ("one step", 0, "linear"),
                ("R = 15, linear", 15, "linear"),
                ("R = 15, poly", 15, "poly"),
            )
        },
        3,
    ),
    "mlp_layerwise": Experiment(
        "mlp", None, (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), layerwise(1000), 3
    ),
    "resnet20_layerwise": Experiment(
        "resnet20", STAGES, (0.5, 0.7, 0.8, 0.9), layerwise(250), 1
    ),
    "vit_layerwise": Experiment(
        "vit", BLOCKS, (0.5, 0.6, 0.7, 0.8, 0.9), layerwise(1000), 3
    ),
    "resnet20_methods": Experiment(
        "resnet20",
        STAGES,
        (0.8,),
        every_method(100),
        1,
        reestimate=True,
        memory_limit=4e9,
    ),
    "resnet20_flops": Experiment(
        "resnet20",
        STAGES,
        (30.0, 20.0, 10.0),
        {
            "globalmagni": {"method": "globalmagni", "num_samples": 1},
            "woodfisherblock_flops": {
                "method": "woodfisherblock_flops",
                "num_samples": 50,
            },
        },
        1,
        goal="flops_target",
        reestimate=True,
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
    order = blocks.flat_order(masks)
    loss = as_partial(loss_fn)
    problem = wf.Problem(loss, params, masks, samples, order, num_samples)
    squares = moments(row_chunks(problem, 64)).squares
    for path, mean in blocks.unflatten(order, squares).items():
        weights = params[path.split("/")[0]]["kernel"]
        scores = np.asarray(obd_saliency(weights, mean) + 1e-4)
        kept = num_kept(scores.size, sparsity)
        masks[path] = jnp.asarray(scores > np.sort(scores.ravel())[-kept])
    return wf.apply_masks(params, masks)


class Network(NamedTuple):
    """The dense network of an experiment."""

    model: Any
    dataset: Any
    params: Any
    stats: Any


def network(experiment: Experiment, checkpoint: Path) -> Network:
    """Reads model, data and checkpoint."""
    data_name, build = NETWORKS[experiment.model]
    model, dataset = build(), data.load(data_name)
    image = np.zeros((1, *dataset.image_shape), np.float32)
    variables, _ = to_variables(
        read_state_dict(checkpoint),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    params = jax.tree.map(jnp.asarray, variables["params"])
    stats = jax.tree.map(jnp.asarray, variables.get("batch_stats", {}))
    return Network(model, dataset, params, stats)


def judged(network: Network, params: Any, experiment: Experiment) -> dict[str, float]:
    """Metrics on the test split."""
    model, dataset, _, stats = network
    found = evaluate(model, params, stats, dataset)
    if experiment.reestimate:
        images = batches.batch_norm_batches(
            dataset, seed=0, draw=0, count=BATCH_NORM_IMAGES, batch_size=128
        )
        anew = reestimate(model, params, stats, images)
        top1 = evaluate(model, params, anew, dataset)["top1"]
        found["top1_reestimated"] = top1
    return found


def rows_of(
    network: Network, samples: dict[str, Any], source: str, seed: int
) -> tuple[Any, Any]:
    """A loss and samples whose gradients are the rows of the curvature.

    Gradients of the loss at the "labels" there are or at "labels of the model" drawn
    from its own predictions; else of random projections of the outputs in a metric.
    """
    loss_fn = frozen_loss(network.model, network.stats)
    if source == "labels":
        return loss_fn, samples
    outputs_fn, key = frozen_outputs(network.model, network.stats), jax.random.key(seed)
    outputs = outputs_of(outputs_fn, network.params, samples["image"])
    if source == "labels of the model":
        drawn = wf.gradients.sample_labels(key, jnp.asarray(outputs))
        return loss_fn, {**samples, "label": np.asarray(drawn)}
    stage = wf.matching.Stage(outputs_fn, samples["image"], outputs)
    rows = wf.matching.matching_rows(stage, network.params, key, source)
    return rows.loss_fn, rows.samples


def pruned(
    network: Network, experiment: Experiment, arguments: dict[str, Any], seed: int
) -> Iterator[tuple[float, Any, dict[str, Any]]]:
    """Yields each target with the pruned parameters and what is known of the step."""
    size = arguments.get("num_samples", 1) * arguments.get("batch_size", 1)
    kept_apart = arguments.get("held_out", 0)
    drawn = batches.fisher_samples(
        network.dataset, seed=seed, draw=0, count=size + kept_apart
    )
    assert isinstance(drawn, dict)
    samples, held_out = (
        {name: array[part] for name, array in drawn.items()}
        for part in (slice(size), slice(size, None))
    )
    source = arguments.get("source", "labels")
    loss_fn, samples = rows_of(network, samples, source, seed)
    if "method" not in arguments:
        for target in experiment.targets:
            found = original_diagonal(
                loss_fn, network.params, samples, sparsity=target, **arguments
            )
            yield target, found, {}
        return
    if arguments["method"] == "layerwise":
        yield from layer_by_layer(network, experiment, arguments, samples["image"])
        return
    options = {"damping": 1e-5, "memory_limit": experiment.memory_limit, **arguments}
    measure = options.pop("measure", "loss")
    for name in ("source", "held_out"):
        options.pop(name, None)
    options = applicable(options["method"], options)
    params, masks = network.params, wf.init_masks(network.params, experiment.prunable)
    for target in experiment.targets:
        goal = {experiment.goal: target, "masks": masks}
        if kept_apart:
            goal["held_out"] = held_out
            errors = frozen_errors(network.model, network.stats)
            goal["measure"] = errors if measure == "errors" else None
        run = wf.prune_searched if kept_apart else wf.prune
        found, kept, info = run(loss_fn, params, samples, **options | goal)
        known: dict[str, Any] = {"achieved_sparsity": info.sparsity}
        if experiment.goal == "flops_target":
            nested = all(bool(jnp.all(masks[p] | ~kept[p])) for p in kept)
            known |= {"macs": info.macs, "nested": nested}
            params, masks = found, kept
        yield target, jax.block_until_ready(found), known


def layer_by_layer(
    network: Network, experiment: Experiment, arguments: dict[str, Any], images: Any
) -> Iterator[tuple[float, Any, dict[str, Any]]]:
    """Yields each target with the parameters that ``wf.prune_layerwise`` gives."""
    options: dict[str, Any] = {"batch_size": LAYERWISE_BATCH_SIZE}
    options |= {
        name: value
        for name, value in arguments.items()
        if name not in ("method", "num_samples", "batch_size")
    }
    for target in experiment.targets:
        found, _, info = wf.prune_layerwise(
            frozen_outputs(network.model, network.stats),
            network.params,
            images,
            sparsity=target,
            prunable=experiment.prunable,
            **options,
        )
        known = {"achieved_sparsity": info.sparsity}
        yield target, jax.block_until_ready(found), known


def runs(experiment: Experiment, checkpoint: Path, name: str) -> Iterator[dict]:
    """Yields a record of each run of one method; the first also judges the dense."""
    given, arguments = network(experiment, checkpoint), experiment.methods[name]
    random = arguments.get("num_samples", 0) > 1
    for seed in range(experiment.num_seeds if random else 1):
        start, processor = time.perf_counter(), time.process_time()
        for target, params, known in pruned(given, experiment, arguments, seed):
            seconds = time.perf_counter() - start
            used = time.process_time() - processor
            peak = environment.peak_rss_bytes()
            yield {
                "method": name,
                "seed": seed,
                "target": target,
                **judged(given, params, experiment),
                **known,
                "seconds": seconds,
                "processor_seconds": used,
                "peak_bytes": peak,
            }
            start, processor = time.perf_counter(), time.process_time()
    if name == next(iter(experiment.methods)):
        # Last, for the peak of the first step is to be that of pruning alone.
        yield {"method": "dense", **judged(given, given.params, experiment)}


def table(records: list[dict[str, Any]], targets: tuple[float, ...]) -> str:
    """A Markdown table: a row a method, a column a target, top-1 mean ± deviation.

    Seconds are the median; the peak is that of the process until the first step ends.
    """
    keys = {"top1": ""}
    if any("top1_reestimated" in record for record in records):
        keys = {"top1": " stored", "top1_reestimated": " re-estimated"}
    heads = [f"{t:g}{of}" for t in targets for of in keys.values()]
    lines = [
        f"| method | {' | '.join(heads)} | s a step | GB |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for name in dict.fromkeys(r["method"] for r in records if "target" in r):
        mine = [r for r in records if r["method"] == name]
        cells = []
        for target in targets:
            for key in keys:
                values = [r[key] for r in mine if r["target"] == target]
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}")
        typical = statistics.median(r["seconds"] for r in mine)
        peak = mine[0]["peak_bytes"] / 1e9
        lines.append(f"| {name} | {' | '.join(cells)} | {typical:.2f} | {peak:.2f} |")
    return "\n".join(lines)


def in_a_process(arguments: argparse.Namespace, name: str) -> Iterator[dict]:
    """Yields the records of one method from a process of its own."""
    command = [sys.executable, __file__, arguments.experiment, f"--method={name}"]
    command.append(f"--checkpoint={arguments.checkpoint}")
    if arguments.seeds:
        command.append(f"--seeds={arguments.seeds}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise SystemExit(f"{name}: the process ended with {process.returncode}")


def main() -> None:
    """Runs one experiment and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="file for one JSON line a run")
    parser.add_argument("--method", help="one row alone, its records without a table")
    parser.add_argument("--seeds", type=int, help="how many, if not as many as planned")
    arguments = parser.parse_args()
    experiment = EXPERIMENTS[arguments.experiment]
    if arguments.seeds:
        experiment = experiment._replace(num_seeds=arguments.seeds)
    if arguments.method:
        for record in runs(experiment, arguments.checkpoint, arguments.method):
            print(json.dumps(record), flush=True)
        return
    records = []
    for name in experiment.methods:
        for record in in_a_process(arguments, name):
            records.append(record)
            print(json.dumps(record), flush=True)
            if arguments.out:
                lines = "".join(json.dumps(r) + "\n" for r in records)
                arguments.out.write_text(lines)
    dense = next(r for r in records if r["method"] == "dense")
    print(f"\ndense: {dense['top1']:.2f}\n")
    print(table(records, experiment.targets))


if __name__ == "__main__":
    main()
