"""A small part of what docs/reliability.md says was tried."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "reliability.py"


@pytest.fixture(scope="module")
def reliability() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "override",
    [
        "seed=1099511627776",
        "model.hidden=(0,)",
        "prune.recompute=1000000000",
        "train.optimizer.momentum=nan",
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_field(
    reliability: ModuleType, override: str
) -> None:
    assert override in reliability.WRONG
    assert reliability.refused(override)


def test_a_right_value_is_not_refused(
    reliability: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability, "prepare", lambda *_: None)
    assert reliability.refused("seed=1") == ""


@pytest.mark.slow
def test_a_kill_and_a_damaged_save_lose_nothing(
    reliability: ModuleType, tmp_path: Path
) -> None:
    whole, cache, draw = tmp_path / "whole", tmp_path / "cache", random.Random(1)
    assert reliability.finish(whole, cache).returncode == 0
    rows = reliability.try_kills(1, whole, cache, draw)
    rows += reliability.try_saves(1, whole, cache, draw)
    assert all("the same bits" in row for row in rows)
