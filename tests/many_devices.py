"""Prunes a small network and saves the outcome; run by test_sharding.py.

    python many_devices.py OUT MANY [PORT RANK PROCESSES]

MANY is 1 to spread nothing, else the work goes over all devices of all processes.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import woodfisher_jax as wf

CASES = {
    "blocks": {"method": "woodfisherblock", "block_size": 50},
    "tensors": {"method": "woodfisherblock", "scope": "layer"},
    "full": {"method": "woodfisher", "damping": 1e-3},
    "means": {"method": "woodfisherblock", "batch_size": 3, "microbatch_size": 6},
    "microbatches": {"batch_size": 4, "microbatch_size": 2, "num_samples": 20},
    "host": {"method": "woodfisherblock", "block_size": 64, "store": "host"},
    "disk": {"method": "woodfisherblock", "block_size": 64, "store": "disk"},
    "recompute": {"method": "woodfisherblock", "block_size": 9, "store": "recompute"},
    "half": {"block_size": 50, "store": "disk", "store_dtype": "bfloat16"},
    "diagonal": {"method": "diagfisher"},
    "magnitude": {"method": "globalmagni"},
}


class Net(nn.Module):
    """A convolution and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        features = nn.relu(nn.Conv(8, (3, 3), name="conv")(images))
        return nn.Dense(7, name="fc")(features.reshape(len(images), -1))


def problem() -> tuple:
    """A loss, params and 83 samples, the same in every process."""
    random = np.random.default_rng(0)
    net = Net()
    images = random.standard_normal((83, 6, 6, 3)).astype(np.float32)
    labels = random.integers(0, 7, 83)
    params = net.init(jax.random.key(0), images[:1])["params"]

    def loss(params, batch):
        logits = net.apply({"params": params}, batch[0])
        chosen = jnp.take_along_axis(logits, batch[1][:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    return loss, jax.tree.map(np.asarray, params), (images, labels)


def main() -> None:
    """Runs every case."""
    out, many, *rest = sys.argv[1:]
    if rest:
        port, rank, processes = map(int, rest)
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    mesh = None if many == "1" else Mesh(np.asarray(jax.devices()), ("x",))
    loss, params, samples = problem()
    found = {"devices": np.asarray(jax.device_count())}
    for name, options in CASES.items():
        pruned, masks, info = wf.prune(
            loss, params, samples, sparsity=0.7, mesh=mesh, **options
        )
        # From there on once more: masks and params that are spread already.
        pruned, masks, info = wf.prune(
            loss, pruned, samples, sparsity=0.9, masks=masks, mesh=mesh, **options
        )
        found[f"{name}/nonzero"] = np.asarray(info.nonzero)
        for layer in params:
            path = f"{layer}/kernel"
            found[f"{name}/{path}"] = np.asarray(pruned[layer]["kernel"])
            found[f"{name}/{path}/mask"] = np.asarray(masks[path])
    np.savez(Path(out), **found)


if __name__ == "__main__":
    main()
