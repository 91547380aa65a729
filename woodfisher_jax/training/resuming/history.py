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
        """Grows with everything that is saved; see ``training.resuming.checkpoint``."""
        return self.step + len(self.stages) + (self.dense is not None)

    @property
    def moment(self) -> str:
        """Where the run is, in words: ``epoch 22, step 484, after pruning step 2``."""
        last = self.rows[-1] if self.rows else {}
        # Within an epoch there is no record of it.
        epochs = [f"epoch {last['epoch']:g}"] if last.get("step") == self.step else []
        stages = [f"after pruning step {len(self.stages)}"] if self.stages else []
        return ", ".join([*epochs, f"step {self.step:,}", *stages])
