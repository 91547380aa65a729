"""Commands of sweeps, one a line: a config and a grid of overrides.

    python scripts/sweep.py mlpnet_kfac --init_from=mnist_25_epoch_93.97.ckpt | sh
    python scripts/sweep.py digits_gradual | sh
    python -m woodfisher_jax.report runs/digits_gradual --out=table.html

They are the original's, and those of the tables of gradual runs in docs/benchmarks.md.

Each run goes to a folder of its own under --runs (default runs/<sweep>); repeated, the
command resumes it. ``--list`` names the sweeps.
"""

import argparse
import itertools
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple


class Sweep(NamedTuple):
    """The runs of one table.

    Attributes:
        original: Its script in the original, or what it is.
        config: Config file here.
        fixed: Fields that all runs share.
        grid: Alternatives of one axis each, as fields; runs are all combinations.
    """

    original: str
    config: str
    fixed: dict[str, Any]
    grid: tuple[tuple[dict[str, Any], ...], ...]


def sparsities(*levels: float) -> tuple[dict[str, Any], ...]:
    """An axis of targets."""
    return tuple({"prune.target_sparsity": level} for level in levels)


def seeds(number: int) -> tuple[dict[str, Any], ...]:
    """An axis of seeds 0, 1, ..."""
    return tuple({"seed": seed} for seed in range(number))


TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

MLP_ONE_SHOT = {
    "prune.prunable": None,
    "prune.one_shot": True,
    "train.batch_size": 64,
    "prune.damping": 1e-5,
}

SWEEPS = {
    "mlpnet_oneshot": Sweep(
        "sweep_mlpnet_oneshot.sh",
        "configs/mnist_mlpnet_original.py",
        {"prune.prunable": None, "prune.num_samples": 8000},
        (
            (
                {"prune.method": "woodtaylor", "prune.damping": 0.1},
                {"prune.method": "woodfisher"},
                {"prune.method": "magni"},
                {"prune.method": "globalmagni"},
                {"prune.method": "diagfisher", "prune.scope": "layer"},
            ),
            sparsities(*TENTHS, 0.98),
            seeds(4),
        ),
    ),
    "mlpnet_kfac": Sweep(
        "sweep_mlpnet_kfac_aug_12.sh",
        "configs/mnist_mlpnet_original.py",
        MLP_ONE_SHOT,
        (
            (
                {"prune.method": "kfac", "prune.num_samples": 50_000},
                {
                    "prune.method": "kfac",
                    "prune.num_samples": 50_000,
                    "prune.pi": True,
                },
                {
                    "prune.method": "woodfisherblock",
                    "prune.num_samples": 5000,
                    "prune.batch_size": 10,
                },
                {"prune.method": "globalmagni"},
            ),
            sparsities(*TENTHS, 0.95, 0.98),
            seeds(4),
        ),
    ),
    "mnist_tests": Sweep(
        "tests/mnist_tests.sh",
        "configs/mnist_mlpnet_original.py",
        {**MLP_ONE_SHOT, "prune.target_sparsity": 0.95, "seed": 1},
        (
            (
                {"prune.method": "kfac", "prune.num_samples": 100},
                {"prune.method": "woodfisherblock", "prune.num_samples": 100},
                {
                    "prune.method": "diagfisher",
                    "prune.num_samples": 4096,
                    "prune.scope": "layer",
                },
            ),
        ),
    ),
    "resnet20_oneshot": Sweep(
        "sweep_cifar10_resnet20_oneshot.sh",
        "configs/cifar10_resnet20_original.py",
        {
            "prune.prunable": r"layer\d/block\d/conv\d/kernel",
            "prune.end": 2,
            "train.epochs": 3,
        },
        (
            (
                *(
                    {"prune.method": "woodfisherblock", "prune.batch_size": size}
                    for size in (1, 50)
                ),
                {"prune.method": "globalmagni"},
                {"prune.method": "magni"},
                {"prune.method": "diagfisher", "prune.scope": "layer"},
            ),
            sparsities(*TENTHS, 0.98),
            seeds(3),
        ),
    ),
    "resnet50_layerwise": Sweep(
        "sweep_resnet50_lobs_comparison_oneshot.sh",
        "configs/resnet50.py",
        {"prune.one_shot": True, "prune.scope": "layer", "train.batch_size": 256},
        (sparsities(*TENTHS[:6], 0.65), seeds(3)),
    ),
    "digits_gradual": Sweep(
        "gradual, and by magnitude beside it",
        "configs/digits.py",
        {},
        (sparsities(0.8, 0.9, 0.95), seeds(3)),
    ),
    "digits_gradual_short": Sweep(
        "the same in one epoch",
        "configs/digits.py:short",
        {},
        (sparsities(0.8, 0.9, 0.95), seeds(3)),
    ),
    "mnist_gradual": Sweep(
        "gradual, and by magnitude beside it",
        "configs/mnist_mlpnet.py",
        {},
        (sparsities(0.9, 0.95), seeds(3)),
    ),
}


def runs(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The fields of each run; what a method has nothing to do with seeds runs once."""
    for choices in itertools.product(*sweep.grid):
        fields = dict(sweep.fixed)
        for choice in choices:
            fields |= choice
        trained = not fields.get("prune.one_shot")
        magnitude = fields.get("prune.method") in ("magni", "globalmagni")
        if not (magnitude and not trained and fields.get("seed", 0) > 0):
            yield fields


def command(sweep: Sweep, fields: dict[str, Any], folder: str) -> str:
    """The command line of one run."""
    words = [
        str(value)
        for field, value in fields.items()
        if any(field in choice for axis in sweep.grid for choice in axis)
    ]
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    return shlex.join(
        [
            "python",
            "-m",
            "woodfisher_jax.main",
            f"--config={sweep.config}",
            *overrides,
            f"--workdir={folder}/{'-'.join(words)}",
        ]
    )


def main() -> None:
    """Prints the commands of one sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", choices=SWEEPS)
    parser.add_argument("--init_from", help="checkpoint of the dense network")
    parser.add_argument("--runs", help="parent of the folders of the runs")
    parser.add_argument("--list", action="store_true", help="name the sweeps")
    arguments = parser.parse_args()
    if arguments.list or arguments.sweep is None:
        for name, sweep in SWEEPS.items():
            print(f"{name}: {sweep.original}, {len(list(runs(sweep)))} runs")
        return
    sweep = SWEEPS[arguments.sweep]
    for fields in runs(sweep):
        if arguments.init_from:
            fields = {**fields, "init_from": arguments.init_from}
        print(command(sweep, fields, arguments.runs or f"runs/{arguments.sweep}"))


if __name__ == "__main__":
    main()
