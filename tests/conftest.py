"""Where the real data is, and settings that all tests share.

Real data sets, checkpoints and the original's outputs are read in place, never
copied. ``WOODFISHER_SHARED`` names the folder that holds ``data/`` and ``golden/``
(default ``../shared`` beside the project); ``TFDS_DATA_DIR`` overrides where the data
sets are.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

SHARED = Path(
    os.environ.get("WOODFISHER_SHARED", Path(__file__).parents[1].parent / "shared")
)

# XLA ends the process for a flag that it does not have, as this one since 0.11.1.
JAXLIB = tuple(int(part) for part in version("jaxlib").split(".")[:3])
NO_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < (0, 11, 1) else []

FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    *NO_EMITTERS,
)
"""Switch LLVM's optimizations off: most of the suite's time is compilation.

Small programs are not worth the parts that XLA cuts them into, nor an MLIR pipeline
for every fusion.
"""

NO_TRACEBACKS = {
    "JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS": "0",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
"""Leave the source lines of each operation out of what is compiled."""

LONGEST = (
    "test_main.py",
    "test_prune.py",
    "test_docs.py",
    "test_sequence.py",
    "test_loop.py",
    "test_models.py",
    "test_inverse.py",
    "test_plan.py",
    "test_start.py",
    "test_pruning_step.py",
    "test_prune_layers.py",
    "test_page.py",
    "test_sharding.py",
    "test_shrink.py",
    "test_step.py",
    "test_masked.py",
)
"""Files that take long, the longest first, so that both workers end together."""

# Many tests compile the same programs: what one worker has compiled serves the other,
# and the processes that tests start.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OWNS_COMPILED = COMPILED not in os.environ
if OWNS_COMPILED:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="woodfisher-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure(config: pytest.Config) -> None:
    """Sets flags that processes started by tests inherit.

    Not for slow tests, which compute more than they compile.
    """
    if config.getoption("markexpr") == "not slow":
        os.environ["XLA_FLAGS"] = " ".join(
            # First: XLA reads no flag behind a word that is none.
            (*FAST_COMPILATION, os.environ.get("XLA_FLAGS", ""))
        )
        os.environ.update(NO_TRACEBACKS)


def pytest_unconfigure() -> None:
    """Removes the compiled programs, in the process that made the folder for them."""
    if OWNS_COMPILED:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Spares the collector of garbage all that was imported, and most of its runs."""
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests for ``--dist loadfile --no-loadscope-reorder``."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def require(path: Path, what: str) -> Path:
    """Returns the path, or skips the test and says where the data comes from."""
    if not path.exists():
        pytest.skip(f"{what} not found at {path}; see CONTRIBUTING.md, 'Real data'")
    return path


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
    """The folder with TFDS-prepared MNIST and CIFAR-10."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", SHARED / "data" / "tfds"))
    return require(folder, "prepared data sets")


@pytest.fixture(scope="session")
def checkpoints_dir() -> Path:
    """The folder with the original's two PyTorch checkpoints."""
    return require(SHARED / "data" / "checkpoints", "PyTorch checkpoints")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder with outputs of the original implementation."""
    return require(SHARED / "golden", "golden outputs")
