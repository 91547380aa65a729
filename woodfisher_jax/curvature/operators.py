"""Curvature as operators on flat vectors, one builder for each kind that methods name.

An operator is what the statistic takes the diagonal of: F⁻¹ for Optimal Brain Surgeon,
which also multiplies by it, and F or H itself for Optimal Brain Damage, where no other
weight moves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.curvature import hessian, kfac
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.kronecker_groups import kronecker_saliencies
from woodfisher_jax.equations import kronecker, swaps
from woodfisher_jax.equations.damping import ChosenDamping
from woodfisher_jax.methods import method_named
from woodfisher_jax.rows import memory_plan as resources
from woodfisher_jax.rows.budget import MICROBATCH_SIZE
from woodfisher_jax.rows.gradients import Gradients, gradient_chunks
from woodfisher_jax.rows.moments import Moments
from woodfisher_jax.rows.needs import Needs, Passes
from woodfisher_jax.rows.passes import plan_passes
from woodfisher_jax.rows.store import mean_square
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.settings import Settings
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import num_examples, regroup


class Operator(Protocol):
    """A curvature of all prunable weights.

    Attributes:
        seconds_gradients: Wall time of gradients formed by the operator so far.
    """

    seconds_gradients: float

    def diagonal(self) -> jax.Array:
        """The diagonal that the statistic takes [d]."""
        ...

    def product(self, vector: jax.Array) -> jax.Array:
        """The operator times a vector v [d]: for OBS, F⁻¹v."""
        ...

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v`` with the curvature itself, damped where the method damps it."""
        ...


class RowOperator(Operator, swaps.Model, Protocol):
    """One of rows: it knows of their values, and of many weights gone at once."""

    def slope(self, targets: jax.Array) -> jax.Array:
        """``-Gᵀy / N`` for values y [N] of the rows [d]."""
        ...

    def choose_damping(
        self,
        support: jax.Array,
        missing: jax.Array,
        targets: jax.Array,
        least: float = 0.0,
    ) -> ChosenDamping:
        """The damping by leave-one-out, used from here on."""
        ...


class GroupOperator(Operator, Protocol):
    """One that knows what groups of weights are worth that go together."""

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """Their joint statistic [groups, choices]."""
        ...


class Problem(NamedTuple):
    """A network at its masked weights, and the samples of one curvature.

    Attributes:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree, pruned weights zero.
        masks: What is pruned already.
        samples: Counted: there are enough.
        mean_samples: For the mean gradient alone, or None for that of ``samples``.
        targets: y, [N], by which the rows are to change, or one number [] for all, or
            None; they make a slope.
        order: The flat order of the masks.
        settings: Of the step.
    """

    loss_fn: Partial
    params: Params
    masks: Masks
    samples: Any
    mean_samples: Any
    targets: jax.Array | None
    order: blocks.FlatOrder
    settings: Settings


class Curvature(NamedTuple):
    """An operator and what was learned while it was built.

    Attributes:
        operator: To be entered before it is used.
        moments: Of the gradients that the operator forms, if it forms any; complete
            after its diagonal.
        needs: What was planned.
    """

    operator: AbstractContextManager[Operator]
    moments: Moments | None
    needs: Needs


def layout_of(problem: Problem) -> blocks.Layout:
    """Which weight sits in which block; () for methods without blocks."""
    row, block_size = problem.settings.method, problem.settings.block_size
    if row.layout is None:
        return ()
    active = np.asarray(blocks.flatten(problem.order, problem.masks))
    return row.layout(problem.order, block_size, active)


def plan(problem: Problem) -> Needs:
    """What the curvature of a problem takes.

    Raises:
        MemoryLimitError: If it does not fit.
    """
    kind = problem.settings.method.curvature
    assert kind is not None
    return PLANNERS[kind](problem)


def _plan_rows(problem: Problem) -> tuple[Needs, resources.Storage | None]:
    return resources.plan(
        problem.loss_fn,
        problem.params,
        problem.masks,
        problem.samples,
        problem.order,
        layout_of(problem),
        problem.settings,
    )


