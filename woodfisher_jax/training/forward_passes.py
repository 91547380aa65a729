"""Whole forward passes of a run's small network, beside those of its dense one."""

from collections.abc import Sequence

import jax
import numpy as np

from woodfisher_jax import data, models
from woodfisher_jax.training.resuming.saved_run import SavedRun
from woodfisher_jax.weights.latency import (
    BATCH_SIZES,
    ForwardLatency,
    forward_latency,
    onnx_latency,
    runs_onnx,
)


def forward_passes(
    run: SavedRun,
    image_shape: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 20,
) -> list[ForwardLatency]:
    """Times the network of a run and the one that its model is without ``widths``.

    Args:
        run: With a network from which structure was taken out.
        image_shape: [h, w, c]; default that of the run's data set, which is not read.
        batch_sizes: Images a pass; default 1 and 64.
        repeats: Timings of each; default 20.

    Returns:
        One for each batch size under ``jit``, and under ONNX Runtime where that is
        installed with PyTorch; none where the run has all of its model's outputs. The
        dense network has random weights.
    """
    settings = dict(run.config.model.settings)
    if not settings.pop("widths", None):
        return []
    name = run.config.model.name
    if image_shape is None:
        stand_in = data.stand_in(run.config.data.name, 1, run.config.data)
        image_shape = stand_in.image_shape
    small = models.build_model(name, **run.config.model.settings)
    dense = models.build_model(name, **settings)
    rng = np.random.default_rng(0)
    image = np.zeros((1, *image_shape), np.float32)
    variables = jax.jit(dense.init)(jax.random.key(0), image)
    found = []
    for size in batch_sizes:
        images = rng.standard_normal((size, *image_shape), np.float32)
        passes = (dense.apply, variables), (small.apply, run.variables)
        found.append(forward_latency(*passes, images, repeats))
        if runs_onnx():
            networks = (dense, variables), (small, run.variables)
            found.append(onnx_latency(*networks, images, repeats))
    return found
