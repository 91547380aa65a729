"""Networks made smaller: top-1 by share of multiply-accumulates, by method.

    python scripts/structures.py resnet20 --checkpoint=resnet20_cifar10.pth.tar
    python scripts/structures.py mlp --checkpoint=mnist_25_epoch_93.97.ckpt
    python scripts/structures.py vit --checkpoint=vit.safetensors --dense-epochs=8

Prunes the channels (or heads and neurons) inside the blocks of the dense network to
each share of its MACs (or, with ``--budget=latency``, of the time of its products on
this machine, for 64 images), takes them out, estimates batch-norm statistics again
where the network has them, and judges the small network on the test split: as it is,
and after some epochs of training. Nothing is chosen by the test split: to choose
something, ``--apart=3000`` judges by so many training images, which are then not used
for anything else (but by the checkpoint, if that has seen them). Prints a
Markdown table; ``--out`` keeps every run as a line of JSON. A checkpoint that is not
there is trained and written.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import woodfisher_jax as wf
from woodfisher_jax import data, models
from woodfisher_jax.data import batches
from woodfisher_jax.layerwise.structures import counts_of, goal_of, readers
from woodfisher_jax.models.vit import VisionTransformer
from woodfisher_jax.selection.latencies import timed
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.convolutions import fast_weight_gradients
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network.batch_norm import reestimate
from woodfisher_jax.training.network.objective import cross_entropy
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.latency import (
    forward_latency,
    forward_line,
    onnx_latency,
    runs_onnx,
)
from woodfisher_jax.weights.state_dicts import to_state_dict, to_variables
from woodfisher_jax.weights.torch_files import read_state_dict

NETWORKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "resnet20": ("cifar10", partial(models.build_model, "resnet20")),
    "mlp": ("mnist", partial(models.build_model, "mlp")),
    "vit": (
        "cifar10",
        partial(
            VisionTransformer,
            width=96,
            num_heads=4,
            depth=6,
            patch_size=8,
            num_classes=10,
        ),
    ),
}
"""Data set and what builds the model, by name of the network."""

LAYERWISE: dict[str, dict[str, Any]] = {
    "layer-wise": {},
    "layer-wise, global": {"scope": "global", "metric": "softmax"},
    "layer-wise, repair": {"repair": 8},
    "layer-wise, global, repair": {
        "scope": "global",
        "metric": "softmax",
        "repair": 8,
    },
}
"""Arguments of ``wf.prune_layerwise`` by the name of the row."""

ROWS = (
    "magnitude filters",
    "woodfisher",
    "woodfisher, four steps",
    *LAYERWISE,
)


class Network(NamedTuple):
    """A dense network and its data, and how it is pruned layer by layer."""

    model: Any
    dataset: Any
    variables: Any
    found: Structures
    images: int
    spread: float

    def outputs(self, variables: Any, images: jax.Array) -> jax.Array:
        """Logits in evaluation mode."""
        logits = self.model.apply(variables, images, train=False)
        assert isinstance(logits, jax.Array)
        return logits


def network(arguments: argparse.Namespace) -> Network:
    """Reads model, data and checkpoint; the structures are those inside blocks."""
    checkpoint, budget = arguments.checkpoint, arguments.budget
    data_name, build = NETWORKS[arguments.network]
    model, dataset = build(), data.load(data_name)
    # Times are those of a batch, counts those of one example.
    size = 64 if budget == "latency" else 1
    image = np.zeros((size, *dataset.image_shape), np.float32)
    if not checkpoint.exists():
        variables = model.init(jax.random.key(0), image)
        epochs = arguments.dense_epochs
        variables = trained(model, dataset, variables, epochs, 0, from_nothing)
        save_safetensors(checkpoint, to_state_dict(variables), {})
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    variables, _ = to_variables(read_state_dict(checkpoint), shapes)
    variables = jax.tree.map(jnp.asarray, dict(variables))

    def net_fn(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)

    found = wf.structures(net_fn, variables, image)
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(variables).items()}
    inside = tuple(f for r in readers(found, shapes).values() for f in r.families)
    found = found._replace(families=inside)
    if budget == "latency":
        found = timed(found)
    if arguments.apart:
        dataset = kept_apart(dataset, arguments.apart)
    images, spread = arguments.images, arguments.spread
    return Network(model, dataset, variables, found, images, spread)


def kept_apart(dataset: Any, number: int) -> Any:
    """The data set with so many training images in place of its test split."""
    order = np.random.default_rng(0).permutation(dataset.train.size)
    test, train = (
        dataset.train._replace(
            images=dataset.train.images[chosen], labels=dataset.train.labels[chosen]
        )
        for chosen in (order[:number], order[number:])
    )
    return dataset._replace(train=train, test=test)


def by_magnitude(
    given: Network, budget: str, share: float, seed: int
) -> tuple[Any, Any]:
    """The filters of the lowest L1 norm go, the same share of each layer.

    Li et al. 2017, arXiv:1608.08710.
    """
    del seed
    leaves = leaves_by_path(given.variables)
    losses: dict[int, float] = {}
    for family in given.found.families:
        norms = np.zeros(len(family.units))
        for member in family.members:
            if member.role == "outputs":
                made = np.moveaxis(np.abs(leaves[member.path]), member.axis, 0)
                norms += made.reshape(len(made), -1).sum(1)[member.entries].sum(1)
        losses |= dict(zip(family.units, norms.tolist(), strict=True))
    goal = goal_of(given.found, None, {budget: share})
    gone: set[int] = set()
    counts = counts_of(given.found, *goal)
    for family, count in zip(given.found.families, counts, strict=True):
        gone.update(sorted(family.units, key=losses.__getitem__)[:count])
    masks = given.found.masks(kernels(given.variables), gone)
    return given.variables, masks


def by_woodfisher(
    given: Network, budget: str, share: float, seed: int, *, recompute: int = 0
) -> tuple[Any, Any]:
    """Structures by their joint saliency, and the joint update.

    In one step, or with so many more, each of which takes the same share of what is
    left; the Fisher matrix is that of the network as it then is.
    """
    if budget != "macs":
        raise SystemExit(f"woodfisher has no budget of {budget}; leave its row out")
    drawn = batches.fisher_samples(given.dataset, seed=seed, draw=0, count=1000)

    def loss_fn(variables: Any, batch: dict[str, Any]) -> jax.Array:
        logits = given.outputs(variables, batch["image"])
        return jnp.mean(cross_entropy(logits, batch["label"], 0.0))

    variables, masks, _ = wf.prune(
        loss_fn,
        given.variables,
        drawn,
        pattern=given.found,
        flops_target=share * given.found.macs / 1e6,
        masks=kernels(given.variables),
        update="joint",
        damping="auto",
        num_samples=500,
        recompute=recompute,
        recompute_schedule="exponential",
        progress=False,
    )
    return variables, masks


def layer_by_layer(options: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    """``wf.prune_layerwise`` with these options, from images alone."""

    def run(given: Network, budget: str, share: float, seed: int) -> tuple[Any, Any]:
        drawn = batches.fisher_samples(
            given.dataset, seed=seed, draw=0, count=given.images, augment=True
        )
        assert isinstance(drawn, dict)
        goal: dict[str, Any] = {budget: share}
        if options.get("scope") == "global":
            goal["spread"] = given.spread
        variables, masks, _ = wf.prune_layerwise(
            given.outputs,
            given.variables,
            drawn["image"],
            pattern=given.found,
            masks=kernels(given.variables),
            batch_size=100,
            damping=0.01,  # As in the figures of docs/benchmarks.md.
            progress=False,
            **goal,
            **options,
        )
        return variables, masks

    return run


def kernels(variables: Any) -> dict[str, Any]:
    """Masks of all layers, nothing pruned."""
    return wf.init_masks(variables, "kernel")


METHODS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "magnitude filters": by_magnitude,
    "woodfisher": by_woodfisher,
    "woodfisher, four steps": partial(by_woodfisher, recompute=3),
    **{name: layer_by_layer(options) for name, options in LAYERWISE.items()},
}


def onward(rate: float) -> Callable[[int], optax.GradientTransformation]:
    """SGD with momentum for so many steps; the rate falls to zero as a cosine does."""
    return lambda steps: optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9),
    )


def from_nothing(steps: int) -> optax.GradientTransformation:
    """AdamW for a transformer that starts from random weights."""
    rates = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps)
    return optax.adamw(rates, weight_decay=0.05)


def divergence(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """KL divergence of softened outputs (Hinton et al. 2015, arXiv:1503.02531)."""
    softness = 2.0
    log_q, log_p = (jax.nn.log_softmax(z / softness) for z in (logits, wanted))
    return softness**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def trained(
    model: Any,
    dataset: Any,
    variables: Any,
    epochs: int,
    seed: int,
    optimizer_for: Callable[[int], optax.GradientTransformation],
    teacher: Network | None = None,
) -> Any:
    """Some epochs of training in batches of 128, by labels or by a teacher's logits."""
    size = 128
    steps = batches.steps_per_epoch(dataset, size)
    optimizer = optimizer_for(epochs * steps)

    def loss_fn(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, changed = model.apply(
            {"params": params, **stats},
            batch["image"],
            train=True,
            mutable=list(stats),
        )
        if teacher is None:
            return jnp.mean(cross_entropy(logits, batch["label"], 0.0)), changed
        wanted = teacher.outputs(teacher.variables, batch["image"])
        return jnp.mean(divergence(logits, wanted)), changed

    @jax.jit
    def step(params: Any, stats: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        with fast_weight_gradients():
            slopes, changed = jax.grad(loss_fn, has_aux=True)(params, stats, batch)
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), {**stats, **changed}, state

    params = variables["params"]
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    state = optimizer.init(params)
    for epoch in range(epochs):
        for batch in batches.epoch_batches(
            dataset, seed=seed, epoch=epoch, start=0, stop=steps, batch_size=size
        ):
            params, stats, state = step(params, stats, state, batch)
    return {"params": params, **stats}


def judged(model: Any, dataset: Any, variables: Any) -> float:
    """Top-1 on the test split, in percent."""
    stats = variables.get("batch_stats", {})
    return evaluate(model, variables["params"], stats, dataset)["top1"]


def anew(model: Any, dataset: Any, variables: Any, seed: int) -> Any:
    """The variables with batch-norm statistics estimated again."""
    if "batch_stats" not in variables:
        return variables
    images = batches.batch_norm_batches(
        dataset, seed=seed, draw=0, count=5000, batch_size=250
    )
    stats = reestimate(model, variables["params"], variables["batch_stats"], images)
    return {"params": variables["params"], "batch_stats": stats}


def latencies(given: Network, model: Any, small: Any) -> list[str]:
    """Whole forward passes, dense and small: under jit, and ONNX Runtime if there."""
    shape = given.dataset.train.images.shape[1:]
    lines = []
    for size in (1, 64):
        images = np.random.default_rng(0).standard_normal((size, *shape), np.float32)
        passes = (given.model.apply, given.variables), (model.apply, small)
        lines.append(forward_line(forward_latency(*passes, images)))
        if runs_onnx():
            networks = (given.model, given.variables), (model, small)
            lines.append(forward_line(onnx_latency(*networks, images)))
    return lines


def run(
    given: Network, row: str, share: float, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Prunes, takes out, trains and judges once."""
    start = time.process_time()
    variables, masks = METHODS[row](given, arguments.budget, share, seed)
    seconds = time.process_time() - start
    drawn = batches.fisher_samples(given.dataset, seed=0, draw=0, count=2)
    assert isinstance(drawn, dict)
    image = jnp.asarray(drawn["image"])
    _, small = wf.shrunk(given.outputs, variables, masks, image)
    model = models.resized(given.model, small, image)
    account = given.found.account(given.found.gone(masks))
    if arguments.latency:
        for line in latencies(given, model, small):
            print(f"{row}, {share:g} of {arguments.budget}: {line}", flush=True)
    found = {
        "row": row,
        "budget": arguments.budget,
        "share": share,
        "macs_left": account.left["macs"] / given.found.macs,
        "size_left": models.num_parameters(small["params"])
        / models.num_parameters(given.variables["params"]),
        "seed": seed,
        "spread": given.spread,
        "apart": arguments.apart,
        "cpu_seconds": round(seconds, 1),
        "top1_stored": judged(model, given.dataset, small),
    }
    small = anew(model, given.dataset, small, seed)
    found["top1"] = judged(model, given.dataset, small)
    if arguments.epochs:
        onward_for = onward(arguments.rate)
        small = trained(
            model,
            given.dataset,
            small,
            arguments.epochs,
            seed,
            onward_for,
            given if arguments.taught else None,
        )
        key = "top1_taught" if arguments.taught else "top1_trained"
        found[key] = judged(model, given.dataset, small)
    return found


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: a row a method, a column a share, top-1 by what was done.

    Without training the better use of statistics is not chosen: both are given.
    """
    shares = sorted({r["share"] for r in records}, reverse=True)
    lines = [
        "| method | top-1 | " + " | ".join(f"{s:g}" for s in shares) + " | s |",
        "|---" * (len(shares) + 3) + "|",
    ]
    keys = {
        "top1_stored": "statistics of the checkpoint",
        "top1": "estimated again",
        "top1_trained": "trained",
        "top1_taught": "taught",
    }
    for row in dict.fromkeys(r["row"] for r in records):
        mine = [r for r in records if r["row"] == row]
        for key, name in keys.items():
            cells = []
            for share in shares:
                values = [r[key] for r in mine if r["share"] == share and key in r]
                spread = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
                mean = f"{statistics.mean(values):.2f}{spread}" if values else ""
                cells.append(mean)
            if any(cells):
                typical = statistics.median(r["cpu_seconds"] for r in mine)
                lines.append(
                    f"| {row} | {name} | {' | '.join(cells)} | {typical:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Runs the rows and prints their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--budget", choices=("macs", "latency"), default="macs")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.75, 0.5, 0.35, 0.25],
        help="of the budget that are left",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of training; 0 for none")
    parser.add_argument(
        "--taught",
        action="store_true",
        help="train on the outputs of the dense network, not on labels",
    )
    parser.add_argument("--rate", type=float, default=0.02, help="of learning")
    parser.add_argument(
        "--dense-epochs",
        type=int,
        default=8,
        help="of training where --checkpoint is not there",
    )
    parser.add_argument("--latency", action="store_true", help="time forward passes")
    parser.add_argument(
        "--apart", type=int, default=0, help="training images that judge"
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="that prune layer by layer"
    )
    parser.add_argument(
        "--spread", type=float, default=0.2, help="of the rows with global in them"
    )
    parser.add_argument("--out", type=Path, help="file for one JSON line a run")
    arguments = parser.parse_args()
    given = network(arguments)
    dense = judged(given.model, given.dataset, given.variables)
    print(f"dense: {dense:.2f}, {given.found.macs:,.0f} MACs", flush=True)
    records = []
    for seed in arguments.seeds:
        for share in arguments.shares:
            for row in arguments.rows:
                records.append(run(given, row, share, seed, arguments))
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
