"""Where a run takes place: versions, devices, the processor, memory used."""

import importlib.metadata
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "woodfisher-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)
"""The distributions whose versions decide what a run computes."""


def environment() -> dict[str, Any]:
    """Describes where a run takes place.

    Returns:
        ``device`` with ``platform``, ``kind`` and ``count``, over all processes; and
        ``versions`` of Python and the packages that matter, None for one that runs
        without being installed.
    """
    devices = jax.devices()
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    }
    return {"device": device, "versions": versions}


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kB.


def processor() -> str:
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
