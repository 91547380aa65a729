"""Imports point one way, and the light core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "woodfisher_jax"

# From bottom to top. A module imports rooms of lower levels only; modules of one level
# do not import each other, but for those of one folder.
LEVELS = [
    {"pruning.paths", "pruning.fisher", "pruning.obs", "pruning.schedules"}
    | {"pruning.projections", "exit_codes"},
    {"pruning.memory", "pruning.sharding", "pruning.needs", "pruning.kronecker"}
    | {"pruning.recompute", "pruning.diagnostics", "pruning.leave_one_out"}
    | {"pruning.swaps"},
    {"pruning.masks", "pruning.blocks", "pruning.samples", "pruning.curvature"},
    {"pruning.gradients", "pruning.methods", "pruning.panels", "pruning.layers"}
    | {"pruning.patterns"}
    | {"pruning.joint"},
    {"pruning.disk", "pruning.capture", "pruning.flops", "pruning.hessian"}
    | {"pruning.inputs"}
    | {"pruning.groups"},
    {"pruning.kronecker_groups"}
    | {"pruning.settings", "pruning.kfac", "pruning.vectors", "pruning.moments"},
    {"pruning.budget", "pruning.store", "pruning.selection"},
    {"pruning.resources", "pruning.passes"},
    {"pruning.inverse", "pruning.info"},
    {"pruning.operators"},
    {"pruning.step"},
    {"pruning.prune"},
    {"pruning.masked", "pruning.matching", "pruning.damping_search"},
    {"", "models", "data", "checkpoint", "plots", "progress", "torch_pickle"}
    | {"preemption", "metrics", "tables", "environment", "page", "quantities"},
    {"torch_files", "objective", "optimizer", "sections", "sparse_files"},
    {"config_checks"},
    {"config", "state_dicts", "latency", "serving", "charts"},
    {"saved_run", "config_files"},
    {
        "torch_weights",
        "workdir",
        "history",
        "train_step",
        "batch_norm",
        "distillation",
        "loss_path",
        "pruners",
        "record",
    },
    {"distributed", "provenance", "stage_charts"},
    {"evaluate", "export", "run_page", "comparison"},
    {"plan", "comparison_page"},
    {"pruning_step", "results", "report"},
    {"train"},
    {"main"},
]


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


def room(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    head = module.split(".")[0]
    return head if head in ("models", "data") else module


def level(module: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room(module) in rooms)


SOURCES = sorted(
    (p for p in PACKAGE.rglob("*.py") if name_of(p) != "pruning"), key=name_of
)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_lower_modules_only(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path) - {"pruning"}:
        if room(imported) == room(module) and "." in module + imported:
            continue
        assert level(imported) < level(module), f"{module or '__init__'} -> {imported}"


def test_configs_import_nothing_of_the_package() -> None:
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "ml_collections", path
            assert not isinstance(node, ast.Import), path


def test_the_core_imports_with_five_packages_alone() -> None:
    """pruning and models need jax, flax, optax, orbax and absl, and nothing heavy."""
    heavy = [
        "tensorflow_datasets",
        "grain",
        "ml_collections",
        "sklearn",
        "matplotlib",
        "tensorboardX",
        "PIL",
        "safetensors",
        "torch",
        "tensorflow",
    ]
    code = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        "import woodfisher_jax, woodfisher_jax.pruning.prune, woodfisher_jax.models\n"
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
