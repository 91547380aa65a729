"""Accuracy of networks pruned to a pattern, such as 2:4, in one shot.

    python scripts/patterns.py resnet20 --checkpoint=resnet20_cifar10.pth.tar
    python scripts/patterns.py vit
    python scripts/patterns.py vit --pattern=heads:4 --sparsity=0.5

ResNet-20 on CIFAR-10 is that of the original's checkpoint, judged with its batch-norm
statistics and with re-estimated ones. The vision transformer is small (4 blocks, width
64, 4 heads) and is first trained on MNIST, for ten epochs unless ``--epochs`` says
otherwise. Each method prunes the dense network once, with the Fisher samples of each
seed, and is judged on the test split, which chooses nothing. Every result is checked to
obey the pattern. Prints a Markdown table of mean and standard deviation of top-1 in
percent.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import woodfisher_jax as wf
from woodfisher_jax import data, models
from woodfisher_jax.data import DataSet, batches
from woodfisher_jax.stages.matching import Stage, outputs_of
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network import objective
from woodfisher_jax.training.network.batch_norm import reestimate
from woodfisher_jax.training.network.objective import frozen_loss, frozen_outputs
from woodfisher_jax.training.network.train_step import TrainState, train_step
from woodfisher_jax.weights.state_dicts import to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

BATCH_NORM_IMAGES = 10_000
"""Augmented training images of the statistics that are judged."""

BATCH_NORM_IMAGES_STAGE = 2_000
"""The same on the way."""

WAY = (0.5, 0.75, 1.0, 1.0)
"""Of the last row: share of the way to the pattern at each stage; one is a repair."""

VIT: dict[str, Any] = {
    "width": 64,
    "num_heads": 4,
    "depth": 4,
    "patch_size": 7,
    "num_classes": 10,
}

ALONE = {"method": "woodfisherblock", "update": "none"}
JOINT = {"method": "woodfisherblock", "update": "joint"}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "globalmagni"},
    "woodfisherblock, masks alone": ALONE,
    "woodfisherblock, sum": {"method": "woodfisherblock"},
    "woodfisherblock, joint": JOINT,
    f"outputs matched, {len(WAY)} stages": {"method": "woodtaylor", "damping": "auto"},
}
"""Name in the table -> arguments of ``wf.prune``, or of ``wf.prune_matched``."""


class Network(NamedTuple):
    """A dense network and its data.

    Attributes:
        model: The module.
        params: Its parameters.
        batch_stats: Its running statistics, or an empty dict.
        dataset: What it was trained on.
        prunable: Regular expression on parameter paths.
    """

    model: nn.Module
    params: Any
    batch_stats: Any
    dataset: DataSet
    prunable: str


def resnet20(checkpoint: Path) -> Network:
    """The network of a checkpoint; its stem has 3 inputs and stays dense."""
    dataset, model = data.load("cifar10"), models.build_model("resnet20")
    image = jnp.zeros((1, *dataset.image_shape))
    variables, _ = to_variables(
        read_state_dict(checkpoint),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    variables = jax.tree.map(jnp.asarray, variables)
    stages = r"layer\d/block\d+/conv\d/kernel"
    return Network(
        model, variables["params"], variables["batch_stats"], dataset, stages
    )


def vit(epochs: int, pattern: str) -> Network:
    """A small vision transformer, trained on MNIST with Adam and a cosine."""
    dataset, model = data.load("mnist"), models.VisionTransformer(**VIT)
    images = jnp.zeros((1, *dataset.image_shape))
    params = model.init(jax.random.key(0), images)["params"]
    steps = batches.steps_per_epoch(dataset, 128)
    rate = optax.cosine_decay_schedule(2e-3, max(1, epochs * steps))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = TrainState(params, {}, {}, tx.init(params))
    for epoch in range(epochs):
        for batch in batches.epoch_batches(
            dataset, seed=0, epoch=epoch, start=0, stop=steps, batch_size=128
        ):
            state, _ = train_step(
                state, batch, jnp.zeros(1), model=model, tx=tx, label_smoothing=0.0
            )
    chosen = "attn" if pattern.startswith("heads") else r"blocks\d+/(attn|mlp)"
    return Network(model, state.params, {}, dataset, f"{chosen}.*kernel")


def pruned(network: Network, arguments: dict[str, Any], seed: int) -> Any:
    """Params after one pruning."""
    number = arguments.get("num_samples", 0)
    samples = None
    if number:
        samples = batches.fisher_samples(
            network.dataset, seed=seed, draw=0, count=number
        )
    params, masks, _ = wf.prune(
        frozen_loss(network.model, network.batch_stats),
        network.params,
        samples,
        prunable=network.prunable,
        axes=axes_of(network),
        **arguments,
    )
    wf.patterns.check(masks, arguments["pattern"], axes=axes_of(network))
    return jax.block_until_ready(params)


def axes_of(network: Network) -> Mapping[str, wf.WeightAxes]:
    """What the axes of the weights are: magnitudes have no samples to tell."""
    variables = {"params": network.params, "batch_stats": network.batch_stats}
    return objective.axes_of(network.model, variables, network.dataset.image_shape)


def matched(network: Network, arguments: dict[str, Any], seed: int) -> Any:
    """Params after stages that keep the outputs, statistics re-estimated at each."""
    number, goal = arguments.pop("num_samples"), arguments.pop("sparsity")
    dense = frozen_outputs(network.model, network.batch_stats)

    def stage(draw: int, params: Any) -> Stage:
        stats, augment = network.batch_stats, bool(network.batch_stats)
        if draw and stats:
            stats = statistics_of(network, params, seed, draw, BATCH_NORM_IMAGES_STAGE)
        drawn = batches.fisher_samples(
            network.dataset, seed=seed, draw=draw, count=number, augment=augment
        )
        assert isinstance(drawn, dict)
        images = drawn["image"]
        wanted = outputs_of(dense, network.params, images)
        return Stage(frozen_outputs(network.model, stats), images, wanted)

    if goal is None:
        pattern = wf.patterns.parse(arguments["pattern"])
        assert pattern is not None
        goal = pattern.sparsity
    params, masks, _ = wf.prune_matched(
        stage,
        network.params,
        sparsity=[share * goal for share in WAY],
        prunable=network.prunable,
        seed=seed,
        **arguments,
    )
    wf.patterns.check(masks, arguments["pattern"], axes=axes_of(network))
    return jax.block_until_ready(params)


def statistics_of(
    network: Network, params: Any, seed: int, draw: int, count: int
) -> Any:
    """Batch-norm statistics of augmented training images."""
    images = batches.batch_norm_batches(
        network.dataset, seed=seed, draw=draw, count=count, batch_size=128
    )
    return reestimate(network.model, params, network.batch_stats, images)


def judged(network: Network, params: Any) -> Iterator[float]:
    """Top-1 with the statistics there are, and with re-estimated ones if any."""
    model, stats, dataset = network.model, network.batch_stats, network.dataset
    yield evaluate(model, params, stats, dataset)["top1"]
    if stats:
        fresh = statistics_of(network, params, 0, 0, BATCH_NORM_IMAGES)
        yield evaluate(model, params, fresh, dataset)["top1"]


def row(name: str, results: list[tuple[float, ...]], seconds: float) -> str:
    """A line of the table."""
    cells = []
    for values in zip(*results, strict=True):
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.2f}{spread}")
    return f"| {name} | {' | '.join(cells)} | {seconds:.1f} |"


def main() -> None:
    """Prunes one network by every method and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=["resnet20", "vit"])
    parser.add_argument("--checkpoint", type=Path, help="of resnet20")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--sparsity", type=float, help="where the pattern has none")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--damping", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these")
    parser.add_argument("--epochs", type=int, default=10, help="of training vit")
    given = parser.parse_args()
    if given.network == "resnet20" and not given.checkpoint:
        parser.error("resnet20 needs --checkpoint")
    network = (
        resnet20(given.checkpoint)
        if given.network == "resnet20"
        else vit(given.epochs, given.pattern)
    )
    dense = tuple(judged(network, network.params))
    heads = ["stored", "re-estimated"] if network.batch_stats else ["top-1"]
    print(f"| {given.pattern} | {' | '.join(heads)} | s a prune |")
    print("|---" * (len(heads) + 2) + "|")
    print(row("dense", [dense], 0.0), flush=True)
    for name, options in METHODS.items():
        if given.only and not any(part in name for part in given.only):
            continue
        arguments = {**options, "pattern": given.pattern, "sparsity": given.sparsity}
        by_magnitude = options["method"] == "globalmagni"
        if not by_magnitude:
            fisher = {"num_samples": given.num_samples, "damping": given.damping}
            arguments = {**arguments, **fisher, **options}
        results, times = [], []
        for seed in range(1 if by_magnitude else given.seeds):
            start = time.perf_counter()
            run = matched if name.startswith("outputs matched") else pruned
            params = run(network, dict(arguments), seed)
            times.append(time.perf_counter() - start)
            results.append(tuple(judged(network, params)))
        print(row(name, results, statistics.median(times)), flush=True)


if __name__ == "__main__":
    main()
