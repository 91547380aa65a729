"""Several processes and devices: how they join, and which rows of a batch each has.

Every process runs the same program. Training data is spread by rows over all devices;
parameters, masks and optimizer state are on each of them. On one device nothing is
spread at all.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from woodfisher_jax.rows.sharding import (
    AXIS,
    gathered,
    num_devices,
    placed,
)
from woodfisher_jax.training.config import Config, ConfigError, DistributedConfig
from woodfisher_jax.training.resuming.workdir import differences, identity

logger = logging.getLogger(__name__)


def initialize(settings: DistributedConfig) -> None:
    """Joins this process with the others of a run; alone, does nothing.

    Call it before anything else touches a device. A second call does nothing.

    Args:
        settings: How to find the others.

    Raises:
        ConfigError: If nothing says where they are, or JAX runs already.
    """
    if settings.coordinator is None or jax.distributed.is_initialized():
        return
    # JAX ends a process that waits in vain, without an exception.
    logger.info(
        "waiting for the other processes at %s, at most %d s",
        settings.coordinator,
        settings.start_timeout_seconds,
    )
    automatic = settings.coordinator == "auto"
    try:
        jax.distributed.initialize(
            None if automatic else settings.coordinator,
            settings.num_processes,
            settings.process_id,
            initialization_timeout=settings.start_timeout_seconds,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"config.distributed.coordinator={settings.coordinator!r}: {error}; give "
            "host:port of process 0, num_processes and process_id; 'auto' is for TPU "
            "pods, Slurm and Open MPI"
        ) from error


class PeerLostError(RuntimeError):
    """Another process of the run has ended; what is left cannot go on."""


LOST = re.compile(r"Gloo|NCCL|heartbeat|Connection (closed|reset)|Socket closed")
"""What communication says where a process at the other end is gone."""


@contextlib.contextmanager
def lost_peers_named() -> Iterator[None]:
    """Turns an error of communication in the body into one that says what to do.

    Raises:
        PeerLostError: If the error is one.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        line = str(error).partition("\n")[0]
        if jax.process_count() == 1 or not LOST.search(line):
            raise
        raise PeerLostError(
            f"another process of the run has ended ({line:.200}); start all of them "
            "again: they resume from the last save"
        ) from error


def is_first() -> bool:
    """Whether this process writes the reports."""
    return jax.process_index() == 0


def shard() -> tuple[int, int]:
    """This process's part of every batch: (index, count)."""
    return jax.process_index(), jax.process_count()


def all_devices() -> Mesh | None:
    """The devices of all processes in one row; None if there is one only."""
    devices = jax.devices()
    return None if len(devices) == 1 else in_one_row(devices)


def in_one_row(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of devices, of which there may be one only."""
    # By process, so that its rows of a batch lie side by side in every process.
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.asarray(ordered), (AXIS,), axis_types=(AxisType.Auto,))


def spread(rows: Any, mesh: Mesh | None) -> Any:
    """Spreads a batch over the devices of all processes by its leading axis.

    Args:
        rows: Arrays [b / processes, ...], this process's rows of the batch.
        mesh: Of :func:`all_devices`; None leaves the arrays as they are.

    Returns:
        Arrays [b, ...].
    """
    sharding = placed(mesh, AXIS)
    if sharding is None:
        return rows
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), rows
    )


def per_device(value: float, mesh: Mesh | None) -> Any:
    """A number of this process, once for each of its devices: [devices] over all."""
    here = num_devices(mesh) // jax.process_count()
    return spread(np.full(here, value, np.float32), mesh)


# --------------------------------------------------------------------- agreement


def together(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; where it fails in one process, all of them raise.

    Otherwise the others would wait for that process for ever. The function must not
    communicate with other processes.

    Raises:
        ConfigError: If it failed elsewhere. Where it failed, its own exception.
    """
    failure: Exception | None = None
    result = None
    try:
        result = function(*arguments)
    except Exception as error:
        failure = error
    failed = gathered(failure is not None)
    if failure is not None:
        raise failure
    if failed.any():
        names = ", ".join(map(str, np.flatnonzero(failed)))
        raise ConfigError(
            f"process {names} of {len(failed)} cannot start, so this one does not "
            "either; its own message says why"
        )
    return result


def first_only(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function in the first process; the others wait for it."""
    together(function if is_first() else lambda *_: None, *arguments)


def check_config(config: Config) -> None:
    """Raises if processes have different configs or versions of JAX.

    Raises:
        ConfigError: In all processes; where the config differs, it says in what.
    """
    mine = {"config": identity(config), "jax": jax.__version__}
    differing = differences(of_first(mine), mine, "")

    def check() -> None:
        if differing:
            lines = "; ".join(line.removeprefix(".") for line in differing[:5])
            raise ConfigError(
                f"process {jax.process_index()} differs from process 0 ({lines}); "
                "start all processes with the same command but for "
                "config.distributed.process_id"
            )

    together(check)


def check_equal(value: int, what: str) -> None:
    """Raises in all processes unless a number is the same in each.

    Args:
        value: The number.
        what: What it is and what to do, for the message.

    Raises:
        ConfigError: With the number of each process.
    """
    values = gathered(value)
    if (values != values[0]).any():
        found = ", ".join(f"{v} in process {i}" for i, v in enumerate(values))
        raise ConfigError(f"{what}; found {found}")


def of_first(value: Any) -> Any:
    """A JSON value of process 0, in every process."""
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    text = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Of one shape everywhere, whatever this process would say.
    padded = np.resize(text, length)
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return json.loads(found.astype(np.uint8).tobytes().decode())
