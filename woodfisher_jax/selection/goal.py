"""How far to prune, over what, and which weights stay or go together."""

import dataclasses

from woodfisher_jax.options import OptionError, Options, option
from woodfisher_jax.schedules import POLY_DEGREE, SPACINGS
from woodfisher_jax.selection.costs import RESCALINGS
from woodfisher_jax.selection.named_patterns import (
    GroupNames,
    Pattern,
    check_goal,
    parse,
)
from woodfisher_jax.selection.structures import Structures

SCOPES = ("global", "layer")
"""What a threshold spans: all tensors, or each by itself."""


@dataclasses.dataclass(frozen=True)
class Goal(Options):
    """What every method shares: how many weights stay, and how they are chosen."""

    sparsity: float | None = option(
        None,
        "Fraction of all prunable weights to be zero afterwards; default that of a "
        "pattern N:M.",
        least=0,
        below=1,
    )
    flops_target: float | None = option(
        None,
        "Instead of a sparsity: millions of multiply-accumulates of one example to be "
        "left, in all layers.",
        above=0,
    )
    scope: str | None = option(
        None,
        "global (one threshold) or layer (the sparsity in each tensor); default the "
        "method's own.",
        choices=SCOPES,
    )
    pattern: str | GroupNames | Structures | Pattern | None = option(
        None,
        "Weights that are kept or removed together: 2:4 (any N:M of consecutive "
        "inputs), 4x1 (any block of inputs by outputs), filters, heads, structures "
        "(channels, neurons and heads that can be taken out, with what makes and reads "
        "them) or channels or neurons of these, in Python also a function (path, "
        "shape) -> group numbers; default single weights.",
    )
    flops_power: float = option(
        0.0,
        "Exponent a: saliencies are divided by MACs^a of their layer, so that costly "
        "layers lose more weights.",
        least=0,
    )
    flops_per_parameter: bool = option(
        False, "Count a layer by the MACs of one of its weights instead of all."
    )
    flops_normalize: str = option(
        "none",
        "log takes the binary logarithm of the MACs.",
        choices=tuple(RESCALINGS),
    )
    recompute: int = option(
        0,
        "How often the curvature is computed again on the way to the target.",
        least=0,
        most=1000,
    )
    recompute_schedule: str = option(
        "linear",
        "How these steps are spaced: linear, poly (long steps first) or exponential "
        "(the same share of what is left at each).",
        choices=SPACINGS,
    )
    recompute_degree: float | None = option(
        None, f"Exponent of poly; default {POLY_DEGREE:g}.", above=0
    )

    def __post_init__(self) -> None:
        """Parses the pattern and checks the fields, alone and together.

        Raises:
            OptionError: Naming the field, what was expected and what came.
        """
        super().__post_init__()
        pattern = parse(self.pattern)
        object.__setattr__(self, "pattern", pattern)
        if self.recompute_schedule != "poly" and self.recompute_degree is not None:
            raise OptionError(
                "recompute_degree",
                f"recompute_degree={self.recompute_degree} has no meaning with "
                f"recompute_schedule={self.recompute_schedule!r}; expected None, or "
                "recompute_schedule='poly'",
            )
        if self.scope == "layer" and (self.flops_target or self.flops_power):
            raise OptionError(
                "scope",
                f"scope='layer' with flops_power={self.flops_power} and flops_target="
                f"{self.flops_target}; expected scope='global', the only scope in "
                "which layers compete",
            )
        if pattern is not None:
            check_goal(
                pattern,
                self.sparsity,
                self.scope or "global",
                self.flops_target,
                self.flops_power,
            )

    @property
    def degree(self) -> float | None:
        """Exponent of the way to the target; None for an exponential one."""
        if self.recompute_schedule == "poly":
            return self.recompute_degree or POLY_DEGREE
        return 1.0 if self.recompute_schedule == "linear" else None

    @property
    def counts_macs(self) -> bool:
        """Whether the choice of weights depends on what they cost."""
        return self.flops_target is not None or self.flops_power > 0

    @property
    def completes_pattern(self) -> bool:
        """Whether all groups of N:M are to obey it, not only the cheapest."""
        own = self.pattern.sparsity if isinstance(self.pattern, Pattern) else None
        return own is not None and (self.sparsity or 0.0) > own - 1e-6

    def resolved(self, scope: str) -> "Goal":
        """The goal of a method with this scope, once it says how far.

        Raises:
            OptionError: Unless there is exactly one of sparsity and flops_target.
        """
        sparsity = self.sparsity
        if sparsity is None and isinstance(self.pattern, Pattern):
            sparsity = self.pattern.sparsity
        if (sparsity is None) == (self.flops_target is None):
            raise OptionError(
                "sparsity",
                f"sparsity={sparsity} and flops_target={self.flops_target}; expected "
                "exactly one of them: a fraction in [0, 1), or millions of "
                "multiply-accumulates",
            )
        return self.replace(sparsity=sparsity, scope=scope)
