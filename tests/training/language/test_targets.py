"""Programs of a language model's pruning compiled for a target."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from llama_folders import llama_folder

from woodfisher_jax import main
from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.progress import silent
from woodfisher_jax.rows.targets import Kind, Target, target
from woodfisher_jax.training.config import (
    ConfigError,
    LanguageConfig,
    build_language,
    files,
)
from woodfisher_jax.training.language.targets import compile_language
from woodfisher_jax.training.targets import NotForTargetError, check


def here(memory: int = 2**40) -> Target:
    kind = Kind("cpu", memory, memory)
    return Target("here", kind, tuple(jax.devices()[:1]))


def given(folder: Path, data: dict[str, Any], **prune: Any) -> LanguageConfig:
    """A tiny decoder without its weights."""
    llama_folder(folder / "dense")
    (folder / "dense" / "model.safetensors").unlink()
    return build_language(
        {
            "task": "language",
            "init_from": str(folder / "dense"),
            "data": {"length": 5, "calibration": 3, **data},
            "prune": {"sparsity": 0.5, **prune},
        }
    )


@pytest.mark.slow
def test_every_program_of_a_run_is_compiled_without_weights_or_text(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    reports = compile_language(
        given(tmp_path, {}, rounds=1, polish=0),
        here(),
        lambda label, done, total: said.append(label),
    )
    names = [one.name for one in reports]
    assert said == ["layers", *names]
    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    assert kinds == ["forward", "moments", "weights", "error", "perplexity"]
    for one in reports:
        assert not one.failure
        assert one.arguments > 0
        assert one.seconds > 0
    by_name = {one.name: one for one in reports}
    # The largest layer: W, both moments, the mask and the importance of 8 outputs.
    down = by_name["weights of model/layers_0/mlp/down_proj/kernel"]
    assert down.arguments >= 4 * (8 * 12 + 2 * 12 * 12 + 8) + 8 * 12
    # All parameters in float32: blocks, norms, embeddings and the head.
    block = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12
    assert by_name["perplexity"].arguments >= 4 * (block + 3 * 8 + 2 * 11 * 8)
    check(reports, here())
    with pytest.raises(NotForTargetError, match=r"perplexity takes .* of a device"):
        check(reports, here(memory=100))


@pytest.mark.parametrize(
    ("data", "prune", "message"),
    [
        ({"calibration": None}, {}, "data.calibration=None; expected a number"),
        ({}, {"pattern": "neurons"}, "pattern='neurons': how many structures"),
        ({}, {"pattern": "2:3"}, r"config.prune.sparsity=0.5 with"),
    ],
)
def test_what_cannot_be_compiled(
    tmp_path: Path, data: dict[str, Any], prune: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_language(given(tmp_path, data, **prune), here(), silent)


def test_a_target_needs_a_folder() -> None:
    config = build_language({"task": "language", "prune": {"sparsity": 0.5}})
    with pytest.raises(ConfigError, match="init_from=None; expected the model"):
        compile_language(config, here(), silent)


def test_the_command_says_that_one_device_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    four = here()._replace(devices=here().devices * 4)
    monkeypatch.setattr(main, "target", lambda name: four)
    monkeypatch.setattr(main, "compile_language", lambda *arguments: [])
    config = build_language({"task": "language", "prune": {"sparsity": 0.5}})
    monkeypatch.setattr(main, "QUIET", type("Flag", (), {"value": True}))
    main.print_language_target(config, "tpu:v5e:2x2")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "tpu:v5e:2x2: 1 x cpu of 4; layers are pruned on one device"


# The sizes of SmolLM2-135M.
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cuda:h100", "tpu:v5e:2x2", "tpu:v4:2x2x2"])
def test_every_program_compiles_for_accelerators(tmp_path: Path, where: str) -> None:
    try:
        found = target(where)
    except MissingExtraError as error:
        pytest.skip(str(error))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **SMOLLM2_135M})
    )
    values = files.load_config("smollm2") | {"init_from": str(tmp_path)}
    values["prune"] = values["prune"] | {"repair": 4}
    reports = compile_language(build_language(values), found, silent)
    check(reports, found)
    names = " ".join(one.name for one in reports)
    for kind in ("sensitivity", "forward", "moments", "weights", "repair"):
        assert kind in names
