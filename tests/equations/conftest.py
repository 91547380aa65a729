"""Fixtures of these tests."""

import numpy as np
import pytest
from one_layer import one_layer


@pytest.fixture(scope="session")
def layer() -> dict[str, np.ndarray]:
    return one_layer()
