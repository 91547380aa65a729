"""Prunes small networks and saves the outcome; run by test_sharding.py.

    python many_devices.py OUT MANY CASES [PORT RANK PROCESSES]

MANY is 1 to spread nothing, else the work goes over all devices of all processes.
CASES are names joined by commas.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import woodfisher_jax as wf
from woodfisher_jax.curvature import inverse
from woodfisher_jax.rows.gradients import as_partial, row_chunks
from woodfisher_jax.rows.sharding import one_axis, replicate
from woodfisher_jax.trees.blocks import flat_order

NETWORKS = {
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
    "growing": {"method": "woodfisherblockdynamic", "block_size": 50},
    "across": {"method": "woodfisherblockgroup", "block_size": 50},
    "centered": {"block_size": 50, "centered": True, "diagnostics": True},
    "slope": {"method": "woodtaylorblock", "damping": 1e-2, "diagnostics": True},
    "kronecker": {"method": "kfac", "damping": 1e-2},
    "groups": {"block_size": 50, "pattern": "2x2", "update": "joint"},
}

Found = dict[str, np.ndarray]


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


def network(mesh: Mesh | None, **options) -> Found:
    """Two pruning steps of the network."""
    loss, params, samples = problem()
    found = {}
    pruned, masks, info = wf.prune(
        loss, params, samples, sparsity=0.7, mesh=mesh, **options
    )
    # From there on once more: masks and params that are spread already.
    pruned, masks, info = wf.prune(
        loss, pruned, samples, sparsity=0.9, masks=masks, mesh=mesh, **options
    )
    found["nonzero"] = np.asarray(info.nonzero)
    if options.get("diagnostics"):
        figures = (info.predicted_loss_increase, info.gradient_term, info.saliency_sum)
        found["figures"] = np.asarray(figures, np.float32)
    for layer in params:
        path = f"{layer}/kernel"
        found[path] = np.asarray(pruned[layer]["kernel"])
        found[f"{path}/mask"] = np.asarray(masks[path])
    return found


def gradients(mesh: Mesh | None, **options) -> Found:
    """Gradients of single samples, in order."""
    loss, params, samples = problem()
    masks = wf.init_masks(params)
    axis, size = one_axis(mesh), options.pop("microbatch_size", 64)
    compute = wf.Compute(mesh=axis)
    problem_ = wf.Problem(
        as_partial(loss),
        params,
        masks,
        samples,
        flat_order(masks),
        compute=compute,
        **options,
    )
    rows = [np.asarray(replicate(chunk, axis)) for chunk in row_chunks(problem_, size)]
    return {"rows": np.concatenate(rows)}


# ------------------------------------------- gradients that are given: <params, sample>

SHAPES = {"a": (5, 8), "b": (4, 10), "c": (3, 8)}
"""13 blocks of 8: no number of devices divides them."""


def inner_product(params, batch):
    """A loss whose gradient at an example is the example."""
    terms = (jnp.sum(params[p] * g, axis=(1, 2)) for p, g in batch.items())
    return jnp.mean(sum(terms))


def given(mesh: Mesh | None, count: int, scale: dict[str, float], **options) -> Found:
    """A step from gradients that are given."""
    random = np.random.default_rng(1)
    shapes = options.pop("shapes", SHAPES)
    samples = {
        path: np.float32(scale.get(path, 1.0) * random.standard_normal((count, *shape)))
        for path, shape in shapes.items()
    }
    params = {p: np.float32(random.standard_normal(s)) for p, s in shapes.items()}
    if options.pop("spoilt", False):
        samples["b"][:] = 1e6
        samples["b"][:, :, 3:] += np.arange(7, dtype=np.float32)
    try:
        pruned, masks, _ = wf.prune(
            inner_product, params, samples, mesh=mesh, **options
        )
    except wf.CurvatureError as error:
        return {"message": np.asarray(str(error).partition("the first in ")[2])}
    found = {path: np.asarray(array) for path, array in pruned.items()}
    return found | {f"{path}/mask": np.asarray(mask) for path, mask in masks.items()}


def swaps_of_few(mesh: Mesh | None) -> Found:
    """Swaps whose supports are gathered, which takes larger blocks otherwise."""
    with patch.multiple(inverse, WORTH_GATHERING=0, FEW=1.0):
        return given(mesh, 6, {}, damping=1e-2, update="joint", swaps=3, **BLOCKS)


BLOCKS = {"block_size": 8, "sparsity": 0.6}
OTHERS = {
    "gradients": lambda mesh: gradients(mesh, num_samples=83),
    "gradients of means": lambda mesh: gradients(
        mesh, num_samples=27, batch_size=3, microbatch_size=7
    ),
    "ill conditioned": lambda mesh: given(
        mesh, 6, {"b": 300.0}, damping=1e-3, **BLOCKS
    ),
    "refused": lambda mesh: given(mesh, 6, {}, damping=1e-9, spoilt=True, **BLOCKS),
    "swaps of few": swaps_of_few,
    "one sample": lambda mesh: given(mesh, 1, {}, damping=1e-2, **BLOCKS),
    "two blocks": lambda mesh: given(
        mesh,
        5,
        {},
        damping=1e-2,
        sparsity=0.5,
        shapes={"one": (1, 1), "few": (1, 3)},
        store="disk",
    ),
}


def main() -> None:
    """Runs the cases."""
    out, many, cases, *rest = sys.argv[1:]
    if rest:
        port, rank, processes = map(int, rest)
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    mesh = None if many == "1" else Mesh(np.asarray(jax.devices()), ("x",))
    found = {"devices": np.asarray(jax.device_count())}
    for case in cases.split(","):
        if case in NETWORKS:
            results = network(mesh, **NETWORKS[case])
        else:
            results = OTHERS[case](mesh)
        found |= {f"{case}/{name}": array for name, array in results.items()}
    np.savez(Path(out), **found)


if __name__ == "__main__":
    main()
