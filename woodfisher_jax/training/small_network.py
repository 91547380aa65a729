"""The network of a run without the structures that its masks have emptied."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import models
from woodfisher_jax.shrink import shrunk
from woodfisher_jax.training.network.objective import predict
from woodfisher_jax.training.resuming.saved_run import SavedRun
from woodfisher_jax.trees.paths import leaves_by_path


def without_structures(run: SavedRun, image_shape: tuple[int, ...]) -> SavedRun:
    """Takes out of the network of a run what its masks have emptied.

    Args:
        run: Pruned with a pattern of structures, or so that some are empty.
        image_shape: [h, w, c] of its inputs.

    Returns:
        The run with smaller variables and masks, and in its config ``widths`` of the
        model. In masks a weight that is zero counts as pruned.

    Raises:
        ValueError: If outputs would change, or nothing can be taken out.
    """
    settings = run.config.model
    model = models.build_model(settings.name, **settings.settings)

    def net_fn(variables: Any, images: jax.Array) -> jax.Array:
        return predict(model, variables, images)

    images = np.random.default_rng(0).standard_normal((2, *image_shape), np.float32)
    variables = jax.tree.map(jnp.asarray, run.variables)
    masks = {f"params/{path}": jnp.asarray(mask) for path, mask in run.masks.items()}
    _, small = shrunk(net_fn, variables, masks, images)
    resized = models.resized(model, small, images)
    if resized is model:
        raise ValueError(
            "the masks of the run leave something of every channel, neuron and head; "
            "expected a run that was pruned with prune.pattern='structures'"
        )
    widths = {"widths": dict(resized.widths)}
    changed = dataclasses.replace(settings, settings={**settings.settings, **widths})
    leaves = leaves_by_path(small["params"])
    return run._replace(
        config=dataclasses.replace(run.config, model=changed),
        variables=jax.tree.map(np.asarray, small),
        masks={path: np.asarray(leaves[path]) != 0 for path in run.masks},
    )
