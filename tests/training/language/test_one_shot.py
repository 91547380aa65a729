import json
from pathlib import Path

import numpy as np
import pytest
from llama_folders import TOKENS, llama_folder

from woodfisher_jax.report import language
from woodfisher_jax.training.config import (
    ConfigError,
    LanguageConfig,
    build_language,
    to_dict,
)
from woodfisher_jax.training.config.arguments import read_config
from woodfisher_jax.training.language.one_shot import run
from woodfisher_jax.training.language.perplexity import perplexity
from woodfisher_jax.weights.hugging_face import read_folder


def given(folder: Path, **prune: object) -> LanguageConfig:
    """A tiny network, trained with texts of 5 tokens, and its text, of 6."""
    llama_folder(folder / "dense", max_position_embeddings=5)
    rng = np.random.default_rng(0)
    parts = {n: rng.integers(0, 11, (4, 6)) for n in ("calibration", "evaluation")}
    np.savez(folder / "text.npz", **parts, kinds=["a", "b", "a", "b"])
    text = {"dir": str(folder / "text.npz"), "calibration": 2, "evaluation": 2}
    section = {"init_from": str(folder / "dense"), "data": text, "prune": prune}
    return build_language({"task": "language", **section})


@pytest.mark.slow
def test_a_run_from_folder_to_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = given(tmp_path, sparsity=0.5)
    workdir = tmp_path / "run"
    results = run(config, workdir, quiet=True)
    module, params = read_folder(workdir / "model")
    zeros = params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"] == 0
    assert zeros.mean() == 0.5
    assert params["model"]["embed_tokens"]["embedding"].all()
    assert results["sparsity"] == 0.5
    assert len(results["layers"]) == 7

    tokens = np.load(tmp_path / "text.npz")["evaluation"][:2]
    found = perplexity(lambda p, t: module.apply({"params": p}, t), params, tokens)
    measured = results["perplexity"]
    assert measured["pruned"]["all"] == pytest.approx(found.all, rel=1e-5)
    assert measured["dense"]["all"] != measured["pruned"]["all"]
    saved = json.loads((workdir / "results.json").read_text())
    assert saved["config"] == json.loads((workdir / "config.json").read_text())
    assert build_language(saved["config"]) == config

    log = (workdir / "log.txt").read_text()
    assert "2 sequences to prune with" in log
    assert "pruned to 50.00 %" in log
    assert f"{measured['dense']['all']:.2f} -> {measured['pruned']['all']:.2f}" in log
    assert "calibration: sequences of 6 tokens" in log
    assert "at most 5" in log

    language.print_results(results)
    printed = capsys.readouterr().out
    assert "50.00 % sparse" in printed
    assert "prune: weights" in (workdir / "report.html").read_text()
    with pytest.raises(ConfigError, match="holds a run that has ended"):
        run(config, workdir)


@pytest.mark.slow
def test_the_perplexity_is_that_of_the_folder_and_its_dtype(tmp_path: Path) -> None:
    config = given(tmp_path, sparsity=0.5)

    def halved(tensors: dict) -> None:
        tensors.update({k: (3 * a).astype(np.float16) for k, a in tensors.items()})

    llama_folder(tmp_path / "dense", halved)
    results = run(config, tmp_path / "run", quiet=True)
    module, params = read_folder(tmp_path / "run" / "model")
    tokens = np.load(tmp_path / "text.npz")["evaluation"][:2]
    found = perplexity(lambda p, t: module.apply({"params": p}, t), params, tokens)
    assert results["perplexity"]["pruned"]["all"] == pytest.approx(found.all, rel=1e-6)


@pytest.mark.slow
def test_structure_goes_by_times_that_the_run_keeps(tmp_path: Path) -> None:
    config = given(tmp_path, pattern="structures", latency=0.9, size=0.9)
    results = run(config, tmp_path / "run", quiet=True)
    counts = results["parameters"]
    assert counts["pruned"] <= 0.9 * counts["dense"]
    times = json.loads((tmp_path / "run" / "times.json").read_text())
    assert times
    assert all(milliseconds > 0 for milliseconds in times.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, r"config.init_from=None; expected the model"),
        ({"data": {}}, r"config.data.dir=None; expected the text that"),
        ({"init_from": "nowhere"}, r"config.init_from: nowhere/config.json is not"),
        ({"prune": {"sparsity": 0.5, "pattern": "2:3"}}, r"config.prune.sparsity=0.5 "),
        ({"prune": {}}, r"config.prune.sparsity: sparsity is missing; expected"),
        (
            {"prune": {"sparsity": 0.5, "latency": 0.5}},
            r"config.prune.latency=0.5 without structures",
        ),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, changes: dict, message: str) -> None:
    values = to_dict(given(tmp_path, sparsity=0.5)) | changes
    with pytest.raises(ConfigError, match=message):
        run(build_language(values), tmp_path / "new" / "run", quiet=True)
    assert not (tmp_path / "new").exists()


