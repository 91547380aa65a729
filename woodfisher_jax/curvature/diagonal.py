"""Optimal Brain Damage: diagonal curvature, and no other weight moves."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from woodfisher_jax.curvature import hessian
from woodfisher_jax.curvature.method import Built, Diagonal, Sampled, ready
from woodfisher_jax.equations import obs
from woodfisher_jax.options import OptionError, option
from woodfisher_jax.rows.gradients import row_chunks
from woodfisher_jax.rows.memory_plan import plan_passes
from woodfisher_jax.rows.moments import moments
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees import blocks


@dataclasses.dataclass(frozen=True)
class DiagonalFisher(Sampled):
    """Optimal Brain Damage with diag(F), undamped."""

    is_quadratic: ClassVar[bool] = True

    def saliency(self, weights: jax.Array, diagonal: jax.Array | None) -> jax.Array:
        """See :func:`woodfisher_jax.equations.obs.obd_saliency`."""
        assert diagonal is not None
        return obs.obd_saliency(weights, diagonal)

    def build(self, problem: Problem) -> Built:
        """See :meth:`~woodfisher_jax.curvature.method.Sampled.build`."""
        needs = self.plan(problem)
        found = moments(row_chunks(problem, needs.microbatch_size))
        return ready(Diagonal(jax.block_until_ready(found.squares)), needs)


@dataclasses.dataclass(frozen=True)
class DiagonalHessian(Sampled):
    """Optimal Brain Damage with diag(H) of the mean loss over all examples."""

    hessian: str = option(
        "exact",
        "exact (one product of the Hessian a weight) or hutchinson (an estimate from "
        "random signs).",
        choices=tuple(hessian.ESTIMATORS),
    )
    num_probes: int = option(64, "P, vectors of random signs of hutchinson.", least=1)
    probe_seed: int = option(
        0, "Seed of these signs.", least=0, most=2**32 - 1, in_config=False
    )

    # A negative second derivative makes a negative saliency, which a factor below 1
    # would raise.
    allows_costs: ClassVar[bool] = False
    is_quadratic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            OptionError: Naming the option, what was expected and what came.
        """
        super().__post_init__()
        probes = {"num_probes": 64, "probe_seed": 0}
        for name, default in probes.items():
            if self.hessian == "exact" and getattr(self, name) != default:
                raise OptionError(
                    name,
                    f"{name}={getattr(self, name)} with hessian='exact', which has no "
                    "probes; expected hessian='hutchinson'",
                )

    def saliency(self, weights: jax.Array, diagonal: jax.Array | None) -> jax.Array:
        """See :func:`woodfisher_jax.equations.obs.obd_saliency`."""
        assert diagonal is not None
        return obs.obd_saliency(weights, diagonal)

    def plan(self, problem: Problem) -> Needs:
        """See :meth:`~woodfisher_jax.curvature.method.Sampled.plan`."""

        def passes(microbatch_size: int) -> hessian.Passes:
            return hessian.passes(
                problem, microbatch_size, self.hessian, self.num_probes
            )

        return plan_passes(passes, problem)

    def build(self, problem: Problem) -> Built:
        """See :meth:`~woodfisher_jax.curvature.method.Sampled.build`."""
        needs = self.plan(problem)
        probes = {"num_probes": self.num_probes, "seed": self.probe_seed}
        found = hessian.ESTIMATORS[self.hessian](
            problem.loss_fn,
            problem.params,
            problem.masks,
            problem.samples,
            num_samples=problem.num_samples * problem.batch_size,
            microbatch_size=needs.microbatch_size,
            **(probes if self.hessian == "hutchinson" else {}),
        )
        values = {path: tensor.astype(jnp.float32) for path, tensor in found.items()}
        return ready(Diagonal(blocks.flatten(problem.order, values)), needs)
