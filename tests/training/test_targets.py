"""Programs of a run compiled for a target, and what is refused."""

from typing import Any

import jax
import pytest

from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.progress import silent
from woodfisher_jax.rows.targets import Kind, Target, target
from woodfisher_jax.training.config import ConfigError, files, from_dict
from woodfisher_jax.training.targets import (
    Lowering,
    NotForTargetError,
    Report,
    check,
    compile_for,
    report,
)

TINY: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": (4,)},
    "dense": {"epochs": 0},
    "train": {"epochs": 2, "batch_size": 8},
    "prune": {
        "num_samples": 4,
        "block_size": 64,
        "target_sparsity": 0.5,
        "start": 1,
        "end": 1,
    },
}


def here(memory: int = 2**40) -> Target:
    kind = Kind("cpu", memory, memory)
    return Target("here", kind, tuple(jax.devices()[:1]))


@pytest.mark.parametrize(
    ("method", "pruning"),
    [
        ("globalmagni", ["selection"]),
        pytest.param(
            "woodfisherblock",
            ["gradients", "diagonal", "update", "selection"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_program_of_a_run_is_compiled(
    method: str, pruning: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = TINY | {"prune": TINY["prune"] | {"method": method}}
    said: list[int] = []

    def lines() -> list[str]:
        own = [r for r in caplog.records if r.name.startswith("woodfisher_jax")]
        return [r.getMessage() for r in own]

    def progress(label: str, done: int, total: int) -> None:
        said.append(len(lines()))

    with caplog.at_level("INFO"):
        needs, reports = compile_for(from_dict(config), here(), progress)
    # Before a program is compiled, those before it are on the screen.
    assert said[-2:] == [len(reports) - 2, len(reports) - 1]
    assert lines() == [str(one) for one in reports]
    assert list(needs) == ["prune"] * (len(pruning) > 1)
    names = [one.name.partition(",")[0] for one in reports]
    assert list(dict.fromkeys(names)) == ["step of train", "evaluation", *pruning]
    for one in reports:
        assert not one.failure
        assert one.arguments > 0
        assert one.seconds > 0
    step = reports[0]
    # The batch and the request to stop are arguments that are not given back.
    batch = 8 * (8 * 8 + 1) * 4
    assert 0 < step.arguments - step.aliased <= batch + 64
    check(reports, here())
    with pytest.raises(NotForTargetError, match=r"train takes .* of a device"):
        check(reports, here(memory=100))


def test_a_program_that_does_not_compile_is_named_with_the_reason() -> None:
    def lower() -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20 of\n 16 GB of hbm")

    found = [report(Lowering("gradients", lower), None), Report("evaluation")]
    with pytest.raises(NotForTargetError) as caught:
        check(found, here())
    assert str(caught.value) == (
        "target='here': gradients does not compile: RESOURCE_EXHAUSTED: 20 of 16 GB of "
        "hbm"
    )


def test_gradients_that_do_not_compile_are_named_where_they_are_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(method: WoodFisher, problem: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: no tiles")

    monkeypatch.setattr(WoodFisher, "planned", planned)
    config = TINY | {"prune": TINY["prune"] | {"method": "woodfisherblock"}}
    needs, reports = compile_for(from_dict(config), here(), silent)
    assert not needs
    with pytest.raises(
        NotForTargetError, match=r"gradients does not compile: INTERNAL: no tiles$"
    ):
        check(reports, here())


def test_what_only_the_data_tell_is_refused() -> None:
    with pytest.raises(ConfigError, match="fit_to_data=True"):
        compile_for(from_dict(TINY | {"fit_to_data": True}), here(), silent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_small"])
@pytest.mark.parametrize(
    ("where", "alone"),
    [
        ("cuda:h100", True),
        # One device of a slice is that of any other.
        ("tpu:v5e:2x2", True),
        ("tpu:v5e:2x2", False),
        ("tpu:v5e:4x4", False),
        ("tpu:v4:2x2x2", True),
        ("tpu:v4:2x2x2", False),
    ],
)
def test_every_program_compiles_for_accelerators(
    where: str, alone: bool, name: str
) -> None:
    try:
        found = target(where)
    except MissingExtraError as error:
        pytest.skip(str(error))
    if alone:
        found = found._replace(devices=found.devices[:1])
    values = files.load_config(name)
    # What 16 devices divide, and one has room for.
    values["dense"] = values.get("dense", {}) | {"batch_size": 256}
    values["train"] = values["train"] | {"batch_size": 64 if alone else 192}
    _, reports = compile_for(from_dict(values), found, silent)
    check(reports, found)
    assert len(reports) >= 6
