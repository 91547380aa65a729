"""How layers are pruned one after another, and what became of them."""

import dataclasses
from typing import NamedTuple

import numpy as np

from woodfisher_jax.info import emptied_line
from woodfisher_jax.options import Options, option
from woodfisher_jax.rows.projections import METRICS
from woodfisher_jax.selection.goal import SCOPES

MOST_LAYERS = 20
"""Rows of a printed table; the attribute has all layers."""

AIMS = ("network", "layer")
"""What a layer's outputs are to be near to."""


@dataclasses.dataclass(frozen=True)
class Layerwise(Options):
    """How layers are pruned one after another."""

    scope: str = option(
        "layer",
        "layer (the sparsity in each layer) or global (over all layers, by what their "
        "outputs mean to those of the network).",
        choices=SCOPES,
    )
    spread: float = option(
        0.2,
        "With scope='global': how far the sparsity of a layer may be from that of all; "
        "of single weights each keeps at least a quarter of the share that all keep.",
        least=0,
        most=1,
    )
    sensitivity_examples: int = option(
        8,
        "With scope='global': examples that tell what a layer's outputs mean.",
        least=1,
    )
    metric: str = option(
        "identity",
        "With scope='global' or distil: how far outputs of the network are from each "
        "other, identity (squares) or softmax (divergence, of logits).",
        choices=METRICS,
    )
    seed: int = option(0, "With scope='global': of random projections of the outputs.")
    damping: float = option(
        0.05,
        "Added to the second moments of a layer's inputs, in units of their mean; it "
        "draws weights towards what they were. Language models are better with 0.15, "
        "small networks with 0.01.",
        above=0,
    )
    aim: str = option(
        "network",
        "network (a layer's outputs are to be those in the unpruned network) or layer "
        "(those of the unpruned layer on the same inputs).",
        choices=AIMS,
    )
    rounds: int = option(8, "Rounds of ADMM with each of two penalties.", least=1)
    polish: int = option(
        8, "Steps of conjugate gradients on the weights that stay.", least=0
    )
    repair: int = option(
        0,
        "Passes over the inputs in which the weights that stay are moved so that the "
        "outputs of several layers together are those of the unpruned network.",
        least=0,
    )
    repair_stages: int = option(
        4,
        "Layers, counted one after another, that are repaired together; 4 are a block "
        "of a transformer.",
        least=1,
    )
    repair_rate: float = option(
        8e-3,
        "Learning rate of the repair at its start, relative to the weights of a "
        "tensor; it falls to zero.",
        above=0,
    )
    distil: int = option(
        0,
        "Passes over the inputs at the end in which all weights that stay are moved so "
        "that the network's outputs are those of the unpruned one.",
        least=0,
    )
    distil_rate: float = option(
        1e-3, "Learning rate of these passes, as ``repair_rate``.", above=0
    )
    batch_size: int = option(
        4,
        "Most examples that pass through the network at once; repair and distil take "
        "one step for so many.",
        least=1,
    )


class LayerResult(NamedTuple):
    """What became of one layer.

    Attributes:
        path: Its weight tensor.
        number: Its number in a tensor of stacked layers; 0 for others.
        sparsity: Fraction of its weights that are zero.
        error: ``E ‖P x - W x‖² / E ‖W x‖²`` on the inputs that it was pruned with,
            before any repair or distillation.
    """

    path: str
    number: int
    sparsity: float
    error: float


class CostShare(NamedTuple):
    """A cost of a network whose structures are taken out, as shares of the whole.

    Attributes:
        asked: What might be left.
        left: What is left.
    """

    asked: float
    left: float


class LayerwiseInfo(NamedTuple):
    """What a layer-wise pruning did.

    Attributes:
        sparsity: Fraction of the prunable weights that are zero now.
        nonzero: How many prunable weights stay.
        prunable: How many prunable weights there are.
        sparsity_by_path: Sparsity of each prunable parameter.
        layers: Each layer in the order of the network.
        seconds: Wall time by phase.
        empty_outputs: As of :class:`woodfisher_jax.PruneInfo`.
        warnings: What has been warned of, as a :class:`woodfisher_jax.PruneWarning`.
        costs: Of structures, what is left of each cost that was given, by "macs",
            "size" and "latency".
        whole: Families of structures that stay, by the name of the first tensor whose
            outputs they are: no prunable layer alone reads them along its inputs.
    """

    sparsity: float
    nonzero: int
    prunable: int
    sparsity_by_path: dict[str, float]
    layers: tuple[LayerResult, ...]
    seconds: dict[str, float]
    empty_outputs: dict[str, int]
    warnings: tuple[str, ...]
    costs: dict[str, CostShare]
    whole: tuple[str, ...]

    @property
    def errors(self) -> dict[str, float]:
        """The error of each parameter, the mean over layers that are stacked in it."""
        found: dict[str, list[float]] = {}
        for layer in self.layers:
            found.setdefault(layer.path, []).append(layer.error)
        return {path: float(np.mean(errors)) for path, errors in found.items()}

    def __repr__(self) -> str:
        """The outcome in one line."""
        seconds = sum(self.seconds.values())
        warned = f", warnings={len(self.warnings)}" if self.warnings else ""
        return (
            f"LayerwiseInfo(sparsity={self.sparsity:.4f}, nonzero={self.nonzero}, "
            f"prunable={self.prunable}, layers={len(self.layers)}, "
            f"seconds={seconds:.2f}{warned})"
        )

    def __str__(self) -> str:
        """A table: sparsity and error of the layers that lost most, and what else."""
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:MOST_LAYERS]
        names = [
            f"{layer.path}[{layer.number}]" if layer.number else layer.path
            for layer in worst
        ]
        width = max(map(len, names), default=0)
        moved = [n for n in ("repair", "distillation") if self.seconds.get(n)]
        before = f" before {' and '.join(moved)}" if moved else ""
        lines = [
            f"{100 * self.sparsity:.2f} % sparse: {self.nonzero:,} of "
            f"{self.prunable:,} prunable weights left",
            *(
                f"{name}: {cost.left:.4f} left, {cost.asked:.4g} asked"
                for name, cost in self.costs.items()
            ),
            "",
            f"{'':{width}}  sparsity   error{before}",
        ]
        lines += [
            f"{name:{width}}  {100 * layer.sparsity:6.2f} %  {layer.error:.4f}"
            for name, layer in zip(names, worst, strict=True)
        ]
        if len(worst) < len(self.layers):
            others = len(self.layers) - len(worst)
            lines.append(f"{others} more with lower errors: info.layers")
        phases = ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items() if s)
        lines.append("")
        if self.empty_outputs:
            lines.append(f"empty    {emptied_line(self.empty_outputs)}")
        if self.whole:
            stay = ", ".join(self.whole)
            lines.append(f"whole    {stay}: no prunable layer alone reads them")
        lines.append(f"seconds  {phases}")
        return "\n".join(lines + [f"warning  {text}" for text in self.warnings])
