"""Bytes and milliseconds of networks at 90 %: the tables on files and sparse products.

    python scripts/bench_export.py [--batch=1]

Random weights and masks; every kernel is pruned, nothing else.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import models
from woodfisher_jax.trees.masks import apply_masks, keep_highest
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.latency import latency
from woodfisher_jax.weights.sparse_files import FORMATS, save_sparse

NETWORKS = {
    "mlp": (28, 28, 1),
    "resnet20": (32, 32, 3),
    "resnet18": (224, 224, 3),
    "resnet50": (224, 224, 3),
    "mobilenet_v1": (224, 224, 3),
    "deit_tiny": (224, 224, 3),
}
"""Model to the shape of its images."""


def network(name: str, sparsity: float) -> tuple:
    """Random variables, and masks by path that keep the same share of each kernel."""
    model = models.build_model(name)
    image = jax.ShapeDtypeStruct((1, *NETWORKS[name]), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes
    )
    masks = {}
    for path, leaf in leaves_by_path(variables).items():
        if path.endswith("kernel"):
            scores = jnp.asarray(rng.random(leaf.size, np.float32))
            kept = round(leaf.size * (1 - sparsity))
            mask = keep_highest(scores, jnp.ones(leaf.size, bool), kept)
            masks[path] = mask.reshape(leaf.shape)
    return apply_masks(variables, masks), masks


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="rows (default: 1)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="(default: 0.9)")
    given = parser.parse_args()
    sizes, times = [], []
    for name in NETWORKS:
        variables, masks = network(name, given.sparsity)
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        shares = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            for format in FORMATS:
                save_sparse(path, variables, masks, format)
                shares.append(f"{100 * path.stat().st_size / dense:.1f}")
        sizes.append(f"| {name} | {dense / 1e6:,.2f} | {' | '.join(shares)} |")
        found = latency(variables, masks, given.batch)
        times.append(
            f"| {name} | {found.dense:.3g} | {found.bcoo:.3g} | {found.csr:.3g} |"
        )
    print(f"| network | dense MB | {' | '.join(FORMATS)} |\n|---|---|---|---|---|")
    print("\n".join(sizes))
    print(f"\nbatch {given.batch}, {found.device}, milliseconds\n")
    print("| network | dense | BCOO | CSR of SciPy |\n|---|---|---|---|")
    print("\n".join(times))


if __name__ == "__main__":
    main()
