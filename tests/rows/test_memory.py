"""Memory is what the machine and the container give."""

from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from woodfisher_jax.rows import memory

TOTAL = psutil.virtual_memory().total


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the limits of a container, in as many files as there are texts."""

    def write(*texts: str) -> None:
        paths = tuple(tmp_path / str(i) for i in range(len(texts) + 1))
        for path, text in zip(paths, texts, strict=False):
            path.write_text(text)
        monkeypatch.setattr(memory, "CONTAINER_LIMITS", paths)

    return write


def test_resident_memory_is_that_of_this_process() -> None:
    before = memory.resident()
    assert 2**20 < before < TOTAL
    kept = np.ones(2**25)  # 256 MiB, touched
    assert memory.resident() - before == pytest.approx(kept.nbytes, rel=0.2)


def test_without_a_container_the_limit_is_what_is_free(container) -> None:
    container()
    free = memory.resident() + psutil.virtual_memory().available
    assert memory.host_limit() == pytest.approx(0.9 * free, rel=0.2)
    assert memory.host_limit() < TOTAL


@pytest.mark.parametrize(
    "texts", [("1000000000",), ("max", "1000000000\n"), ("1000000000", "2000000000")]
)
def test_a_container_s_limit_is_kept_to(container, texts) -> None:
    container(*texts)
    assert memory.host_limit() == 900_000_000


@pytest.mark.parametrize("text", ["max", "max\n", "", "9223372036854771712\n"])
def test_a_container_without_a_limit(container, text) -> None:
    container()
    free = memory.host_limit()
    container(text)
    assert memory.host_limit() == pytest.approx(free, rel=0.2)


class Accelerator:
    """What planning asks of a device."""

    platform = "gpu"

    def __init__(self, stats: dict[str, int] | None):
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_an_accelerator_says_what_it_has() -> None:
    device = Accelerator({"bytes_limit": 1000, "bytes_in_use": 300})
    assert memory.device_limit(device) == 900
    assert memory.device_used(device) == 300


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_an_accelerator_that_does_not_say(stats) -> None:
    assert memory.device_limit(Accelerator(stats)) is None


def test_the_memory_of_a_cpu_device_is_the_host_s() -> None:
    device = jax.devices("cpu")[0]
    assert memory.device_limit(device) is None
    assert memory.device_used(device) >= 0
