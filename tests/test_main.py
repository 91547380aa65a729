"""The command line: help, errors that say what to write, exit codes, quiet."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import run_module

from woodfisher_jax import main
from woodfisher_jax.training.config import from_dict
from woodfisher_jax.training.config.arguments import read_config
from woodfisher_jax.training.resuming.preemption import Stopped

ROOT = Path(__file__).parents[1]
DIGITS = "--config=digits"
SMALL = (
    DIGITS,
    "--config.dense.epochs=1",
    "--config.train.epochs=1",
    "--config.prune.end=1",
    "--config.prune.num_samples=50",
    "--config.prune.target_sparsity=0.9",
    "--config.model.hidden=(16,)",
)

MAGNITUDE = "--config.prune.method=magni"
"""Which compiles the least."""

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: (exit code, output, errors)."""

    def call(*arguments: str) -> tuple[object, str, str]:
        capsys.readouterr()
        code = run_module("main", *arguments)
        return code, *capsys.readouterr()

    return call


# ------------------------------------------------------------------------------- help


def test_help_is_a_screen_with_examples_configs_and_exit_codes(
    command: Command,
) -> None:
    for flag in ("--help", "-h"):
        code, told, _ = command(flag)
        assert code == 0
        for word in ("main digits\n", "--workdir", "--quiet", "resnet50 ", "130"):
            assert word in told
        lines = told.splitlines()
        assert len(lines) < 45
        assert max(map(len, lines)) <= 88


def test_full_help_has_every_field_and_flag(command: Command) -> None:
    code, told, _ = command("--helpfull", "--config=resnet50")
    assert code == 0
    assert "--config.prune.block_size=2000\n" in told
    assert "--workdir" in told
    assert command("resnet50", "--helpfull")[1] == told
    code, told, _ = command("--helpfull")
    assert "--config.prune.block_size=None\n" in told


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no config is given", "  digits ", "main digits", "--help"]),
        ([DIGITS, DIGITS], ["--config is given 2 times"]),
        (["digts"], ["did you mean --config=digits?"]),
        (["digits", "kfac"], ["unexpected arguments ['kfac']"]),
        (["digits", DIGITS], ["unexpected arguments ['digits']"]),
        (
            ["evaluate", "runs/a b"],
            ["python -m woodfisher_jax.evaluate 'runs/a b'", "command of its own"],
        ),
        (["--config=configs/nope.py"], ["configs/nope.py", "no file", "digits"]),
        (["--config=digts"], ["did you mean --config=digits?"]),
        ([DIGITS, "--config.prune.num_sample=3"], ["did you mean", "num_samples?"]),
        ([DIGITS, "--config.prune.num_samples=abc"], ["num_samples='abc'", "whole"]),
        ([DIGITS, "--config.prune.one_shot=maybe"], ["one_shot='maybe'", "True or"]),
        ([DIGITS, "--config.prune.method=kfca"], ["'kfca'", "Did you mean 'kfac'?"]),
        ([DIGITS, "--config.train.schedule=cosin"], ["did you mean 'cosine'?"]),
        ([DIGITS, "--config.seed=None"], ["config.seed=None", "a whole number"]),
        ([DIGITS, "--config.model.hidde=3"], ["config.model", "'hidde'", "'hidden'?"]),
        ([DIGITS, "--config.model.hidden=abc"], ["config.model", "hidden=('abc',)"]),
        ([DIGITS, "--config.train.optimizer.b1=1"], ["optimizer.b1", "momentum"]),
        ([DIGITS, "--config.seed.x=3"], ["config.seed"]),
        ([DIGITS, "--config.prune.target_sparsity=2"], ["target_sparsity=2.0"]),
        ([DIGITS, "--config.model.name=resnet21"], ["resnet21", "resnet20"]),
        ([DIGITS, "--config.data.name=mnits"], ["config.data", "'mnist'?"]),
        ([DIGITS, "--config.init_from=pyproject.toml"], ["init_from", "pyproject.tom"]),
        ([DIGITS, "--config.init_from=nowhere.pth"], ["init_from", "nowhere.pth"]),
        ([DIGITS, "--bogus=1"], ["bogus"]),
        ([DIGITS, "--prune.method=kfac"], ["did you mean --config.prune.method?"]),
        ([DIGITS, "--confg.seed=1"], ["did you mean --config.seed?"]),
        ([DIGITS, "--epochs=3"], ["--config.dense.epochs or --config.train.epochs?"]),
        ([DIGITS, "--quiet=3"], ["quiet='3'; expected True or False"]),
        (["--config=resnet50", "--config.data.dir=nowhere"], ["imagenet2012", "nowhe"]),
        ([DIGITS, "stray"], ["stray"]),
        ([DIGITS, "--target=cuda:h100"], ["without --plan", "cuda:h100"]),
        ([DIGITS, "--plan", "--target=tpu:v9:2x2"], ["tpu:v9:2x2", "tpu:v5e:4x4"]),
    ],
    ids=lambda value: " ".join(value[-1:]),
)
def test_an_error_is_told_without_a_traceback_and_exit_2(
    tmp_path: Path, command: Command, arguments: list[str], words: list[str]
) -> None:
    code, told, errors = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert not (tmp_path / "run").exists()
    assert told == ""
    assert "Traceback" not in errors
    *_, error = errors.split("error: ")
    for word in words:
        assert word in error


