"""docs/adding_a_method.md, done in a folder of its own, without editing the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/adding_a_method.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n\n```python\n(.*?)```", PAGE, re.S))
(COMMAND,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", code + arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_a_new_kind_is_one_file_of_forty_lines() -> None:
    assert len(FILES["snip.py"].splitlines()) <= 40


@pytest.mark.slow
def test_both_methods_prune_from_python(folder: Path) -> None:
    code = (
        FILES["use.py"]
        + FILES["covariance.py"]
        + (
            "p, m, i = wf.prune(loss_fn, params, x, sparsity=0.5,"
            " method='woodfisher_covariance', damping=1e-2)\n"
            "print(i.sparsity)\n"
            "by_hand = jnp.abs(params['w'] * jax.grad(loss_fn)(params, x)['w'])\n"
            "_, m, _ = wf.prune(loss_fn, params, x, sparsity=0.5, method='snip')\n"
            "print(bool((m['w'] == (by_hand >= jnp.median(by_hand))).all()))\n"
            "try: wf.prune(loss_fn, params, x, sparsity=0.5, method='snip', power=-1)\n"
            "except ValueError as error: print(error)\n"
        )
    )
    done = run(folder, code)
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = done.stdout.splitlines()
    assert first.split()[:2] == ["0.5", "None"]
    assert (second, third) == ("0.5", "True")
    assert fourth.startswith("power=-1; expected a number above 0")


@pytest.mark.slow
def test_the_command_line_finds_the_method_and_its_option(folder: Path) -> None:
    words = COMMAND.replace("python -m woodfisher_jax.main ", "").split()
    main = (
        f"sys.argv = ['main', *{words!r}, *sys.argv[1:]]\n"
        "from woodfisher_jax.main import cli\ncli()"
    )
    done = run(folder, main, "--workdir=run", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "snip: 80.0" in done.stdout
    refused = run(folder, main, "--workdir=other", "--config.prune.power=-1")
    assert refused.returncode == 2
    assert "config.prune.power=-1" in refused.stderr
