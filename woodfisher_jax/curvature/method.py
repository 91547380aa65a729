"""What a pruning method is: options, a statistic, and the curvature that it takes.

A method is a frozen dataclass whose documented fields are its options. Fields without
documentation tell methods of one kind apart (how blocks are laid out, whether the loss
has a slope) and are set in the table of methods alone. A new kind is a subclass of
:class:`Method` or :class:`Sampled`; ``docs/adding_a_method.md`` has a worked example.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from woodfisher_jax.equations import obs
from woodfisher_jax.options import Options, option
from woodfisher_jax.rows.memory_plan import plan_rows
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.selection.patterns import Groups


class Found(NamedTuple):
    """A result over all weights.

    Attributes:
        value: [d], or of another shape.
        error: Largest estimate of a block's relative rounding error; 0 where it has
            been checked.
        factors: By tile, what another formula of the same blocks can start from.
        touched: Of a diagonal, the weights that some sample knows something of [d],
            bool; None where that is not known.
    """

    value: jax.Array
    error: jax.Array | float = 0.0
    factors: Mapping[int, jax.Array | None] | None = None
    touched: jax.Array | None = None


@runtime_checkable
class Curvature(Protocol):
    """The least that a statistic needs: one number for each weight."""

    def diagonal(self) -> Found:
        """The diagonal that the statistic takes [d]."""
        ...


@runtime_checkable
class Quadratic(Curvature, Protocol):
    """A curvature that models the loss, so that it predicts what a step costs."""

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v`` with the curvature itself, damped where the method damps it."""
        ...


@runtime_checkable
class Inverse(Quadratic, Protocol):
    """The inverse of a curvature, by which the other weights compensate.

    Its diagonal is that of F⁻¹, its quadratic form that of F.
    """

    def product(
        self,
        vector: jax.Array,
        factors: Mapping[int, jax.Array | None] | None = None,
    ) -> Found:
        """F⁻¹v for a vector v [d]; ``factors`` are those of the diagonal."""
        ...

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """The joint statistic of groups that are removed whole [groups, choices]."""
        ...


@runtime_checkable
class Joint(Inverse, Protocol):
    """An inverse that also solves for the kept weights with all others removed."""

    def joint_update(
        self, weights: jax.Array, kept: jax.Array, targets: jax.Array
    ) -> Found:
        """How the kept weights move when all others are removed at once [d].

        Args:
            weights: w, [d].
            kept: What stays, [d].
            targets: y, [N], of the slope; zero without one.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """A curvature of which nothing but one number for each weight is known.

    Attributes:
        values: [d]; 0 says that no sample knows anything of the weight.
    """

    values: jax.Array

    def diagonal(self) -> Found:
        """See :class:`Curvature`."""
        return Found(self.values, touched=self.values != 0)


@dataclasses.dataclass(frozen=True)
class Diagonal(Scores):
    """A diagonal curvature: the values are the second derivatives of the loss."""

    def quadratic_form(self, vector: jax.Array) -> float:
        """See :class:`Quadratic`."""
        return float(jnp.sum(self.values * vector * vector))


class Built(NamedTuple):
    """A curvature, and what was planned for it.

    Attributes:
        curvature: To be entered before use; what it stores is removed on exit.
        needs: None where nothing was planned.
    """

    curvature: AbstractContextManager[Curvature]
    needs: Needs | None = None


@dataclasses.dataclass(frozen=True)
class Method(Options):
    """A pruning method.

    Attributes:
        summary: One line for people.
        scopes: What a threshold may span, the default first.
        first_order: Whether the loss has a slope: statistic and update are then taken
            at w - h, h = F⁻¹ḡ, and -h is part of the update.
        needs_samples: Whether it takes gradients of the loss.
        allows_costs: Whether its statistic is never negative, so that it can be divided
            by what weights cost.
        is_quadratic: Whether its statistic grows with the square of the weights, so
            that they can be ranked in units in which no square leaves float32.
    """

    summary: str = ""
    scopes: tuple[str, ...] = ("global", "layer")
    first_order: bool = False

    needs_samples: ClassVar[bool] = False
    allows_costs: ClassVar[bool] = True
    is_quadratic: ClassVar[bool] = False

    @property
    def moves(self) -> bool:
        """Whether the other weights move."""
        return False

    def saliency(self, weights: jax.Array, diagonal: jax.Array | None) -> jax.Array:
        """The statistic, elementwise: the lowest are pruned first [d].

        Args:
            weights: [d]; in methods of first order w - h.
            diagonal: Of the curvature [d]; None for methods without one.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Magnitude(Method):
    """The smallest weights."""

    def saliency(self, weights: jax.Array, diagonal: jax.Array | None) -> jax.Array:
        """``|w|``."""
        del diagonal
        return obs.magnitude(weights)


@dataclasses.dataclass(frozen=True)
class Sampled(Method):
    """A method that estimates a curvature from gradients of the loss."""

    num_samples: int | None = option(
        None, "N, gradients in the estimate; default as many as samples give.", least=1
    )
    batch_size: int = option(1, "m, examples each gradient is the mean over.", least=1)

    needs_samples: ClassVar[bool] = True

    def plan(self, problem: Problem) -> Needs:
        """What the curvature takes, before anything is computed.

        Unless a kind says otherwise: the gradients pass once, and none is kept.

        Raises:
            MemoryLimitError: If it does not fit.
        """
        return plan_rows(problem, layouts=None, block_size=None)[0]

    def build(self, problem: Problem) -> Built:
        """The curvature of a loss at its masked weights.

        Args:
            problem: The loss, its parameters and samples, counted.
        """
        raise NotImplementedError


def ready(curvature: Curvature, needs: Needs | None = None) -> Built:
    """A curvature that holds nothing that has to be given back.

    Args:
        curvature: As it is.
        needs: What was planned for it.

    Example:
        >>> with wf.ready(wf.Diagonal(jnp.ones(3))).curvature as curvature:
        ...     curvature.quadratic_form(jnp.array([1.0, 2.0, 0.0]))
        5.0
    """
    return Built(nullcontext(curvature), needs)
