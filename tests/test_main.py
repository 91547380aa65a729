"""The command line: configs, overrides, and errors that say what to write."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from woodfisher_jax import main
from woodfisher_jax.config import Config, ConfigError, from_dict, to_dict
from woodfisher_jax.models import MODELS

ROOT = Path(__file__).parents[1]


DIGITS = "--config=configs/digits.py"


def call(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "woodfisher_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_the_defaults_are_the_dataclasses() -> None:
    assert from_dict(main.defaults().to_dict()) == Config()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem
)
def test_each_config_can_be_run(path: Path) -> None:
    config = from_dict(main.load_config(str(path)).to_dict())
    assert config.prune.stages[-1].sparsity == config.prune.target_sparsity
    docstring = path.read_text()
    assert f"--config=configs/{path.name}" in docstring
    assert to_dict(config)["model"]["name"] in MODELS


def test_a_config_file_may_take_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("def get_config(word='x'):\n    return {'data': {'name': word}}\n")
    assert main.load_config(f"{path}:mnist").data.name == "mnist"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def get_config():\n    return {'sede': 1}\n",
            ["config.sede", "config.seed?"],
        ),
        (
            "def get_config():\n    return {'prune': {'dampin': 1}}\n",
            ["config.prune.dampin", "config.prune.damping?"],
        ),
        ("def get_config():\n    return {'seed': 'a'}\n", ["config.seed='a'", "int"]),
        ("x = 1\n", ["must define get_config()"]),
    ],
)
def test_a_bad_config_file_is_refused(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        main.load_config(str(path))
    for word in words:
        assert word in str(caught.value)


FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = [
    (path.stem, word)
    for path in FILES
    for word in ("", *runpy.run_path(str(path)).get("VARIANTS", ()))
]


def test_the_counterparts_of_the_originals_scripts_are_there() -> None:
    words = {"80", "90", "95", "98", "magnitude_80", "magnitude_90", "magnitude_95"}
    words |= {"magnitude_98", "flops_power", "flops_335", "two_pruners", "one_shot"}
    assert {word for stem, word in VARIANTS if stem == "resnet50"} >= words
    words = {"75", "89", "magnitude_75", "magnitude_89", "smoke"}
    assert {word for stem, word in VARIANTS if stem == "mobilenet_v1"} >= words


@pytest.mark.parametrize(("stem", "word"), VARIANTS)
def test_each_variant_can_be_checked(stem: str, word: str) -> None:
    path = f"{ROOT / 'configs' / stem}.py{':' if word else ''}{word}"
    config = from_dict(main.load_config(path).to_dict())
    for pruner in config.pruners.values():
        assert pruner.stages[-1].sparsity == pruner.target_sparsity
        assert pruner.one_shot or pruner.stages[-1].time == pruner.end


def test_an_interrupted_run_says_how_to_resume(tmp_path: Path) -> None:
    arguments = [f"--workdir={tmp_path / 'run'}", "--config.dense.epochs=9999"]
    child = subprocess.Popen(
        [sys.executable, "-m", "woodfisher_jax.main", DIGITS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    while child.poll() is None and not list(tmp_path.glob("run/checkpoints/44")):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    told, _ = child.communicate(timeout=120)
    assert child.returncode == 130, told
    assert f"to resume, give the same command with --workdir={tmp_path}/run" in told


def test_an_unknown_word_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"configs/resnet50.py:91.*80, 90, 95.*'91'"):
        main.load_config(f"{ROOT}/configs/resnet50.py:91")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config=configs/digits.py"]),
        (["--config=configs/nope.py"], ["configs/nope.py", "no such file"]),
        ([DIGITS, "--config.prune.num_sample=3"], ["did you mean", "num_samples?"]),
        ([DIGITS, "--config.prune.num_samples=abc"], ["num_samples=abc", "int"]),
        ([DIGITS, "--config.model.hidde=3"], ["config.model", "'hidde'", "'hidden'?"]),
        ([DIGITS, "--config.train.optimizer.b1=1"], ["optimizer.b1", "momentum"]),
        ([DIGITS, "--config.seed.x=3"], ["config.seed"]),
        ([DIGITS, "--config.prune.target_sparsity=2"], ["target_sparsity=2.0"]),
        ([DIGITS, "--config.model.name=resnet21"], ["resnet21", "resnet20"]),
        ([DIGITS, "--config.init_from=pyproject.toml"], ["pyproject.toml"]),
        ([DIGITS, "--bogus=1"], ["bogus"]),
        (
            ["--config=configs/resnet50.py", "--config.data.dir=nowhere"],
            ["imagenet2012", "nowhere"],
        ),
        ([DIGITS, "stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value[-1:]),
)
def test_an_error_is_one_line_and_exit_2(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = call(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_settings_and_further_pruners_can_be_overridden(tmp_path: Path) -> None:
    """In one process: config_flags reads the overrides as the command line does."""
    path = tmp_path / "c.py"
    path.write_text(
        "def get_config():\n"
        "    return {\n"
        "        'train': {'optimizer': {'name': 'adam'}},\n"
        "        'prune': {'prunable': 'fc1', 'num_samples': 10},\n"
        "        'prune_2': {'prunable': 'fc2'},\n"
        "    }\n"
    )
    code = (
        "import sys\n"
        "from absl import flags\n"
        "from woodfisher_jax import config, main\n"
        "main.parse(sys.argv)\n"
        "print(config.from_dict(flags.FLAGS.config.to_dict()))\n"
    )
    arguments = [
        f"--config={path}",
        "--config.train.optimizer.b1=0.5",
        "--config.train.optimizer.nesterov=True",
        "--config.model.hidden=(8,)",
        "--config.prune.num_samples=20",
        "--config.prune.block_size=9",
        "--config.prune_2.target_sparsity=0.6",
        "--config.prune_2.true_fisher=True",
        "--config.prune_2.scope=layer",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    first = {"prunable": "fc1", "num_samples": 20, "block_size": 9}
    second = {
        "prunable": "fc2",
        "target_sparsity": 0.6,
        "true_fisher": True,
        "scope": "layer",
    }
    optimizer = {"name": "adam", "b1": 0.5, "nesterov": True}
    expected = from_dict(
        {
            "model": {"hidden": (8,)},
            "train": {"optimizer": optimizer},
            "prune": first,
            "prune_2": second,
        }
    )
    assert done.stdout == f"{expected}\n", done.stderr


def test_help_names_the_command() -> None:
    done = call("--help")
    assert "--config=configs/digits.py" in done.stdout
    assert "--workdir" in done.stdout


def test_a_run_and_its_comparison(tmp_path: Path) -> None:
    done = call(
        DIGITS,
        "--config.dense.epochs=2",
        "--config.train.epochs=2",
        "--config.prune.end=2",
        "--config.prune.num_samples=50",
        "--config.prune.target_sparsity=0.9",
        "--config.model.hidden=(16,)",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert "woodfisher" in done.stdout
    assert "globalmagni" in done.stdout
    assert str(tmp_path) in done.stdout
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert (tmp_path / "compare-globalmagni" / "results.json").exists()
    assert "workdir" in (tmp_path / "log.txt").read_text()
    assert "orbax" not in done.stderr


def test_the_workdir_has_a_default(tmp_path: Path) -> None:
    config = tmp_path / "tiny.py"
    config.write_text(
        "def get_config():\n"
        "    return {'dense': {'epochs': 1}, 'prune': {'one_shot': True}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "woodfisher_jax.main", f"--config={config}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    assert (run / "results.json").exists()