def _plan_factors(problem: Problem) -> Needs:
    settings = problem.settings

    def passes(microbatch_size: int) -> Passes:
        return kfac.passes(
            problem.loss_fn,
            problem.params,
            problem.masks,
            next(regroup(problem.samples, 1)),
            num_samples=settings.num_samples * settings.batch_size,
            microbatch_size=microbatch_size,
        )

    return plan_passes(passes, problem.order, settings)


def _plan_hessian(problem: Problem) -> Needs:
    settings = problem.settings

    def passes(microbatch_size: int) -> Passes:
        return hessian.passes(
            problem.loss_fn,
            problem.params,
            problem.masks,
            next(regroup(problem.samples, 1)),
            estimator=settings.hessian,
            num_samples=settings.num_samples * settings.batch_size,
            microbatch_size=microbatch_size,
            num_probes=settings.num_probes,
        )

    return plan_passes(passes, problem.order, settings)


PLANNERS: dict[str, Callable[[Problem], Needs]] = {
    "inverse": lambda problem: _plan_rows(problem)[0],
    "kronecker": _plan_factors,
    "diagonal": lambda problem: _plan_rows(problem)[0],
    "hessian": _plan_hessian,
}
"""For each of CURVATURES, what it takes."""


# ---------------------------------------------------------------------------- gradients


def gradients(
    problem: Problem,
    microbatch_size: int,
    moments: Moments | None,
    order: blocks.FlatOrder,
) -> Iterator[Gradients]:
    """Gradient chunks of the tensors in an order, with progress.

    Args:
        problem: The network and its samples.
        microbatch_size: Most examples at once on a device.
        moments: If given, the gradients are added up on the way.
        order: Of some of the problem's tensors.
    """
    settings = problem.settings
    chunks = gradient_chunks(
        problem.loss_fn,
        problem.params,
        {path: problem.masks[path] for path in order.paths},
        problem.samples,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        microbatch_size=microbatch_size,
        mesh=settings.mesh,
    )
    if moments is not None:
        chunks = moments.through(chunks)
    done = 0
    settings.progress("gradients", 0, settings.num_samples)
    for chunk in chunks:
        yield chunk
        done += len(next(iter(chunk.values())))
        settings.progress("gradients", done, settings.num_samples)


def moments_of(problem: Problem) -> Moments:
    """Moments of the problem's gradients, by a pass of their own."""
    diagonal = method_named("diagfisher")
    alone = problem._replace(settings=problem.settings._replace(method=diagonal))
    moments, size = Moments(), plan(alone).microbatch_size
    for _ in gradients(problem, size, moments, problem.order):
        pass
    return moments


