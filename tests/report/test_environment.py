"""What is told of the machine is so."""

import json
from pathlib import Path

import jax
import pytest

from woodfisher_jax.report import environment


def test_environment() -> None:
    found = environment.environment()
    assert found["device"] == {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"].keys() == {"python", *environment.PACKAGES}
    json.dumps(found, allow_nan=False)


def test_peak_memory_is_in_bytes() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system to compare with")
    (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
    kilobytes = int(line.split()[1])
    assert environment.peak_rss_bytes() == pytest.approx(1024 * kilobytes, rel=0.2)


def test_the_processor_has_a_name() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc on this system to compare with")
    name = environment.processor()
    assert name == "" or any(name in line for line in info.read_text().splitlines())
