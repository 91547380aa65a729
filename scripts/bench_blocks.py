"""Diagonal and update of a block beside the matrix products they cannot do without.

    python scripts/bench_blocks.py [--plot=docs/images/cost.png]

For each (c, N): the seconds of two [N, c] x [c, N] products alone; of diag(F⁻¹) and one
product F⁻¹v, checked for precision, called for one block and for several; and
of the sequential rank-1 recursion in plain NumPy, all in one process. With --plot, the
cost of a step's curvature over c at fixed d, and over d at fixed c.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from bench_pruning import processor, sequential_inverse
from rich.console import Console
from rich.table import Table

from woodfisher_jax.curvature import checked
from woodfisher_jax.equations.fisher import choose_solver
from woodfisher_jax.equations.precision import matmul
from woodfisher_jax.report import environment

SIZES = ((2000, 400), (500, 100), (2000, 100), (2000, 1000), (10000, 400), (784, 1000))
DAMPING = 1e-2
TOGETHER = 2**25


def seconds(
    *calls: Callable[[], Any], repeats: int = 15, budget: float = 20.0
) -> list[float]:
    """Median wall times of calls, in turn, after one of each that compiles."""
    for call in calls:
        jax.block_until_ready(call())
    found: list[list[float]] = []
    started = time.perf_counter()
    while len(found) < repeats and (
        len(found) < 3 or time.perf_counter() - started < budget
    ):
        found.append([])
        for call in calls:
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[-1].append(time.perf_counter() - start)
    return np.median(found, axis=0).tolist()


@jax.jit
def two_products(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, c] x [c, N], twice, on different numbers."""
    return matmul(first, first.T), matmul(second, first.T)


def ours(gradients: jax.Array, vectors: jax.Array) -> jax.Array:
    """Diagonals and products of blocks, as a pruning step computes them."""
    _, num_samples, width = gradients.shape
    solver, names = choose_solver(num_samples, width), [""] * len(gradients)
    found = checked.checked_blocks(
        checked.diagonal, gradients, (), DAMPING, solver, names
    )
    assert found.factor is not None
    others = (vectors / found.value, found.factor)
    return checked.checked_blocks(
        checked.product, gradients, others, DAMPING, solver, names
    ).value


def measure(width: int, num_samples: int, random: np.random.Generator) -> dict:
    """All times of one (c, N)."""
    number = max(2, TOGETHER // (num_samples * width))
    shape = (number, num_samples, width)
    blocks = jnp.asarray(random.standard_normal(shape, np.float32))
    vectors = jnp.asarray(random.standard_normal((number, width), np.float32))
    one, vector = blocks[:1], vectors[:1]
    first, second = blocks[0], blocks[1]
    array = np.asarray(first)
    start = time.perf_counter()
    inverse = sequential_inverse(array, DAMPING)
    inverse @ (np.asarray(vector[0]) / np.diagonal(inverse))
    sequential = time.perf_counter() - start
    products, of_one, of_several = seconds(
        lambda: two_products(first, second),
        lambda: ours(one, vector),
        lambda: ours(blocks, vectors),
    )
    return {
        "c": width,
        "N": num_samples,
        "solver": choose_solver(num_samples, width),
        "two_products": products,
        "one_block": of_one,
        "of_several": of_several / number,
        "several": number,
        "sequential": sequential,
    }


def show(rows: list[dict]) -> None:
    """Prints the table and the line of JSON."""
    table = Table(title=f"diagonal and update of one block, {processor()}, float32")
    for heading in (
        "c",
        "N",
        "solver",
        "two products, ms",
        "one block, ms",
        "x products",
        "of several, ms",
        "x products",
        "sequential, ms",
        "faster by",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        floor, several = row["two_products"], row["of_several"]
        table.add_row(
            str(row["c"]),
            str(row["N"]),
            row["solver"],
            f"{1e3 * floor:.2f}",
            f"{1e3 * row['one_block']:.2f}",
            f"{row['one_block'] / floor:.2f}",
            f"{1e3 * several:.2f}",
            f"{several / floor:.2f}",
            f"{1e3 * row['sequential']:.0f}",
            f"{row['sequential'] / row['one_block']:.0f}",
        )
    Console(width=120).print(table)
    print(
        json.dumps(
            {
                "benchmark": "blocks",
                "processor": processor(),
                "rows": rows,
                **environment.environment(),
            }
        )
    )


def plot(path: Path, random: np.random.Generator) -> None:
    """Seconds for all blocks of a step, over c at fixed d and over d at fixed c."""
    num_samples = 100
    numbers = random.standard_normal(num_samples * 2_000_000).astype(np.float32)

    def cost(width: int, weights: int) -> float:
        number = weights // width
        gradients = jnp.asarray(
            numbers[: number * num_samples * width].reshape(number, num_samples, width)
        )
        vectors = jnp.ones((number, width), jnp.float32)
        return seconds(lambda: ours(gradients, vectors), repeats=5)[0]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    widths = (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
    times = [cost(width, 400_000) for width in widths]
    left.loglog(widths, times, "o-")
    left.set(xlabel="block size c", ylabel="seconds", title="d = 400,000, N = 100")
    left.set_ylim(min(times) / 10, max(times) * 10)
    sizes = (50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000)
    spent = [cost(2000, size) for size in sizes]
    right.loglog(sizes, spent, "o-", label="measured")
    right.loglog(
        sizes, [spent[-1] * s / sizes[-1] for s in sizes], "--", label="linear"
    )
    right.set(xlabel="prunable weights d", title="c = 2,000, N = 100")
    right.legend()
    figure.savefig(path, dpi=120)
    print(json.dumps({"benchmark": "cost over c", "c": widths, "seconds": times}))
    print(json.dumps({"benchmark": "cost over d", "d": sizes, "seconds": spent}))


def main() -> None:
    """Measures every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    show([measure(width, num_samples, random) for width, num_samples in SIZES])
    if arguments.plot:
        plot(arguments.plot, random)


if __name__ == "__main__":
    main()
