"""Accuracy along one staged pruning, with outputs matched, on the two checkpoints.

    python scripts/staged.py mlp --checkpoint=mnist_25_epoch_93.97.ckpt
    python scripts/staged.py resnet20 --checkpoint=resnet20_cifar10.pth.tar
    python scripts/staged.py resnet20 --match=distilled --checkpoint=...
    python scripts/staged.py resnet20_frozen --match=distilled --checkpoint=...

A run prunes the dense network in stages by ``prune_matched``, with fresh training
images at each, and is judged on the test split at the sparsities of the table; nothing
is chosen by it. Batch-norm statistics are re-estimated on training images at each
stage; global magnitude, in one step from the dense network, is judged in the same way.
``resnet20_frozen`` keeps the statistics of the checkpoint throughout. ``distilled``
adds steps of Adam at the end of a sparsity, without labels: towards the mean of the
dense outputs over an image and its mirror image. With ``labels`` half of the images are
shifted by a pixel at most, for the controls as well.
``--without`` takes one ingredient away. Prints a Markdown table of mean and standard
deviation of top-1 in percent over the seeds; ``--out`` keeps a line of JSON a stage.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import woodfisher_jax as wf
from woodfisher_jax import data, models
from woodfisher_jax.data import batches
from woodfisher_jax.data.augment import shift
from woodfisher_jax.report import environment
from woodfisher_jax.stages.distillation import distil
from woodfisher_jax.stages.matching import Stage, outputs_of
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network.batch_norm import reestimate
from woodfisher_jax.training.network.objective import frozen_loss, frozen_outputs
from woodfisher_jax.weights.state_dicts import to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

BATCH_NORM_IMAGES = 10_000
"""Augmented training images of the statistics that are judged."""

BATCH_NORM_IMAGES_STAGE = 2_000
"""The same on the way."""


Level = tuple[float, int]
"""Sparsity of a stage, and its rows."""


class Network(NamedTuple):
    """A checkpoint, and the ways that its pruning takes.

    Attributes:
        model: Name of the model.
        dataset: Name of the data set.
        prunable: Regular expression on parameter paths.
        augment: Whether the images of a stage are flipped and cropped.
        metric: Of the distance of the outputs.
        ways: For "outputs" and "labels" the stages; where a sparsity repeats, the later
            ones are repairs.
        reported: Sparsities of the table.
        distilled: Batches of Adam at the end of a sparsity, and its highest rate, where
            ``--match=distilled``.
        frozen: Whether the batch-norm statistics of the checkpoint stay.
    """

    model: str
    dataset: str
    prunable: str | None
    augment: bool
    metric: str
    ways: dict[str, tuple[Level, ...]]
    reported: tuple[float, ...]
    distilled: dict[float, tuple[int, float]]
    frozen: bool = False


def way(*parts: tuple[int, list[float]]) -> tuple[Level, ...]:
    """Stages with their rows, from (rows, sparsities)."""
    return tuple((level, rows) for rows, levels in parts for level in levels)


SGD_RATE = 0.1
"""Of plain SGD on the masks, beside the stages with labels."""

DISTIL_BATCH_SIZE = 64
"""Images a step of Adam."""

LABEL_BATCH_SIZE = 32
"""Images a row, where the rows are gradients of the loss."""

MICROBATCH_SIZE = 2048
"""Images whose rows are formed at once there: two rows at a time would be as many calls
as there are pairs of them."""

NETWORKS = {
    "mlp": Network(
        "mlp",
        "mnist",
        None,
        False,
        "softmax",
        {
            "outputs": way(
                (1000, [0.5, 0.6, 0.7, 0.8]),
                (2000, [0.85, 0.9, 0.925, 0.94, 0.95, 0.95, 0.96, 0.97, 0.975]),
                (2000, [0.98] * 4),
            ),
            "labels": way(
                (500, [0.5] * 70 + [0.6] * 6 + [0.7] * 6 + [0.8] * 6),
                (500, [0.85, 0.875] + [0.9] * 8 + [0.925] * 3),
                (500, [0.95] * 14 + [0.965] * 6 + [0.975] * 6 + [0.98] * 12),
            ),
        },
        (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
        {},
    ),
    "resnet20": Network(
        "resnet20",
        "cifar10",
        r"layer\d/block\d+/conv\d/kernel",
        True,
        "identity",
        {
            "outputs": way(
                (1000, [0.3, 0.4, 0.5, 0.6]),
                (1500, [0.7]),
                (2000, [0.75, 0.8, 0.8]),
                (3000, [0.84, 0.87] + [0.9] * 3),
            ),
            "distilled": way(
                (1000, [0.3, 0.4, 0.5, 0.6, 0.7]), (1500, [0.8]), (2000, [0.86, 0.9])
            ),
        },
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        {
            0.4: (100, 1e-3),
            0.5: (100, 1e-3),
            0.6: (120, 1e-3),
            0.7: (200, 2e-3),
            0.8: (240, 3e-3),
            0.9: (220, 3e-3),
        },
    ),
}
NETWORKS["resnet20_frozen"] = NETWORKS["resnet20"]._replace(
    ways={
        "distilled": way(
            (1000, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.84, 0.87, 0.9, 0.9]),
        )
    },
    distilled={level: (50, 1e-3) for level in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)},
    frozen=True,
)

WITHOUT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "auto_damping": {"damping": 1e-5},
    "joint": {"update": "sum"},
    "update": {"update": "none"},
}
"""Ingredients that are an option of the step; the others of :data:`INGREDIENTS` are
taken away by the script."""

INGREDIENTS = (
    *WITHOUT,
    "stages",
    "residual",
    "statistics",
    "shifts",
    "pruning",
)
"""What ``--without`` knows. Without pruning the network stays dense in all stages."""


class Setup(NamedTuple):
    """What a run works on.

    Attributes:
        network: See :class:`Network`.
        dataset: Its data.
        model: The Linen module.
        params: Of the dense network.
        stats: Its batch-norm statistics.
    """

    network: Network
    dataset: data.DataSet
    model: Any
    params: Any
    stats: Any


def setup(network: Network, checkpoint: Path) -> Setup:
    """Reads model, data and checkpoint."""
    model = models.build_model(network.model)
    dataset = data.load(network.dataset)
    image = np.zeros((1, *dataset.image_shape), np.float32)
    variables, _ = to_variables(
        read_state_dict(checkpoint),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    params, stats = (
        jax.tree.map(jnp.asarray, variables.get(name, {}))
        for name in ("params", "batch_stats")
    )
    return Setup(network, dataset, model, params, stats)


def statistics_of(given: Setup, params: Any, seed: int, draw: int, count: int) -> Any:
    """Batch-norm statistics of a network as it is now."""
    images = batches.batch_norm_batches(
        given.dataset, seed=seed, draw=draw, count=count, batch_size=128
    )
    return reestimate(given.model, params, given.stats, images)


def drawn(given: Setup, match: str, seed: int, number: int, rows: int) -> Any:
    """Training images of a stage."""
    labels = match == "labels"
    return batches.fisher_samples(
        given.dataset,
        seed=seed,
        draw=number,
        count=rows * (LABEL_BATCH_SIZE if labels else 1),
        augment=labels or given.network.augment,
    )


def judged(given: Setup, params: Any) -> dict[str, float]:
    """Test top-1 on stored statistics and, unless they are kept, on new ones."""

    def top1(stats: Any) -> float:
        return evaluate(given.model, params, stats, given.dataset)["top1"]

    if given.network.frozen or not given.stats:
        return {"top1": top1(given.stats)}
    anew = statistics_of(given, params, 0, 0, BATCH_NORM_IMAGES)
    return {"top1": top1(anew), "top1_stored": top1(given.stats)}


def staged(given: Setup, match: str, without: str, seed: int) -> Iterator[dict]:
    """A record of each reported stage of one run."""
    network, records = given.network, []
    stages = network.ways[match]
    if without == "stages":
        stages = tuple(
            (level, rows) for level, rows in stages if level in network.reported
        )
        stages = tuple(dict(stages).items())
    levels = [level for level, _ in stages]
    stats, start = given.stats, time.perf_counter()
    frozen = network.frozen or without == "statistics" or not given.stats
    judging = 0.0

    def stage(number: int, params: Any) -> Stage:
        nonlocal stats
        if number and not frozen:
            stats = statistics_of(given, params, seed, number, BATCH_NORM_IMAGES_STAGE)
        batch = drawn(given, match, seed, number, stages[number][1])
        now = frozen_outputs(given.model, stats)
        if match == "labels":
            return Stage(now, batch["image"], batch["label"])
        if without == "residual":
            return Stage(now, batch["image"], outputs_of(now, params, batch["image"]))
        dense = frozen_outputs(given.model, given.stats)
        wanted = outputs_of(dense, given.params, batch["image"])
        return Stage(now, batch["image"], wanted)

    def after(number: int, params: Any, masks: Any, info: wf.PruneInfo) -> Any:
        nonlocal judging
        level = levels[number]
        if level in levels[number + 1 :]:
            return None
        if match == "distilled" and level in network.distilled:
            params = repaired(given, params, masks, level, seed, frozen)
        spent = time.perf_counter() - start - judging
        if level not in network.reported:
            return params
        about = {"without": without, "seed": seed, "sparsity": level}
        records.append(
            {
                "run": f"matched ({match})",
                **about,
                **judged(given, params),
                "dampings": [d.multiple for d in info.dampings or ()],
                "seconds": spent,
                "peak_bytes": environment.peak_rss_bytes(),
            }
        )
        if match == "labels" and without == "nothing":
            controls = {
                "SGD on the mask": masks,
                "SGD, dense": wf.init_masks(given.params, network.prunable),
            }
            for name, mask in controls.items():
                ended = descended(given, mask, stages[: number + 1], seed)
                found = {"run": name, **about, **judged(given, ended)}
                records.append(found)
        judging = time.perf_counter() - start - spent
        return params

    wf.prune_matched(
        stage,
        given.params,
        sparsity=[0.0] * len(levels) if without == "pruning" else levels,
        prunable=network.prunable,
        metric=network.metric,
        batch_size=LABEL_BATCH_SIZE,
        microbatch_size=MICROBATCH_SIZE if match == "labels" else None,
        seed=seed,
        after=after,
        **WITHOUT.get(without, {}),
    )
    yield from records


def repaired(
    given: Setup, params: Any, masks: Any, level: float, seed: int, frozen: bool
) -> Any:
    """The network after some batches of Adam on the distance to the dense outputs.

    To their mean over an image and its mirror image, which is as likely an image of the
    same thing: by Jensen's inequality no worse on average than the outputs themselves.
    """
    count, rate = given.network.distilled[level]
    dense = frozen_outputs(given.model, given.stats)

    def wanted(images: jax.Array) -> jax.Array:
        mirrored = images[:, :, ::-1]
        return (dense(given.params, images) + dense(given.params, mirrored)) / 2

    drawn = batches.epoch_batches(
        given.dataset,
        seed=seed,
        epoch=round(100 * level),
        start=0,
        stop=count,
        batch_size=DISTIL_BATCH_SIZE,
        augment=given.network.augment,
    )
    pairs = (
        {"image": batch["image"], "wanted": wanted(jnp.asarray(batch["image"]))}
        for batch in drawn
    )
    optimizer = optax.adam(optax.cosine_onecycle_schedule(count, rate, pct_start=0.1))
    return distil(
        given.model, params, given.stats, masks, pairs, optimizer, frozen=frozen
    )[0]


def descended(given: Setup, masks: Any, stages: tuple[Level, ...], seed: int) -> Any:
    """Plain SGD with the images of some stages, a step for each of their rows."""
    params = wf.masks.apply_masks(given.params, masks)
    loss = frozen_loss(given.model, given.stats)
    optimizer = optax.sgd(SGD_RATE)

    @jax.jit
    def descend(params: Any, rows: Any) -> Any:
        def step(params: Any, batch: Any) -> tuple[Any, None]:
            slope = jax.grad(loss)(params, batch)
            change, _ = optimizer.update(slope, optimizer.init(params))
            moved = optax.apply_updates(params, change)
            return wf.masks.apply_masks(moved, masks), None

        return jax.lax.scan(step, params, rows)[0]

    for number, (_, rows) in enumerate(stages):
        batch = drawn(given, "labels", seed, number, rows)
        shaped = {
            name: array.reshape(rows, LABEL_BATCH_SIZE, *array.shape[1:])
            for name, array in batch.items()
        }
        params = descend(params, shaped)
    return params


def by_magnitude(given: Setup, match: str, seed: int) -> Iterator[dict]:
    """A record of each reported sparsity, in one step each from the dense network.

    To be compared with distilled stages, from the sparsity before, with the same steps
    of Adam.
    """
    network, params = given.network, given.params
    masks = wf.init_masks(params, network.prunable)
    for level in network.reported:
        found, kept, _ = wf.prune(
            None,
            params,
            sparsity=level,
            method="globalmagni",
            masks=masks,
        )
        if match == "distilled" and level in network.distilled:
            found = repaired(given, found, kept, level, seed, network.frozen)
        if match == "distilled":
            params, masks = found, kept
        yield {
            "run": "globalmagni" + (", distilled" if match == "distilled" else ""),
            "without": "nothing",
            "seed": seed,
            "sparsity": level,
            **judged(given, found),
        }


def table(records: list[dict[str, Any]], key: str) -> str:
    """Mean and standard deviation over seeds, in percent, as Markdown."""
    levels = sorted({record["sparsity"] for record in records})
    rows: dict[str, dict[float, list[float]]] = {}
    for record in records:
        without = record["without"]
        name = record["run"] + (f", no {without}" if without != "nothing" else "")
        rows.setdefault(name, {}).setdefault(record["sparsity"], []).append(record[key])
    lines = [
        "| | " + " | ".join(f"{level:g}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name, cells in rows.items():
        shown = []
        for level in levels:
            values = cells.get(level, [])
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--match", choices=("outputs", "distilled", "labels"), default="outputs"
    )
    parser.add_argument(
        "--without",
        choices=INGREDIENTS,
        default="nothing",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for one JSON line a record")
    arguments = parser.parse_args()
    network = NETWORKS[arguments.network]
    if arguments.match not in network.ways:
        parser.error(f"--match={arguments.match} has no stages for {arguments.network}")
    matches = {"shifts": ("labels",), "residual": ("outputs", "distilled")}
    if arguments.match not in matches.get(arguments.without, network.ways):
        parser.error(
            f"--match={arguments.match} has no {arguments.without} to be taken away"
        )
    given = setup(network, arguments.checkpoint)
    if arguments.match == "labels":
        moves = shift if arguments.without != "shifts" else None
        given = given._replace(dataset=given.dataset._replace(augment=moves))
    records = []
    seeds = range(arguments.seeds)
    runs = [by_magnitude(given, "one step", 0)]
    if arguments.match == "distilled":
        runs += [by_magnitude(given, "distilled", seed) for seed in seeds]
    runs += [staged(given, arguments.match, arguments.without, seed) for seed in seeds]
    for run in runs:
        for record in run:
            records.append(record)
            print(json.dumps(record), flush=True)
            if arguments.out:
                lines = "".join(json.dumps(r) + "\n" for r in records)
                arguments.out.write_text(lines)
    print(f"\ndense: {judged(given, given.params)}\n")
    print(table(records, "top1"))
    if given.stats and not network.frozen:
        print(f"\nStored statistics:\n\n{table(records, 'top1_stored')}")


if __name__ == "__main__":
    main()
