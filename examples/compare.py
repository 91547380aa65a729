"""Runs all examples with several seeds and prints a table.

python examples/compare.py --seeds=3 [--only plain_dict]
"""

import argparse
import importlib
import statistics
import time

EXAMPLES = {
    "flax_linen": "Flax Linen, convolutions, top-1 %",
    "flax_nnx": "Flax NNX, perceptron, top-1 %",
    "equinox_mlp": "Equinox, perceptron, top-1 %",
    "plain_dict": "dict of arrays, perceptron, top-1 %",
    "transformer_text": "decoder-only transformer, perplexity (lower is better)",
}
"""Modules of this folder: model and metric of each."""


def shown(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Runs every example.")
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds (default: 3)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=EXAMPLES,
        default=list(EXAMPLES),
        help="modules of this folder (default: all)",
    )
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    print(
        "| model | dense | WoodFisher, 90 % | global magnitude, 90 % "
        "| prune_outputs after training, 90 % | s a seed |"
    )
    print("|---|---|---|---|---|---|")
    for name in arguments.only:
        title = EXAMPLES[name]
        try:
            example = importlib.import_module(name)
        except ImportError as error:
            print(f"| {title} | not run: {error} | | | | |", flush=True)
            continue
        started = time.perf_counter()
        found = [example.run(seed) for seed in seeds]
        seconds = (time.perf_counter() - started) / len(seeds)
        columns = [
            shown([one[key] for one in found])
            for key in ("dense", "woodfisher", "magnitude", "outputs")
        ]
        print(f"| {title} | {' | '.join(columns)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
