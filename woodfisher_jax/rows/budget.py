"""What there is for a pruning step: bytes of memory and disk."""

from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from woodfisher_jax.rows import memory
from woodfisher_jax.rows.disk import free_bytes
from woodfisher_jax.rows.sharding import local_devices
from woodfisher_jax.settings import Settings
from woodfisher_jax.trees.blocks import FlatOrder

MICROBATCH_SIZE = 64
"""Examples at once, where they fit; more is no faster."""

VECTOR_BYTES = 44
"""For each prunable weight: weights, diagonal, scores and direction, what sorting the
scores takes, masks, indices."""

SLOPE_BYTES = 16
"""The same for a loss with a slope: ḡ as it is added up and flat, h, and w - h."""


class MemoryLimitError(MemoryError):
    """A pruning step that does not fit; the message says what would."""


class Budget(NamedTuple):
    """Bytes there are, for the arrays of a device and for this process.

    On a CPU both are the same memory. In a run of several processes these are the
    smallest of all, so that all decide alike.
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


def budget_of(settings: Settings) -> Budget:
    """What the settings and the machine allow."""
    mesh = settings.mesh
    local = local_devices(mesh) or jax.local_devices()[:1]
    host_used = memory.resident()
    host_limit = settings.memory_limit or memory.host_limit()
    used, limit = host_used, memory.device_limit(local[0])
    if limit is not None:
        used = memory.device_used(local[0])
    found = np.asarray(
        [
            used,
            -(host_limit if limit is None else limit),
            host_used,
            -host_limit,
            -free_bytes(settings.store_dir),
        ],
        np.float32 if jax.process_count() > 1 else np.int64,
    )
    if mesh is not None and len(local) < mesh.size:
        found = np.max(np.asarray(multihost_utils.process_allgather(found)), axis=0)
    used, limit_, host_used, host_limit, disk = np.abs(found.astype(np.int64)).tolist()
    return Budget(
        used=used,
        limit=limit_,
        host_used=host_used,
        host_limit=host_limit,
        disk=disk,
        shared=limit is None,
        devices=len(local),
    )


def vectors_bytes(order: FlatOrder, settings: Settings, budget: Budget) -> int:
    """Memory of all flat vectors of a step, in the memory that the limit is about."""
    each = VECTOR_BYTES + (SLOPE_BYTES if settings.method.first_order else 0)
    return each * order.size * budget.sharers