@pytest.mark.parametrize("config", ["digits", "smollm2"])
@pytest.mark.parametrize(
    ("workdir", "reason"), [("", "; expected"), ("a", ": 'a' is"), ("a/b", ": 'a' is")]
)
def test_a_workdir_that_is_no_folder_is_told_before_anything_is_read(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    workdir: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("")
    code, told, errors = command(config, f"--workdir={workdir}")
    assert (code, told) == (2, "")
    assert errors.startswith(f"error: workdir={workdir!r}{reason}")
    assert "expected a folder" in errors
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_what_fails_on_the_way_is_exit_1_and_logged(
    tmp_path: Path, command: Command
) -> None:
    workdir = tmp_path / "run"
    code, _, errors = command(
        *SMALL, "--config.dense.learning_rate=1e30", f"--workdir={workdir}"
    )
    assert code == 1
    assert "error: the training loss is" in errors
    assert "Traceback" not in errors
    assert "DivergedError" in (workdir / "log.txt").read_text()


# -------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [DIGITS, "--config.seed=3", "--workdir=a"],
        ["digits", "--config.seed=3", "--workdir", "a"],
        ["--config.seed", "3", "--workdir", "a", "digits"],
    ],
)
def test_the_config_may_be_named_without_a_flag(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    runs = []
    monkeypatch.setattr(main, "run_all", lambda *run: runs.append(run))
    assert command(*arguments)[0] == 0
    assert runs == [(read_config([DIGITS, "--config.seed=3"])[1], Path("a"))]


def test_settings_and_further_pruners_can_be_overridden(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "def get_config():\n"
        "    return {\n"
        "        'train': {'optimizer': {'name': 'adam'}},\n"
        "        'prune': {'prunable': 'fc1', 'num_samples': 10, 'block_size': 3},\n"
        "        'prune_2': {'prunable': 'fc2'},\n"
        "    }\n"
    )
    parsed = []
    monkeypatch.setattr(main, "run_all", lambda config, _: parsed.append(config))
    code, *_ = command(
        "--config",
        str(path),
        "--config.train.optimizer.b1=0.5",
        "--config.train.optimizer.nesterov=True",
        "--config.model.hidden=(8,)",
        "--config.prune.num_samples=20",
        "--config.prune.block_size=None",
        "--config.prune_2.target_sparsity=0.6",
        "--config.prune_2.true_fisher=True",
        "--config.prune_2.scope=layer",
    )
    assert code == 0
    second = {
        "prunable": "fc2",
        "target_sparsity": 0.6,
        "true_fisher": True,
        "scope": "layer",
    }
    expected = from_dict(
        {
            "model": {"hidden": (8,)},
            "train": {"optimizer": {"name": "adam", "b1": 0.5, "nesterov": True}},
            "prune": {"prunable": "fc1", "num_samples": 20},
            "prune_2": second,
        }
    )
    assert parsed == [expected]


# ------------------------------------------------------------------------------- runs


def test_a_run_and_its_comparison(tmp_path: Path) -> None:
    """As users run it, in a process and a folder of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "woodfisher_jax.main", *SMALL, MAGNITUDE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("target sparsity 90.00 %") == 2
    assert "globalmagni" in done.stdout
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("digits-")
    assert str(workdir.relative_to(tmp_path)) in done.stdout
    assert (workdir / "comparison.png").stat().st_size > 1000
    assert (workdir / "compare-globalmagni" / "results.json").exists()
    page = (workdir / "report.html").read_text()
    assert "globalmagni, just pruned" in page
    assert f"--workdir={workdir.relative_to(tmp_path)}" in page
    assert "orbax" not in done.stderr
    assert "━" not in done.stderr  # No bars where there is no terminal.
    assert "images/s" in done.stderr
    assert "images/s" in (workdir / "log.txt").read_text()


@pytest.mark.slow
def test_quiet_prints_a_line_for_each_result(tmp_path: Path, command: Command) -> None:
    once = ("--config.prune.one_shot=True", "--config.train.epochs=0")
    code, told, errors = command(
        *SMALL, *once, MAGNITUDE, "--quiet", f"--workdir={tmp_path}"
    )
    assert code == 0
    assert errors == ""
    pruned, compared = told.splitlines()
    assert pruned.startswith("magni: 90.0")
    assert compared.startswith("globalmagni: 90.0")
    for line in (pruned, compared):
        assert "% sparse, top-1" in line
        assert " s, " in line
    assert pruned.endswith(str(tmp_path))
    assert compared.endswith(str(tmp_path / "compare-globalmagni"))
    assert "images/s" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("program", ["main.py", "/usr/bin/woodfisher"])
def test_a_stopped_run_says_how_to_resume(
    command: Command, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        sys.argv[0] = program
        raise Stopped("stopped after step 3", 130)

    monkeypatch.setattr(main, "run", stop)
    name = "woodfisher" if "bin" in program else "python -m woodfisher_jax.main"
    argument = "--config.model.hidden=(8, 4)"
    code, told, _ = command(DIGITS, argument, "--workdir=a b")
    assert code == 130
    assert told.splitlines()[-1] == f"  {name} {DIGITS} '{argument}' '--workdir=a b'"


def test_the_folder_that_was_chosen_is_named_to_resume(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped("stopped after step 3", 0)

    monkeypatch.setattr(main, "run", stop)
    code, told, _ = command(DIGITS)
    assert code == 0
    assert f"{DIGITS} --workdir=runs/digits-20" in told


@pytest.mark.slow
def test_an_interrupted_run_goes_on_by_the_command_it_says(tmp_path: Path) -> None:
    arguments = [DIGITS, "--config.dense.epochs=9999", f"--workdir={tmp_path}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "woodfisher_jax.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    while child.poll() is None and not list(tmp_path.glob("checkpoints/44")):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    told, _ = child.communicate(timeout=120)
    assert child.returncode == 130, told
    assert f"-m woodfisher_jax.main {' '.join(arguments)}" in told
    assert "saved in" in told
