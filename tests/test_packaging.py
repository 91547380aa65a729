"""The wheel holds what runs and nothing else; the import is light; one version."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import woodfisher_jax
from woodfisher_jax.extras import EXTRAS

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
"""Packages that are imported where they are first used, not by the import."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, without files of an earlier build."""
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


def distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower()


NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorboardX": "tensorboardx",
    "tensorflow_datasets": "tensorflow-datasets",
}
"""Modules whose distribution has another name."""

BASE = {distribution(each) for each in PROJECT["dependencies"]}


def modules(top_level_only: bool = False) -> set[str]:
    """Packages that this one imports: anywhere, or when a module of it is imported."""
    used = set()
    for path in [*(ROOT / "woodfisher_jax").rglob("*.py"), *ROOT.glob("configs/*.py")]:
        tree = ast.parse(path.read_text())
        for node in tree.body if top_level_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
    return {
        NAMES.get(name, name)
        for name in used - {*sys.stdlib_module_names, "woodfisher_jax"}
    }


def test_every_import_is_declared() -> None:
    """No package is used that came along with another by chance.

    What jax requires is part of its interface: its arrays have dtypes of ml_dtypes.
    """
    of_jax = {distribution(each) for each in requires("jax") or [] if ";" not in each}
    of_extras = {NAMES.get(name, name).lower() for name in EXTRAS}
    assert {"jax", "pillow"} < modules()
    assert modules() <= BASE | of_jax | of_extras
    assert modules(top_level_only=True) <= BASE | of_jax


def test_every_requirement_is_explained_in_the_documentation() -> None:
    text = (ROOT / "docs/install.md").read_text()
    table = text.partition("## The base install")[2].partition("\n\nIn MiB")[0]
    rows = re.findall(r"^\| ([\w.-]+) \| [^|]+ \|$", table, re.MULTILINE)
    assert {name.lower() for name in rows} - {"package"} == BASE
    extras = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    named = {name for row in extras for name in re.findall(r"\w+", row)}
    assert named == set(PROJECT["optional-dependencies"])
