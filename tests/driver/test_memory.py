"""Memory that nothing holds any longer."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from woodfisher_jax.driver import memory


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of GNU keeps it")
def test_freed_memory_goes_back() -> None:
    # Of a size that is cut from the heap, with one in use above those that are freed.
    arrays = [np.ones(10_000) for _ in range(2_000)]
    last = arrays.pop()
    full = resident()
    arrays.clear()
    memory.give_back()
    assert resident() < full - 100e6
    assert last.sum() == 10_000


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_happens(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("called"))
    memory.give_back()
