"""The budget is what the machine, the container and the options leave."""

from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from woodfisher_jax.rows import budget
from woodfisher_jax.rows.budget import budget_of, device_memory, host_limit, resident
from woodfisher_jax.rows.compute import Compute

TOTAL = psutil.virtual_memory().total


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the limits of a container, in as many files as there are texts."""

    def write(*texts: str) -> None:
        paths = tuple(tmp_path / str(i) for i in range(len(texts) + 1))
        for path, text in zip(paths, texts, strict=False):
            path.write_text(text)
        monkeypatch.setattr(budget, "CONTAINER_LIMITS", paths)

    return write


def test_resident_memory_is_that_of_this_process() -> None:
    before = resident()
    assert 2**20 < before < TOTAL
    kept = np.ones(2**25)  # 256 MiB, touched
    assert resident() - before == pytest.approx(kept.nbytes, rel=0.2)


@pytest.mark.parametrize(
    "texts", [(), ("max",), ("max\n",), ("",), ("9223372036854771712\n",)]
)
def test_without_a_container_s_limit_it_is_what_is_free(container, texts) -> None:
    container(*texts)
    free = resident() + psutil.virtual_memory().available
    assert host_limit() == pytest.approx(0.9 * free, rel=0.2)
    assert host_limit() < TOTAL


@pytest.mark.parametrize(
    "texts", [("1000000000",), ("max", "1000000000\n"), ("1000000000", "2000000000")]
)
def test_a_container_s_limit_is_kept_to(container, texts) -> None:
    container(*texts)
    assert host_limit() == 900_000_000


class Accelerator:
    """What planning reads of a device."""

    platform = "gpu"

    def __init__(self, stats: dict[str, int] | None):
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_an_accelerator_reports_its_memory() -> None:
    device = Accelerator({"bytes_limit": 1000, "bytes_in_use": 300})
    assert device_memory(device) == (300, 900)


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_an_accelerator_that_does_not(stats) -> None:
    assert device_memory(Accelerator(stats)) is None


def test_a_cpu_s_budget_is_the_host_s(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(budget, "resident", lambda: 300)
    assert device_memory(jax.devices("cpu")[0]) is None
    found = budget_of(Compute(memory_limit=1000.0, store_dir=tmp_path / "new"))
    assert found[:4] == (300, 1000, 300, 1000)
    assert (found.shared, found.devices, found.sharers) == (True, 1, 1)
    assert found.disk > 0


def test_an_accelerator_s_budget_has_both_memories(monkeypatch) -> None:
    monkeypatch.setattr(budget, "resident", lambda: 300)
    monkeypatch.setattr(budget, "device_memory", lambda device: (5, 90))
    found = budget_of(Compute(memory_limit=1000))
    assert found[:4] == (5, 90, 300, 1000)
    assert not found.shared
    assert found._replace(devices=8).sharers == 1
    assert found._replace(devices=8, shared=True).sharers == 8
