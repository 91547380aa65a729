"""Saving a run and resuming it, with Orbax.

A run's saves are numbered by ``event``: optimizer steps taken plus pruning steps done.
It grows with every save, where the step alone would not: a pruning step and the end of
an epoch can share one.

Each named tree of arrays (``params``, ``masks``, ...) is one Orbax item, so that parts
of a save can be restored alone. An item is written flat, from path
(``layer1/conv1/kernel``) to array, and put back into the containers of the target:
what is on disk does not depend on how optax nests its states.

Orbax keeps no checksums of arrays, nor of its JSON. So a save counts as complete once
``SHA256SUMS`` lies in its folder: the checksum of every other file, as the command
``sha256sum -c 46/SHA256SUMS`` reads it in the folder of the saves.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from woodfisher_jax.written_files import WriteError, check_room, replace_file

# Items beside the arrays: the caller's JSON; dtype and shape of every array; and the
# metrics, which Orbax writes under this name.
META, LAYOUT, METRICS = "meta", "layout", "metrics"

SUMS = "SHA256SUMS"
"""The file of checksums in the folder of a save."""

DAMAGED = ".damaged"
"""Suffix of the folder of a save that was set aside."""


def open_manager(directory: str | os.PathLike[str]) -> ocp.CheckpointManager:
    """Opens, and creates where absent, the folder that holds a run's saves.

    The latest two saves and the best one stay, all others are deleted. The best is the
    one with the highest top-1 among those at the highest pruning stage: a dense
    network's accuracy says nothing about the pruned one. Saves that a killed process
    left half-written (``*.orbax-checkpoint-tmp``) are ignored, and overwritten when the
    run comes to the same event again.

    Args:
        directory: the folder; relative paths are taken from the working directory.

    Returns:
        A manager for the functions of this module. Close it, or use it in a ``with``.

    Raises:
        ValueError: a save in the folder is damaged.
    """
    # Orbax accepts absolute paths only. Without `best_fn` it writes no metrics; without
    # the policy it would delete the newest save when that is not among the best.
    directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
        best_fn=_rank,
        best_mode="max",
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                # A damaged latest save leaves the one before it.
                preservation_policy.LatestN(2),
                preservation_policy.BestN(get_metric_fn=_rank, n=1),
            ]
        ),
        enable_async_checkpointing=False,
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except ValueError as error:
        raise ValueError(
            f"cannot open the checkpoints in {directory} ({error!s:.200}); a file in "
            "one of its numbered folders is damaged: start the run again, which "
            "falls back on an earlier save"
        ) from error


def set_damaged_aside(directory: str | os.PathLike[str]) -> list[str]:
    """Renames the folders of damaged and incomplete saves, so that they do not count.

    Call it before the folder is opened, in one process, to write there.

    Args:
        directory: The folder of the saves; it may be absent.

    Returns:
        A line for each folder: its name, what is wrong and the new name.
    """
    lines = []
    folders = [path for path in Path(directory).glob("*") if path.name.isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name)):
        if reason := _damage(folder):
            aside = folder.with_name(folder.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            lines.append(f"the save {folder} is damaged ({reason}); kept as {aside}")
    return lines


def save(
    manager: ocp.CheckpointManager,
    event: int,
    arrays: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Writes one save and returns when it is complete on disk.

    Args:
        manager: from `open_manager`.
        event: number of the save, greater than all earlier ones.
        arrays: name to pytree of arrays, for example ``params``, ``masks``,
            ``opt_state``. A tree may be empty.
        meta: whatever else the run needs, as JSON.
        metrics: ``stage``, the number of pruning steps done, and ``top1`` in percent;
            they decide which save is the best.

    Raises:
        ValueError: the event is not new, a name is taken, two leaves share a path, or
            a metric is missing or not finite.
        TypeError: a leaf is not an array, or ``meta`` not JSON.
        WriteError: The disk does not take it.
    """
    latest = manager.latest_step()
    if latest is not None and event <= latest:
        raise ValueError(
            f"event: expected more than {latest}, the latest save in "
            f"{manager.directory}, got {event}; resume from that save or use another "
            "directory"
        )
    if reserved := {META, LAYOUT, METRICS} & arrays.keys():
        raise ValueError(f"arrays: rename {sorted(reserved)}: the names are taken")
    if not all(math.isfinite(metrics.get(key, math.nan)) for key in ("stage", "top1")):
        raise ValueError(
            f"metrics: expected finite numbers 'stage' and 'top1', got {metrics}"
        )
    try:
        json.dumps(meta)  # Failing within Orbax, it would spoil the next save as well.
    except TypeError as error:
        raise TypeError(f"meta: {error}; make NumPy numbers Python's own") from error
    flat = {name: _flatten(name, tree) for name, tree in arrays.items()}
    layout = {
        name: {path: _describe(leaf) for path, leaf in leaves.items()}
        for name, leaves in flat.items()
    }
    items = {
        name: ocp.args.StandardSave(leaves)
        for name, leaves in flat.items()
        if leaves  # Orbax refuses an empty item; `layout` remembers it.
    }
    items |= {META: ocp.args.JsonSave(meta), LAYOUT: ocp.args.JsonSave(layout)}
    need = sum(leaf.nbytes for leaves in flat.values() for leaf in leaves.values())
    folder = Path(manager.directory) / str(event)
    with _explained(folder, need):
        saved = manager.save(
            event,
            args=ocp.args.Composite(**items),
            metrics={key: float(value) for key, value in metrics.items()},
        )
        manager.wait_until_finished()
        if saved and jax.process_index() == 0:
            replace_file(folder / SUMS, _sums(folder))
    if not saved:  # Orbax skips a save without an error.
        raise RuntimeError(
            f"Orbax skipped the save of event {event} in {manager.directory}; check "
            "that nothing else writes there"
        )


