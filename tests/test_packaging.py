"""The wheel holds what runs and nothing else; the import is light; one version."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import woodfisher_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "configs", "woodfisher_jax")

NEEDED_LATER = [
    "PIL",
    "flax",
    "grain",
    "matplotlib",
    "ml_collections",
    "orbax",
    "requests",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tensorstore",
]
"""What takes its time to import, for those who call what needs it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy, so that nothing of an earlier build gets into it."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer builds the wheel: pip install -e '.[dev]'")
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    code = (
        "import sys\n"
        "from setuptools import build_meta\n"
        "print(build_meta.build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source / "dist")],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_every_config_and_the_types_mark(
    wheel: zipfile.ZipFile,
) -> None:
    package, configs = ROOT / "woodfisher_jax", ROOT / "configs"
    expected = {
        f"woodfisher_jax/{p.relative_to(package)}" for p in package.rglob("*.py")
    }
    expected |= {f"woodfisher_jax/configs/{p.name}" for p in configs.glob("*.py")}
    expected.add("woodfisher_jax/py.typed")
    info = f"woodfisher_jax-{woodfisher_jax.__version__}.dist-info/"
    assert {n for n in wheel.namelist() if not n.startswith(info)} == expected
    assert f"{info}licenses/LICENSE" in wheel.namelist()
    for name in expected:
        assert wheel.getinfo(name).file_size < 100_000, name


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"woodfisher_jax-{woodfisher_jax.__version__}.dist-info/"
    metadata = wheel.read(f"{info}METADATA").decode()
    for line in (
        f"Version: {woodfisher_jax.__version__}",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Classifier: Typing :: Typed",
        "Requires-Python: >=3.11",
    ):
        assert f"\n{line}\n" in metadata
    scripts = wheel.read(f"{info}entry_points.txt").decode()
    assert "woodfisher = woodfisher_jax.main:cli" in scripts


def test_the_version_is_in_one_place() -> None:
    """A second place is one that somebody forgets."""
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", woodfisher_jax.__version__)
    assert f"## {woodfisher_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_the_licence_is_whole_and_the_paper_is_cited() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "arXiv:2004.14340" in (ROOT / "CITATION.cff").read_text()


def test_the_import_leaves_out_what_is_needed_later() -> None:
    code = (
        "import sys, woodfisher_jax\n"
        f"print([name for name in {NEEDED_LATER} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "[]\n", done.stderr


def test_every_import_is_declared() -> None:
    """No package is used that came along with another by chance."""
    declared = {re.split(r"[^\w-]", d)[0].lower() for d in PROJECT["dependencies"]}
    names = {
        "PIL": "pillow",
        "absl": "absl-py",
        "google": "protobuf",
        "ml_collections": "ml-collections",
        "orbax": "orbax-checkpoint",
        "sklearn": "scikit-learn",
        "tensorboardX": "tensorboardx",
        "tensorflow_datasets": "tensorflow-datasets",
    }
    own = {*sys.stdlib_module_names, "woodfisher_jax"}
    used = set()
    for path in [*(ROOT / "woodfisher_jax").rglob("*.py"), *ROOT.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
    assert {"jax", "PIL"} < used
    assert {names.get(name, name) for name in used - own} <= declared
