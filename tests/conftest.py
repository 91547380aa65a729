"""Where the real data is, and settings that every test shares.

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

# Most of the suite's time is compilation, much of it of the same programs. What one
# worker has compiled serves the other, and the processes that tests start.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OWNS_COMPILED = COMPILED not in os.environ
if OWNS_COMPILED:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="woodfisher-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    """Removes what was compiled, in the process that made the folder for it."""
    if OWNS_COMPILED:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def require(path: Path, what: str) -> Path:
    """Returns the path, or skips the test and says how to get what it needs."""
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
