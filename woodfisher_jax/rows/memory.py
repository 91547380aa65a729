"""Memory that a process has and may take, in bytes."""

from pathlib import Path

import jax
import psutil

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

HEADROOM = 0.9
"""Share of what is free that a step may plan with."""


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


def device_limit(device: jax.Device) -> int | None:
    """What one accelerator has for arrays; None where it is the host's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = (stats or {}).get("bytes_limit")
    return None if limit is None else int(HEADROOM * limit)


def device_used(device: jax.Device) -> int:
    """What arrays take on an accelerator now."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_in_use", 0)