def test_tokens_of_another_network(tmp_path: Path) -> None:
    config = given(tmp_path, sparsity=0.5)
    np.savez(tmp_path / "text.npz", calibration=[[11, 0]], evaluation=[[0, 0]])
    with pytest.raises(ConfigError, match=r"data.dir: .*calibration\[0, 0\] is 11"):
        run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_text_and_tokenizers_that_are_missing(tmp_path: Path) -> None:
    values = to_dict(given(tmp_path, sparsity=0.5))
    (tmp_path / "text").mkdir()
    for folder, message in (("nowhere", "no such file"), ("text", "no .txt files")):
        values["data"]["dir"] = str(tmp_path / folder)
        with pytest.raises(ConfigError, match=rf"^config.data.dir: .*{message}"):
            run(build_language(values), tmp_path / "run", quiet=True)
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "dense" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^config.data.dir: tokenizer.json is not"):
        run(build_language(values), tmp_path / "run", quiet=True)


def test_weights_that_cannot_be_pruned(tmp_path: Path) -> None:
    config = given(tmp_path, sparsity=0.5)
    name = "model.layers.0.mlp.up_proj.weight"

    def with_nan(tensors: dict) -> None:
        tensors[name] = np.full_like(tensors[name], np.nan)

    def quantized(tensors: dict) -> None:
        tensors[name] = tensors[name].astype(np.int8)

    for change, message in (
        (with_nan, r"params\['model/layers_0/mlp/up_proj/kernel'\] of .* are NaN"),
        (quantized, rf"{name} has dtype int8; expected floating-point weights"),
    ):
        llama_folder(tmp_path / "dense", change)
        with pytest.raises(ConfigError, match=rf"^config.init_from: .*{message}"):
            run(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    llama_folder(tmp_path / "dense")
    stated = json.loads((tmp_path / "dense" / "config.json").read_text())
    del stated["hidden_size"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=r"config.json lacks hidden_size=4096 \(def"):
        run(config, tmp_path / "run", quiet=True)


def test_the_command_line(tmp_path: Path) -> None:
    arguments = ["--config=smollm2", "--config.prune.pattern=2:4"]
    name, config = read_config([*arguments, "--config.data.length=64"])
    assert isinstance(config, LanguageConfig)
    assert (name, config.prune.sparsity, config.prune.pattern) == (
        "smollm2",
        0.6,
        "2:4",
    )
    assert config.data.length == 64
    with pytest.raises(ConfigError, match=r"did you mean config.prune.sparsity\?"):
        read_config(["--config=smollm2", "--config.prune.sparsty=0.5"])


def test_a_default_of_the_shipped_config_is_no_option_of_the_user() -> None:
    given = ["--config=smollm2", "--config.prune.scope=layer"]
    assert read_config(given)[1].prune.metric == "identity"
    assert read_config(given[:1])[1].prune.metric == "softmax"
    config = read_config([*given, "--config.prune.distil=1"])[1]
    assert config.prune.metric == "softmax"
    config = read_config([*given, "--config.prune.metric=softmax"])[1]
    assert config.prune.metric == "softmax"  # and pruning warns of it


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("prunable=(", r"config\.prune\.prunable='\(' is not a regular expression"),
        ("prunable=none", r"config\.prune\.prunable='none' selects none of the param"),
        ("pattern=4:2", r"config\.prune\.pattern='4:2'; expected N:M"),
        ("sparsity=60%", r"config\.prune\.sparsity='60%'; .* did you mean 0\.6\?"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_given(tmp_path, field, message) -> None:
    llama_folder(tmp_path / "dense")
    np.savez(tmp_path / "t.npz", calibration=TOKENS, evaluation=TOKENS)
    given = [f"init_from={tmp_path}/dense", f"data.dir={tmp_path}/t.npz"]
    fields = [f"--config.{text}" for text in [*given, f"prune.{field}"]]
    with pytest.raises(ConfigError, match=f"^{message}"):
        run(read_config(["--config=smollm2", *fields])[1], tmp_path / "run")
