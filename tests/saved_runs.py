"""Folders of runs with random weights, written without training."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import models
from woodfisher_jax.training.config import from_dict, to_dict
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.trees.masks import apply_masks
from woodfisher_jax.trees.paths import leaves_by_path


def random_network(
    name: str, image_shape: tuple[int, ...], sparsity: float, seed: int = 0, **settings
) -> tuple[Any, dict[str, jax.Array]]:
    """Variables of a model, and masks of its kernels, applied."""
    model = models.build_model(name, **settings)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), shapes
    )
    masks = {
        path: jnp.asarray(rng.random(leaf.shape) >= sparsity)
        for path, leaf in leaves_by_path(shapes["params"]).items()
        if path.endswith("kernel")
    }
    variables["params"] = jax.jit(apply_masks)(variables["params"], masks)
    return variables, masks


def save_run(
    folder: Path,
    model: dict[str, Any],
    saves: dict[int, tuple[Any, Any]],
    data: str = "digits",
) -> Path:
    """A run with saves from event to (variables, masks), of which the first is best."""
    config = from_dict({"model": model, "data": {"name": data}})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        for number, (event, (variables, masks)) in enumerate(saves.items()):
            arrays = {
                "params": variables["params"],
                "batch_stats": variables.get("batch_stats", {}),
                "masks": masks,
                "average": variables.get("average", {}),
            }
            metrics = {"stage": 1, "top1": 90.0 - number}
            meta = {"log": {"step": event}}
            checkpoint.save(manager, event, arrays, meta, metrics)
    return folder
