"""What an extra installs is imported when needed, or named with its command."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from woodfisher_jax import data
from woodfisher_jax.extras import EXTRAS, MissingExtraError, require

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
PACKAGES = {"sklearn": "scikit-learn"}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = PACKAGES.get(module, module)
    installed = PROJECT["project"]["optional-dependencies"][extra]
    assert package in [re.split(r"[<>=]", each)[0] for each in installed]
    assert require(module, "this").__name__ == module
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        require(module, "this")
    expected = f"this needs {package}: pip install 'woodfisher-jax[{extra}]'"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("digits", "sklearn", r"digits needs scikit-learn: .*\[digits\]"),
        ("image_folder", "grain", r"image_folder needs grain: .*\[images\]"),
    ],
)
def test_a_data_set_names_its_extra(
    name: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingExtraError, match=message):
        data.load(name)


def test_a_command_ends_before_anything_starts(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['grain'] = None\n"
        "from woodfisher_jax import main; main.cli()"
    )
    options = ("--config=resnet50:smoke", f"--workdir={tmp_path}/run", "--plan")
    done = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: the data set generated_images needs grain: "
        "pip install 'woodfisher-jax[images]'"
    )
    assert not list(tmp_path.iterdir())
