"""Where the real data is, and settings that every test shares.

Real data sets, checkpoints and the original's outputs are read in place, never
copied. ``WOODFISHER_SHARED`` names the folder that holds ``data/`` and ``golden/``
(default ``../shared`` beside the project); ``TFDS_DATA_DIR`` overrides where the data
sets are.
"""

import os
from pathlib import Path

import pytest

SHARED = Path(
    os.environ.get("WOODFISHER_SHARED", Path(__file__).parents[1].parent / "shared")
)


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
