"""Imports point down, and the light core stays light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

from woodfisher_jax.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "woodfisher_jax"


# Rooms, lowest first. A room imports lower ones only; those of one line do not import
# one another, except the commands. A room within a room has a line of its own.
ROOMS = """
compilation equations options extras progress written_files
trees schedules exit_codes
tracing.primitives
tracing.dimensions tracing.entries
tracing
rows
info selection
curvature shrinking
methods loss_model
step
driver
prune
masked batch_norm shrink
stages layerwise
models data report.elements report.metrics
report.record
report.sections
report
weights
training.network
training.config
training.resuming
training
training.language
main evaluate export torch_weights report.__main__
"""
LEVEL = {
    room: level
    for level, rooms in enumerate(ROOMS.strip().splitlines())
    for room in rooms.split()
}
COMMANDS = LEVEL["main"]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").rstrip(".")


def room_of(name: str) -> str:
    """The innermost room that a module is in, or is."""
    while name not in LEVEL:
        name = name.rpartition(".")[0]
    return name


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str) -> set[str]:
    """Modules of this package that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # A package that a module is taken from is a path to it, no import.
                is_module = whole.removeprefix("woodfisher_jax.") in MODULES
                found.add(whole if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {n.removeprefix("woodfisher_jax.") for n in found if "woodfisher_jax" in n}
    return (inside & MODULES.keys()) - {name}


def test_a_room_imports_lower_rooms_alone() -> None:
    upwards = []
    for name in MODULES.keys() - {""}:
        room = room_of(name)
        for imported in imports_of(name):
            other = room_of(imported)
            same = room == other or LEVEL[room] == LEVEL[other] == COMMANDS
            if not (same or LEVEL[other] < LEVEL[room]):
                upwards.append(f"{name} imports {imported}")
    assert not upwards, "\n".join(sorted(upwards))


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports_of(name) for name in MODULES.keys() - {""}}
    graphlib.TopologicalSorter(graph).prepare()


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
