"""Imports point one way, and the light core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

from woodfisher_jax.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "woodfisher_jax"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").rstrip(".")


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a module imports, wherever it does."""
    modules = {name_of(p) for p in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("woodfisher_jax."):
                found.add(name.removeprefix("woodfisher_jax."))
    return (found & modules) - {name_of(path)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(p): imports_of(p) for p in PACKAGE.rglob("*.py")}
    graph[""] = set()
    left = dict(graph)
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"a circle of imports in {sorted(left)}"
        left = {name: found for name, found in left.items() if name not in free}


def test_configs_import_nothing_of_the_package() -> None:
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "ml_collections", path
            assert not isinstance(node, ast.Import), path


def test_the_core_imports_with_five_packages_alone() -> None:
    """Pruning and models import without what is not jax, flax, optax, orbax or absl."""
    heavy = [
        *EXTRAS,
        "tensorflow_datasets",
        "ml_collections",
        "PIL",
        "safetensors",
        "torch",
        "tensorflow",
    ]
    code = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        "import woodfisher_jax, woodfisher_jax.prune, woodfisher_jax.models\n"
        "print(woodfisher_jax.prune.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "prune\n", done.stderr


def test_only_main_defines_flags() -> None:
    for path in PACKAGE.rglob("*.py"):
        if name_of(path) != "main":
            assert "flags.DEFINE" not in path.read_text(), path