def mean_of_others(problem: Problem) -> Moments:
    """The mean gradient of ``mean_samples``, all of them."""
    settings = problem.settings
    number = num_examples(problem.mean_samples)
    assert number is not None
    most = min(number, settings.microbatch_size or MICROBATCH_SIZE)
    length = next(n for n in range(most, 0, -1) if number % n == 0)
    return moments_of(
        problem._replace(
            samples=problem.mean_samples,
            settings=settings._replace(num_samples=number // length, batch_size=length),
        )
    )


# ----------------------------------------------------------------------- inverse Fisher


def inverse_fisher(problem: Problem, with_moments: bool) -> Curvature:
    """F⁻¹ of the blocks of the row's layout."""
    needs, storage = _plan_rows(problem)
    assert storage is not None
    moments = Moments() if with_moments else None
    form = partial(gradients, problem, needs.microbatch_size, moments)
    return Curvature(InverseFisher(form, storage, problem.settings), moments, needs)


# ---------------------------------------------------------------------------- diagonals


class Diagonal:
    """A curvature of which only the diagonal is known, or wanted.

    Attributes:
        seconds_gradients: Always 0: nothing is formed here.
    """

    def __init__(self, values: jax.Array):
        """Takes the diagonal [d]."""
        self._values = values
        self.seconds_gradients = 0.0

    def diagonal(self) -> jax.Array:
        """See :class:`Operator`."""
        return self._values

    def product(self, vector: jax.Array) -> jax.Array:
        """See :class:`Operator`."""
        return self._values * vector

    def quadratic_form(self, vector: jax.Array) -> float:
        """See :class:`Operator`."""
        return float(jnp.sum(self._values * vector * vector))


def fisher_diagonal(problem: Problem, with_moments: bool) -> Curvature:
    """diag(F), undamped."""
    needs = plan(problem)
    moments = Moments() if with_moments else None
    chunks = gradients(problem, needs.microbatch_size, moments, problem.order)
    squares = mean_square(chunks, problem.settings.num_samples)
    values = jax.block_until_ready(blocks.flatten(problem.order, squares))
    return Curvature(nullcontext(Diagonal(values)), moments, needs)


def hessian_diagonal(problem: Problem, with_moments: bool) -> Curvature:
    """diag(H) of the mean loss over all examples, undamped."""
    del with_moments
    settings, needs = problem.settings, plan(problem)
    signs = {"num_probes": settings.num_probes, "seed": settings.probe_seed}
    found = hessian.ESTIMATORS[settings.hessian](
        problem.loss_fn,
        problem.params,
        problem.masks,
        problem.samples,
        num_samples=settings.num_samples * settings.batch_size,
        microbatch_size=needs.microbatch_size,
        **(signs if settings.hessian == "hutchinson" else {}),
    )
    values = {path: tensor.astype(jnp.float32) for path, tensor in found.items()}
    operator = Diagonal(blocks.flatten(problem.order, values))
    return Curvature(nullcontext(operator), None, needs)


# ---------------------------------------------------------------------------- Kronecker


class KroneckerInverse:
    """F⁻¹ of every layer from its damped Kronecker factors.

    Attributes:
        seconds_gradients: Always 0: the factors are formed before.
    """

    def __init__(self, factors: kronecker.Factors, order: blocks.FlatOrder):
        """Takes damped factors; they are inverted when first asked for."""
        self._factors = factors
        self._inverses: kronecker.Factors | None = None
        self._order = order
        self.seconds_gradients = 0.0

    def _inverted(self) -> kronecker.Factors:
        if self._inverses is None:
            self._inverses = kronecker.inverse(self._factors)
        return self._inverses

    def diagonal(self) -> jax.Array:
        """See :class:`Operator`."""
        return blocks.flatten(self._order, kronecker.diagonal(self._inverted()))

    def product(self, vector: jax.Array) -> jax.Array:
        """See :class:`Operator`."""
        return self._multiplied(self._inverted(), vector)

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """See :class:`GroupOperator`."""
        found = kronecker_saliencies(self._inverted(), weights, self._order, groups)
        return jnp.asarray(found, jnp.float32)

    def quadratic_form(self, vector: jax.Array) -> float:
        """See :class:`Operator`."""
        found = self._multiplied(self._factors, vector)
        return float(np.dot(*(np.asarray(v, np.float64) for v in (vector, found))))

    def _multiplied(self, factors: kronecker.Factors, vector: jax.Array) -> jax.Array:
        tensors = blocks.unflatten(self._order, vector)
        return blocks.flatten(self._order, kronecker.product(factors, tensors))


def kronecker_inverse(problem: Problem, with_moments: bool) -> Curvature:
    """F⁻¹ from Kronecker factors; see :mod:`~woodfisher_jax.curvature.kfac`."""
    del with_moments
    settings, needs = problem.settings, plan(problem)
    factors = kfac.kfac_factors(
        problem.loss_fn,
        problem.params,
        problem.masks,
        problem.samples,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        microbatch_size=needs.microbatch_size,
    )
    assert settings.damping is not None
    damped = kronecker.damped(factors, settings.damping, pi=settings.pi)
    operator = KroneckerInverse(damped, problem.order)
    return Curvature(nullcontext(operator), None, needs)


BUILDERS: dict[str, Callable[[Problem, bool], Curvature]] = {
    "inverse": inverse_fisher,
    "kronecker": kronecker_inverse,
    "diagonal": fisher_diagonal,
    "hessian": hessian_diagonal,
}
"""For each of CURVATURES, what builds its operator."""