def restore(
    manager: ocp.CheckpointManager, event: int | None, target: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a save, or parts of one, into the containers of a target.

    Args:
        manager: from `open_manager`.
        event: number of the save; None for the latest.
        target: name to pytree of arrays or `jax.ShapeDtypeStruct` with the shapes and
            dtypes to expect. Names that are absent are not read. A leaf with a sharding
            is restored with it, any other onto the first local device.

    Returns:
        The arrays by name, in the target's containers, and the save's ``meta``.

    Raises:
        ValueError: there is no such save, it is damaged, or it differs from the target
            in a name, a path, a shape or a dtype.
    """
    event = _existing(manager, event)
    folder = Path(manager.directory) / str(event)
    if reason := _damage(folder):
        raise _damaged(folder, reason)
    stored = _read(
        manager, event, dict.fromkeys((META, LAYOUT), ocp.args.JsonRestore())
    )
    flat = {name: _flatten(name, tree) for name, tree in target.items()}
    for name, leaves in flat.items():
        _check_layout(f"{folder}, {name}", stored[LAYOUT].get(name), leaves)
    restored = _read(
        manager,
        event,
        {
            name: ocp.args.StandardRestore(jax.tree.map(_abstract, leaves))
            for name, leaves in flat.items()
            if leaves
        },
    )
    arrays = {
        name: jax.tree.unflatten(
            jax.tree.structure(target[name]),
            [restored[name][path] for path in leaves],
        )
        for name, leaves in flat.items()
    }
    return arrays, stored[META]


def read_shapes(
    manager: ocp.CheckpointManager, event: int | None
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Reads what a save (None: the latest) holds: a target for `restore`, but flat.

    Returns:
        The shapes and dtypes by name and path.
    """
    event = _existing(manager, event)
    layout = _read(manager, event, {LAYOUT: ocp.args.JsonRestore()})[LAYOUT]
    return {
        name: {path: _shape_of(entry) for path, entry in leaves.items()}
        for name, leaves in layout.items()
    }


def latest_event(manager: ocp.CheckpointManager) -> int | None:
    """Returns the number of the latest complete save, or None without one."""
    return manager.latest_step()


def best_event(manager: ocp.CheckpointManager) -> int | None:
    """Returns the number of the best save (see `open_manager`), or None without one."""
    return manager.best_step()


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Ranks saves: the highest pruning stage first, then the highest top-1."""
    return metrics["stage"], metrics["top1"]


def _flatten(name: str, tree: Any) -> dict[str, Any]:
    """Lists a tree's arrays by path, ``layer1/conv1/kernel``."""
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        dtype = getattr(leaf, "dtype", None)
        # A dtype that JAX would narrow on reading (float64 without x64) and random
        # keys do not survive the way to disk and back.
        if (
            dtype is None
            or jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
            or jax.dtypes.canonicalize_dtype(dtype) != dtype
        ):
            raise TypeError(
                f"{name}/{path}: expected an array of a dtype that JAX keeps, got "
                f"{type(leaf).__name__} of dtype {dtype}; convert it with jnp.asarray "
                "or jax.random.key_data, or put it in meta"
            )
        if path in flat:
            raise ValueError(f"{name}: two leaves have the path {path!r}; rename one")
        flat[path] = leaf
    return flat


def _describe(leaf: Any) -> str:
    """Writes dtype and shape, ``float32[3,4]``."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _shape_of(description: str) -> jax.ShapeDtypeStruct:
    """Undoes `_describe`."""
    dtype, _, sizes = description.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))


def _sums(folder: Path) -> str:
    """The content of `SUMS` for the files in a folder.

    Names begin with the folder's own: the number of the save is checked as well.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder.parent)}\n")
    return "".join(lines)


def _damage(folder: Path) -> str:
    """What is wrong with the files of a save; empty if nothing is."""
    try:
        saved, found = (folder / SUMS).read_bytes(), _sums(folder).encode()
    except FileNotFoundError:
        return f"it has no {SUMS}: the process was killed while it wrote"
    except OSError as error:
        return f"it cannot be read: {error}"
    differing = set(saved.split(b"\n")) ^ set(found.split(b"\n"))
    if saved == found:
        return ""
    names = sorted({line[66:].decode(errors="replace") for line in differing})
    return f"{SUMS} does not match {', '.join(names[:3])}"


@contextlib.contextmanager
def _explained(folder: Path, need: int) -> Iterator[None]:
    """Turns an error of writing into one that says where, and how much is needed.

    Args:
        folder: Of the save.
        need: Bytes of its arrays.
    """
    if jax.process_index() == 0:
        check_room(folder.parent, need)
    before = absl.logging.get_verbosity()
    # Orbax logs a traceback for each of its threads.
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # What Orbax raises depends on which file it was.
        raise WriteError(
            f"the save {folder} cannot be written ({_first_line(error)}). It needs "
            f"{need / 1e6:.4g} MB; make room and repeat the command, which resumes the "
            "run from the save before"
        ) from error
    finally:
        absl.logging.set_verbosity(before)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore, and where to."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _existing(manager: ocp.CheckpointManager, event: int | None) -> int:
    """Returns the event, by default the latest one, after checking that it is there."""
    events = sorted(manager.all_steps())
    if not events:
        raise ValueError(
            f"no complete checkpoint is in {manager.directory}; check the path, or let "
            "the run go on to its first one"
        )
    if event is None:
        return events[-1]
    if event not in events:
        raise ValueError(
            f"there is no checkpoint {event} in {manager.directory}; expected one of "
            f"{events}"
        )
    return event


def _read(
    manager: ocp.CheckpointManager, event: int, items: dict[str, Any]
) -> dict[str, Any]:
    """Reads items of a save; damaged files give an error that says what to do."""
    if not items:
        return {}
    try:
        return dict(manager.restore(event, args=ocp.args.Composite(**items)).items())
    except Exception as error:  # What Orbax raises depends on which file is damaged.
        raise _damaged(manager.directory / str(event), _first_line(error)) from error


def _damaged(folder: Any, reason: str) -> ValueError:
    """Makes the error for a save that cannot be read back."""
    return ValueError(
        f"the checkpoint {folder} is damaged or not one of ours ({reason}); start "
        "the run again, which falls back on an earlier save, or delete that folder"
    )


def _first_line(error: Exception) -> str:
    return f"{str(error).partition(chr(10))[0]:.200}"  # TensorStore writes pages.


def _check_layout(
    where: str, saved: dict[str, str] | None, target: dict[str, Any]
) -> None:
    """Raises where a save and a target differ in paths, shapes or dtypes.

    Orbax casts to another dtype without a word, and prints both trees whole when their
    structures differ.
    """
    if saved is None:
        raise ValueError(f"target: {where} was not saved; leave it out of the target")
    wants = {path: _describe(leaf) for path, leaf in target.items()}
    differences = [
        f"{path}: saved {saved.get(path, 'nothing')}, expected "
        f"{wants.get(path, 'nothing')}"
        for path in sorted(saved.keys() | wants.keys())
        if saved.get(path) != wants.get(path)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"target: {where} differs ({'; '.join(differences[:3])}{more}); use the "
            "model, the optimizer and the dtypes it was saved with, then cast"
        )
