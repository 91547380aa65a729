"""Memory and disk that a pruning step may take, and memory that its blocks take."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.disk import free_bytes
from woodfisher_jax.rows.sharding import local_devices
from woodfisher_jax.rows.targets import kind_of

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

HEADROOM = 0.9
"""Share of the free memory that a step may plan with."""

BATCH_BYTES = 512 * 2**20
"""Working memory for the blocks that an accelerator computes together."""


# ------------------------------------------------------------------------- one block


def block_bytes(num_samples: int, width: int, solver: str) -> int:
    """Working memory for one block: gradients in both precisions, square matrices.

    Args:
        num_samples: N.
        width: c.
        solver: A key of :data:`~woodfisher_jax.equations.fisher.SOLVERS`.
    """
    side = num_samples if solver == "sample_space" else width
    return 12 * num_samples * width + 32 * side**2


def factor_bytes(num_samples: int, width: int, solver: str) -> int:
    """Memory for what one block keeps between the diagonal and the update."""
    side = num_samples if solver == "sample_space" else width
    return 8 * side**2


# ----------------------------------------------------------------------- the machine


class Budget(NamedTuple):
    """Bytes there are for the arrays of a device and for this process.

    On a CPU both are the same memory.

    Attributes:
        used: Taken already of ``limit``.
        limit: Memory for the arrays of a device.
        host_used: Taken already of ``host_limit``.
        host_limit: Memory of this process.
        disk: Free where the gradients would be stored.
        shared: Whether ``limit`` is about the memory of the host, as on a CPU.
        devices: Devices of this process.
    """

    used: int
    limit: int
    host_used: int
    host_limit: int
    disk: int
    shared: bool
    devices: int

    @property
    def sharers(self) -> int:
        """Devices whose arrays lie in the memory that ``limit`` is about."""
        return self.devices if self.shared else 1


def budget_of(compute: Compute) -> Budget:
    """What the options and the machine allow.

    With several processes every number is that of the process with the least room, so
    that all processes make the same plan. Of devices that are not there (see
    :mod:`woodfisher_jax.rows.targets`) what such machines have; their disk is this
    one's.
    """
    devices = local_devices(compute.mesh) or jax.local_devices()[:1]
    if (kind := kind_of(devices[0])) is not None:
        return Budget(
            used=0,
            limit=int(HEADROOM * kind.memory),
            host_used=0,
            host_limit=int(HEADROOM * kind.host_memory * len(devices)),
            disk=free_bytes(compute.store_dir),
            shared=False,
            devices=len(devices),
        )
    host = (resident(), int(compute.memory_limit or host_limit()))
    device = device_memory(devices[0])
    # Limits are negative, so that the maximum over processes is the least room.
    (used, limit), (host_used, host_limit_) = device or host, host
    numbers = [used, -limit, host_used, -host_limit_, -free_bytes(compute.store_dir)]
    if compute.mesh is not None and len(devices) < compute.mesh.size:
        # As float32, for JAX would cut int64 to int32 on the way.
        every = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
        numbers = np.max(np.asarray(every), axis=0).tolist()
    used, limit, host_used, host_limit_, disk = (abs(int(n)) for n in numbers)
    return Budget(
        used=used,
        limit=limit,
        host_used=host_used,
        host_limit=host_limit_,
        disk=disk,
        shared=device is None,
        devices=len(devices),
    )


def resident() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss


def host_limit() -> int:
    """What this process may grow to: what is free, or a container's limit."""
    limit = resident() + psutil.virtual_memory().available
    for path in CONTAINER_LIMITS:
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            limit = min(limit, int(text))
    return int(HEADROOM * limit)


def device_memory(device: jax.Device) -> tuple[int, int] | None:
    """What arrays take of an accelerator's memory now, and what they may take.

    None where arrays lie in the host's memory, or the device does not say.
    """
    stats = (device.memory_stats() if device.platform != "cpu" else None) or {}
    if "bytes_limit" not in stats:
        return None
    return stats.get("bytes_in_use", 0), int(HEADROOM * stats["bytes_limit"])
