"""The network that a run has saved: its config, variables and masks."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util

from woodfisher_jax.training import checkpoint
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config
from woodfisher_jax.trees.masks import Masks

WHICH = {"latest": checkpoint.latest_event, "best": checkpoint.best_event}
"""Which save of a run, and how it is found."""


class SavedRun(NamedTuple):
    """A network with what it was trained by.

    Attributes:
        config: Of the run.
        variables: Linen variables, ``params`` and, for models that keep them,
            ``batch_stats``; averaged over the steps, if the run has averaged them.
        masks: From parameter path to bool, True = kept.
        meta: What the save holds beside arrays.
    """

    config: Config
    variables: dict[str, Any]
    masks: Masks
    meta: dict[str, Any]


def read_run(path: str | os.PathLike[str], which: str = "latest") -> SavedRun:
    """Reads the network of a run; neither its data set nor its model is needed.

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


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Reads the config that a run was started with.

    Raises:
        ValueError: If the folder holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"workdir={workdir}: there is no config.json, so no run here")
    return config_.from_dict(json.loads(path.read_text()))


def _locate(path: Path) -> tuple[Path, int | None]:
    """The folder of the run, and the number of the save that a path names."""
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None
