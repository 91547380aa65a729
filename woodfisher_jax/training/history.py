"""The history of a run, which lives in its checkpoints."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Log:
    """What a checkpoint holds besides arrays: the run so far, as JSON.

    Attributes:
        step: Optimizer steps taken.
        dense: Accuracy of the dense network, once it is known.
        stages: A record of each pruning step done.
        rows: A record of each epoch and pruning step.
        losses: Loss of each step of the epoch so far.
        epoch_seconds: Wall time of its training so far.
        starved_steps: How many of its steps a device had to wait for, having finished
            the one before.
        seconds: Wall time spent, over all starts of the run.
    """

    step: int = 0
    dense: dict[str, float] | None = None
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    epoch_seconds: float = 0.0
    starved_steps: int = 0
    seconds: float = 0.0

    @property
    def event(self) -> int:
        """Grows with everything that is saved; see ``training.checkpoint``."""
        return self.step + len(self.stages) + (self.dense is not None)
