"""Damping by trial: the step whose loss on other examples is lowest.

The damping is also a limit to how far weights move (Levenberg 1944, Marquardt 1963).
Where much goes at once the quadratic model no longer holds, and no gradient taken
before the step can tell; the loss after it does. So whole steps are tried, each with
ten times the damping of the one before, while the loss of held-out examples falls.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.info import PruneInfo, Trial
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params

MOST_TRIALS = 12
"""Steps tried in one direction; as many factors of ten pass any loss's minimum."""

Result = tuple[Params, Masks, PruneInfo]


def prune_searched(
    loss_fn: LossFn,
    params: Params,
    samples: Any,
    held_out: Any,
    *,
    damping: float | str = "auto",
    factor: float = 10.0,
    measure: LossFn | None = None,
    **options: Any,
) -> Result:
    """Prunes with the damping that is best on examples kept apart.

    ``λ = argmin L(w + δw(λ); held_out)`` over λ₀, λ₀ f, λ₀ f², ... while L falls, or,
    if it rises at once, over λ₀, λ₀ / f, ...; each trial is a step of
    :func:`woodfisher_jax.prune` from the same weights.

    Args:
        loss_fn: (params, batch) -> scalar, the mean loss over the batch.
        params: Any pytree of floating-point arrays.
        samples: Of the curvature, as for :func:`woodfisher_jax.prune`, but no iterator:
            they are taken again for each trial.
        held_out: One batch of training examples that are not in ``samples``, some
            thousands; test examples would make the test worthless.
        damping: λ₀; default "auto", for methods of rows.
        factor: f > 1; default 10.
        measure: L, (params, batch) -> scalar, to be lowest on ``held_out``; default
            ``loss_fn``. A share of errors is what counts where the loss says little:
            far from the dense weights it is ruled by what is sure and wrong.
        **options: Of :func:`woodfisher_jax.prune`.

    Returns:
        What the best step returned; ``info.trials`` has each damping with its loss, the
        best one last.

    Raises:
        ValueError: If factor is not above 1, if samples are an iterator, if L is not
            finite at λ₀, or as for :func:`woodfisher_jax.prune`.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        >>> x = jax.random.normal(jax.random.key(0), (300, 6))
        >>> y = x @ jnp.arange(1.0, 7.0)
        >>> _, masks, info = wf.prune_searched(
        ...     loss_fn,
        ...     {"w": jnp.arange(1.0, 7.0) + 0.1},
        ...     {"x": x[:200], "y": y[:200]},
        ...     {"x": x[200:], "y": y[200:]},
        ...     sparsity=0.5,
        ...     method="woodfisher",
        ...     update="joint",
        ...     prunable="w",
        ... )
        >>> info.trials[-1].measured == min(trial.measured for trial in info.trials)
        True
    """
    if not factor > 1:
        raise ValueError(f"factor={factor!r}; expected a number above 1, such as 10")
    if isinstance(samples, Iterator):
        raise ValueError(
            "samples is an iterator, which can be read once; expected a batch or a "
            "list of batches, since every damping that is tried takes them again"
        )
    measured = jax.jit(as_partial(measure or loss_fn))

    def tried(level: float | str) -> tuple[Result, Trial]:
        found = prune(loss_fn, params, samples, damping=level, **options)
        dampings = found[2].dampings or ()
        used = max(d.damping for d in dampings) if dampings else float(level)
        return found, Trial(used, float(measured(found[0], held_out)))

    best, lowest = tried(damping)
    if not math.isfinite(lowest.measured):
        raise ValueError(
            f"held_out: the measure is {lowest.measured} after a step with damping "
            f"{lowest.damping:.3g}; expected a number: give more damping to begin with"
        )
    trials = [lowest]
    for ratio in (factor, 1 / factor):
        start = lowest
        for power in range(1, MOST_TRIALS + 1):
            try:
                found, trial = tried(start.damping * ratio**power)
            except CurvatureError:  # Too little damping; there is no more to be had.
                break
            trials.append(trial)
            if not trial.measured < lowest.measured:
                break
            best, lowest = found, trial
        if lowest != start:
            break
    trials.sort(key=lambda trial: (trial.measured, trial != lowest), reverse=True)
    return best[0], best[1], best[2]._replace(trials=tuple(trials))
