"""A run of a few seconds on the digits that ship with scikit-learn."""

from pathlib import Path
from typing import Any

import pytest

from woodfisher_jax.report import metrics
from woodfisher_jax.training import loop
from woodfisher_jax.training.config import Config, from_dict


def run(config: Config, workdir: Path, **options: Any) -> dict[str, Any]:
    """A run without tables, plots and page, which take longer than its training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", metrics.write_results)
        return loop.run(config, workdir, **options)


def small(**changes: Any) -> Config:
    """A config: two epochs dense, three with pruning steps to 80 %.

    Args:
        **changes: ``section__field=value`` or ``field=value``.
    """
    values: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": (16,)},
        "dense": {"epochs": 2, "learning_rate": 0.05},
        "train": {"epochs": 3, "learning_rate": 0.02, "weight_decay": 1e-4},
        "prune": {
            "target_sparsity": 0.8,
            "initial_sparsity": 0.3,
            "end": 2,
            "num_samples": 50,
        },
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return from_dict(values)
