"""Targets by name, and the budget of devices that are not there."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.rows import budget
from woodfisher_jax.rows.budget import HEADROOM, budget_of
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.targets import (
    KINDS,
    TargetError,
    compiled,
    kind_of,
    parse,
    target,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tpu:v5e:4x4", ("tpu", "tpu:v5e", (4, 4))),
        ("tpu:v4:2x2x2", ("tpu", "tpu:v4", (2, 2, 2))),
        ("cuda:h100", ("cuda", "cuda:h100", (1,))),
        ("cuda:a100:8", ("cuda", "cuda:a100", (8,))),
    ],
)
def test_a_name_is_compiler_kind_and_shape(name: str, expected: tuple) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name", ["", "tpu", "tpu:v5e", "tpu:v5e:4", "tpu:h100:2x2", "cuda:h100:0", "cpu:1"]
)
def test_what_is_no_target_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse(name)
    assert str(caught.value).startswith(f"target={name!r}; expected a kind of tpu:v4,")


@pytest.mark.parametrize(
    ("name", "package"),
    [("tpu:v5e:2x2", "libtpu"), ("cuda:h100", "jax-cuda12-plugin")],
)
def test_a_missing_compiler_is_named_with_its_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as caught:
        target(name)
    assert str(caught.value) == (
        f"the target {name} needs {package}: pip install 'woodfisher-jax[targets]'"
    )


def test_the_memory_of_a_target_is_that_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device: Any = SimpleNamespace(device_kind="TPU v4")
    kind = KINDS["tpu:v4"]
    assert kind_of(device) == kind
    assert kind_of(jax.devices()[0]) is None
    monkeypatch.setattr(budget, "local_devices", lambda mesh: [device] * 4)
    found = budget_of(Compute())
    assert (found.used, found.limit) == (0, int(HEADROOM * kind.memory))
    assert found.host_limit == int(HEADROOM * 4 * kind.host_memory)
    assert not found.shared
    assert found.devices == 4
    np.testing.assert_equal(found.disk > 0, True)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cuda:h100", {"xla_gpu_enable_triton_gemm": False}),
        ("tpu:v5e", {"exec_time_optimization_effort": -1.0}),
    ],
)
def test_a_compiler_without_a_device_has_settings_of_its_own(
    kind: str, settings: dict[str, Any]
) -> None:
    device = SimpleNamespace(device_kind=KINDS[kind].device_kind)
    mesh: Any = SimpleNamespace(devices=np.array([device]))
    given: list[Any] = []
    lowered: Any = SimpleNamespace(compile=given.append)
    compiled(lowered, mesh)
    compiled(lowered, None)
    assert given == [settings, None]
