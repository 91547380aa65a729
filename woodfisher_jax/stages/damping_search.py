"""Damping by trial: the step with the lowest loss on held-out examples.

The damping also limits how far weights move (Levenberg 1944, Marquardt 1963). Where a
step prunes many weights the quadratic model no longer holds, and no gradient from
before the step shows it; the loss after the step does. So whole steps are tried, each
with ten times the damping of the previous one, while the loss of held-out examples
falls.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.info import PruneInfo, Trial, unwarned, warn_of
from woodfisher_jax.methods import DEFAULT, check_names
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.inputs import check_concrete
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params

MOST_TRIALS = 12
"""Most steps tried in one direction: 12 factors of ten span the useful dampings."""

Result = tuple[Params, Masks, PruneInfo]


@watched
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
    """Prunes with the damping that is best on held-out examples.

    ``λ = argmin L(w + δw(λ); held_out)`` over λ₀, λ₀ f, λ₀ f², ... while L falls, or,
    if it rises at once, over λ₀, λ₀ / f, ...; each trial is a step of
    :func:`woodfisher_jax.prune` from the same weights.

    Args:
        loss_fn: (params, batch) -> scalar, the mean loss over the batch.
        params: Any pytree of floating-point arrays.
        samples: For the curvature, as for :func:`woodfisher_jax.prune`, but no
            iterator, because each trial reads them again.
        held_out: One batch of some thousands of training examples that are not in
            ``samples``. Test examples would bias the test.
        damping: λ₀; default "auto", for :class:`~woodfisher_jax.WoodFisher`.
        factor: f > 1; default 10.
        measure: L, (params, batch) -> scalar, which is minimized on ``held_out``;
            default ``loss_fn``. Far from the dense weights, confident wrong
            predictions dominate the loss; the share of errors is then better.
        **options: As for :func:`woodfisher_jax.prune`.

    Returns:
        The result of the best step; ``info.trials`` has each damping with its measure,
        the best one last.

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
    check_concrete("wf.prune_searched", loss_fn, params, samples, held_out, options)
    method = options.get("method")
    check_names(options, DEFAULT if method is None else method, prune_searched, prune)
    if not factor > 1:
        raise ValueError(f"factor={factor!r}; expected a number above 1, such as 10")
    if isinstance(samples, Iterator):
        raise ValueError(
            "samples is an iterator, which can be read only once; expected a batch or "
            "a list of batches, because every trial reads the samples again"
        )
    measured = jax.jit(as_partial(measure or loss_fn))

    def tried(level: float | str) -> tuple[Result, Trial]:
        label = f"damping={level if isinstance(level, str) else f'{level:.3g}'}"
        options["progress"](label, 0, 1)
        try:
            with unwarned():
                found = prune(loss_fn, params, samples, damping=level, **options)
            dampings = found[2].dampings or ()
            used = max(d.damping for d in dampings) if dampings else float(level)
            return found, Trial(used, float(measured(found[0], held_out)))
        finally:
            options["progress"](label, 1, 1)

    best, lowest = tried(damping)
    if not math.isfinite(lowest.measured):
        raise ValueError(
            f"held_out: the measure is {lowest.measured} after a step with damping "
            f"{lowest.damping:.3g}; expected a finite number: raise damping"
        )
    trials = [lowest]
    for ratio in (factor, 1 / factor):
        start = lowest
        for power in range(1, MOST_TRIALS + 1):
            try:
                found, trial = tried(start.damping * ratio**power)
            except CurvatureError:  # Too little damping; still less fails as well.
                break
            trials.append(trial)
            if not trial.measured < lowest.measured:
                break
            best, lowest = found, trial
        if lowest != start:
            break
    trials.sort(key=lambda trial: (trial.measured, trial != lowest), reverse=True)
    warn_of([best[2]], stacklevel=3)
    return best[0], best[1], best[2]._replace(trials=tuple(trials))
