"""What a pruning method is: options, a statistic, and a curvature to take it from.

A method is a frozen dataclass. Its options are fields; what tells two methods of one
kind apart (the layout of the blocks, whether the loss has a slope) are fields without
documentation, which only the table of methods sets. A kind of its own is a subclass of
:class:`Method`, with :meth:`~Method.saliency` and, if it needs samples,
:meth:`~Sampled.build`; ``docs/adding_a_method.md`` has a worked example.
"""

import dataclasses
from contextlib import AbstractContextManager
from typing import ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from woodfisher_jax.equations import obs
from woodfisher_jax.options import OptionError, Options, option
from woodfisher_jax.rows import memory_plan
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.selection.patterns import Groups


@runtime_checkable
class Curvature(Protocol):
    """The least that a statistic needs: one number a weight."""

    def diagonal(self) -> jax.Array:
        """The diagonal that the statistic takes [d]."""
        ...


@runtime_checkable
class Quadratic(Curvature, Protocol):
    """A curvature that also models the loss: it predicts the increase of a step."""

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v`` with the curvature itself, damped where the method damps it."""
        ...


@runtime_checkable
class Inverse(Quadratic, Protocol):
    """The inverse of a curvature: the other weights can make up for a removal.

    Its diagonal is that of F⁻¹, its quadratic form that of F.
    """

    def product(self, vector: jax.Array) -> jax.Array:
        """F⁻¹v for a vector v [d]."""
        ...

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """The joint statistic of groups that are removed whole [groups, choices]."""
        ...


class Method(Options):
    """A pruning method: options, statistic, curvature.

    Attributes:
        summary: One line for people.
        scopes: What a threshold may span, the default first: "global" (one for all
            tensors) or "layer" (one a tensor).
    """
