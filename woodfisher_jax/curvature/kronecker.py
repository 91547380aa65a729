"""Optimal Brain Surgeon with the Kronecker-factored Fisher of each layer."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature import kfac
from woodfisher_jax.curvature.checked import TOLERANCE, CurvatureError
from woodfisher_jax.curvature.fisher import INVERTIBLE, Surgeon
from woodfisher_jax.curvature.kronecker_groups import kronecker_saliencies
from woodfisher_jax.curvature.method import Built, Found, ready
from woodfisher_jax.equations import kronecker
from woodfisher_jax.options import option
from woodfisher_jax.rows.memory_plan import plan_passes
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees import blocks


@dataclasses.dataclass(frozen=True)
class Kronecker(Surgeon):
    """Optimal Brain Surgeon with ``F ≈ S ⊗ A`` of every layer.

    Mini-batches of m examples are not averaged: they make m times as many examples, for
    a mean of gradients has no Kronecker factors.
    """

    damping: float = option(
        1e-5,
        "λ, added to the Fisher's diagonal; a number alone, for auto needs the "
        "gradients of blocks.",
        **INVERTIBLE,
    )
    pi: bool = option(False, "Split the damping by the traces of the factors.")

    def plan(self, problem: Problem) -> Needs:
        """See :meth:`~woodfisher_jax.curvature.method.Sampled.plan`."""
        return plan_passes(lambda size: kfac.passes(problem, size), problem)

    def build(self, problem: Problem) -> Built:
        """See :meth:`~woodfisher_jax.curvature.method.Sampled.build`."""
        needs = self.plan(problem)
        factors = kfac.kfac_factors(
            problem.loss_fn,
            problem.params,
            problem.masks,
            problem.samples,
            num_samples=problem.num_samples,
            batch_size=problem.batch_size,
            microbatch_size=needs.microbatch_size,
        )
        damped = kronecker.damped(factors, self.strength, pi=self.pi)
        inverse = kronecker.inverse(damped)
        undamped = blocks.flatten(problem.order, kronecker.diagonal(factors))
        touched = undamped != 0
        return ready(KroneckerInverse(damped, inverse, problem.order, touched), needs)


@dataclasses.dataclass(frozen=True)
class KroneckerInverse:
    """F⁻¹ of every layer as a product of two small inverses.

    Attributes:
        factors: Of F, damped.
        inverses: Of F⁻¹.
        order: The flat order of the weights.
        touched: Weights that some sample knows something of [d], bool; None if unknown.
    """

    factors: kronecker.Factors
    inverses: kronecker.Factors
    order: blocks.FlatOrder
    touched: jax.Array | None = None

    def diagonal(self) -> Found:
        """diag(F⁻¹) [d]."""
        found = blocks.flatten(self.order, kronecker.diagonal(self.inverses))
        return Found(found, touched=self.touched)

    def product(
        self,
        vector: jax.Array,
        factors: Mapping[int, jax.Array | None] | None = None,
    ) -> Found:
        """F⁻¹v for a vector v [d]."""
        del factors
        return Found(self._multiplied(self.inverses, vector))

    def joint_update(
        self, weights: jax.Array, kept: jax.Array, targets: jax.Array
    ) -> Found:
        """See :class:`~woodfisher_jax.curvature.method.Joint`; there is no slope.

        Raises:
            CurvatureError: If the factors are too ill conditioned.
        """
        del targets
        tensors, stays = (blocks.unflatten(self.order, v) for v in (weights, kept))
        found, error = kronecker.joint_update(
            self.factors, self.inverses, tensors, stays
        )
        if not error <= TOLERANCE:
            raise CurvatureError(
                "the joint update with Kronecker factors ends with a residual of "
                f"{error:.1g} of what it solves for, expected at most {TOLERANCE:g}; "
                "raise damping, or take update='sum'"
            )
        return Found(blocks.flatten(self.order, found), error)

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """The joint statistic of groups [groups, choices]."""
        found = kronecker_saliencies(self.inverses, weights, self.order, groups)
        return jnp.asarray(found, jnp.float32)

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v``, summed in float64."""
        found = self._multiplied(self.factors, vector)
        return float(np.dot(*(np.asarray(v, np.float64) for v in (vector, found))))

    def _multiplied(self, factors: kronecker.Factors, vector: jax.Array) -> jax.Array:
        tensors = blocks.unflatten(self.order, vector)
        return blocks.flatten(self.order, kronecker.product(factors, tensors))
