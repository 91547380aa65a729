"""Per-sample gradients of ResNet-20 beside the batch gradient of the same images.

python scripts/bench_gradients.py
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from bench_pruning import processor

import woodfisher_jax as wf
from woodfisher_jax import models
from woodfisher_jax.report import environment
from woodfisher_jax.rows.gradients import as_partial, row_chunks
from woodfisher_jax.training.network.objective import frozen_loss
from woodfisher_jax.trees.blocks import flat_order

IMAGES = 256


def fastest(run: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds an image of the fastest of some runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return 1e3 * min(found) / IMAGES


def main() -> None:
    """Times both for several numbers of images at once."""
    model = models.build_model("resnet20")
    random = np.random.default_rng(0)
    images = random.standard_normal((IMAGES, 32, 32, 3), np.float32)
    samples: dict[str, np.ndarray] = {
        "image": images,
        "label": random.integers(0, 10, IMAGES),
    }
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    params = variables["params"]
    loss_fn, masks = frozen_loss(model, variables["batch_stats"]), wf.init_masks(params)
    gradient = jax.jit(jax.grad(loss_fn))
    order = flat_order(masks)
    loss = as_partial(loss_fn)
    problem = wf.Problem(loss, params, masks, samples, order, num_samples=IMAGES)

    def whole(size: int) -> Any:
        return [
            gradient(params, {k: v[i : i + size] for k, v in samples.items()})
            for i in range(0, IMAGES, size)
        ]

    def each(size: int) -> Any:
        return [jax.block_until_ready(chunk) for chunk in row_chunks(problem, size)]

    planned = wf.plan_pruning(loss_fn, params, samples, sparsity=0.5)
    assert planned is not None
    rows = [(size, fastest(partial(whole, size))) for size in (8, 16, 64, IMAGES)]
    sizes = sorted({8, 16, 64, planned.microbatch_size})
    per_sample = [(size, fastest(partial(each, size))) for size in sizes]
    chosen = dict(per_sample)[planned.microbatch_size]
    result = {
        "benchmark": "per-sample gradients of resnet20",
        "processor": processor(),
        "batch_ms_an_image": rows,
        "per_sample_ms_an_image": per_sample,
        "planned_microbatch_size": planned.microbatch_size,
        "ratio": chosen / min(ms for _, ms in rows),
        **environment.environment(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
