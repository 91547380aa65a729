"""Where the real data is, and settings that all tests share.

Real data sets, checkpoints and the original's outputs are read in place, never
copied. ``WOODFISHER_SHARED`` names the folder that holds ``data/`` and ``golden/``
(default ``../shared`` beside the project); ``TFDS_DATA_DIR`` overrides where the data
sets are.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

SHARED = Path(
    os.environ.get("WOODFISHER_SHARED", Path(__file__).parents[1].parent / "shared")
)

# Most of the suite's time is compilation. LLVM's optimizations cost more here than the
# faster programs save; processes that tests start inherit the flags.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

# Many tests compile the same programs: what one worker has compiled serves the other,
# and the processes that tests start.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OWNS_COMPILED = COMPILED not in os.environ
if OWNS_COMPILED:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="woodfisher-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    """Removes the compiled programs, in the process that made the folder for them."""
    if OWNS_COMPILED:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


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
