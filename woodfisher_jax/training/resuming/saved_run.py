"""The network that a run has saved: its config, variables and masks."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from woodfisher_jax.report.record import no_run
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.weights.state_dicts import mask_name, to_state_dict
from woodfisher_jax.weights.torch_files import read_state_dict

WHICH = {"latest": checkpoint.latest_event, "best": checkpoint.best_event}
"""Which save of a run, and the function that finds it."""


class SavedRun(NamedTuple):
    """A network, with the config that it was trained by.

    Attributes:
        config: Of the run.
        variables: Linen variables, ``params`` and, for models that have them,
            ``batch_stats``; averaged over the steps, if the run has averaged them.
        masks: From parameter path to bool, True = kept.
        meta: Content of the save other than arrays.
    """

    config: Config
    variables: dict[str, Any]
    masks: Masks
    meta: dict[str, Any]


def read_run(path: str | os.PathLike[str], which: str = "latest") -> SavedRun:
    """Reads the network of a run, without its data set and its model.

    Args:
        path: The folder of the run, or that of one of its saves
            (``runs/digits/checkpoints/123``).
        which: "latest" or "best", where the path is the run's.

    Raises:
        ValueError: If there is no run, no save, or a damaged one.
    """
    workdir, event = _locate(Path(path))
    config = read_config(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"{workdir}: there is no folder checkpoints, so nothing was saved here yet"
        )
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        event = WHICH[which](manager) if event is None else event
        shapes = checkpoint.read_shapes(manager, event)
        names = ["params", "batch_stats", "masks"]
        if shapes.get("average"):
            names = ["average", "masks"]
        target = {name: shapes[name] for name in names}
        arrays, meta = checkpoint.restore(manager, event, target)
    masks = arrays.pop("masks")
    arrays = arrays.get("average") or arrays
    nested = traverse_util.unflatten_dict(arrays, sep="/")
    variables = {
        name: traverse_util.unflatten_dict(flat, sep="/")
        for name, flat in nested.items()
        if flat
    }
    return SavedRun(config, variables, masks, meta)


def read_weights(
    path: str | os.PathLike[str], which: str = "latest"
) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict from a file, or the network of a run as one.

    Args:
        path: A file for `read_state_dict`, or as for `read_run`.
        which: "latest" or "best" save of a run.

    Returns:
        Key to array; the masks of a run under the names of the original's wrapped
        modules, as `to_variables` reads them.

    Raises:
        ValueError: If the file or the run cannot be read.
        FileNotFoundError: If there is neither.
    """
    if not Path(path).is_dir():
        return read_state_dict(path)
    run = read_run(path, which)
    masks = to_state_dict({"params": run.masks})
    return {
        **to_state_dict(run.variables),
        **{mask_name(name): mask for name, mask in masks.items()},
    }


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Reads the config of a run.

    Raises:
        ValueError: If the folder holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise no_run(Path(workdir))
    return config_.build(json.loads(path.read_text()))


def _locate(path: Path) -> tuple[Path, int | None]:
    """The folder of the run, and the number of the save if the path is that of one."""
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None
