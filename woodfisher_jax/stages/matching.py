"""Pruning in stages that match the outputs of the dense network, without labels.

Every stage is one damped Gauss-Newton step of

    minimize  E ‖f(w, x) - f(w₀, x)‖² / 2    subject to the sparsity of the stage

from the weights of the previous stage. The rows are ``g_n = ∇_w (r_n · f(w, x_n))``
with random r, the targets are ``y_n = r_n · (f(w₀, x_n) - f(w, x_n))``; saliencies
include that first-order term, the update is the joint one, and the damping is chosen by
leave-one-out over the rows, and raised where a step leads beyond its linear model.
Where a network fits its data, the curvature of the loss vanishes and that of the
outputs does not. A step also corrects the errors of the previous ones.

With labels as targets, the rows are gradients of the cross entropy of a few examples
each, and the first-order term is that of the loss: each stage also trains.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from woodfisher_jax.compilation import quickly_compiled
from woodfisher_jax.driver.job import check_reachable, checked_job
from woodfisher_jax.info import (
    PruneInfo,
    is_unwarned,
    unwarned,
    warn_of,
    warn_of_texts,
    with_warnings,
)
from woodfisher_jax.methods import check_names
from woodfisher_jax.options import (
    OptionError,
    check_fraction,
    check_whole,
    plain,
    shown,
)
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.inputs import (
    check_concrete,
    check_no_shapes,
    check_params,
    check_size,
)
from woodfisher_jax.rows.projections import METRICS, directions, projected
from woodfisher_jax.schedules import levels
from woodfisher_jax.selection.scope import sparser_layers
from woodfisher_jax.tracing.axes import traced
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.masks import sparsity as sparsity_of
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.prunable import Prunable, given_masks
from woodfisher_jax.trees.samples import on_host, regroup

METHOD = "woodtaylor"
"""The method of a stage, unless another is given."""

LABEL_DAMPING = 1e-2
"""λ of stages with labels. Leave-one-out would choose more, which is best for a single
step; over many stages the noise averages out."""

OutputsFn = Callable[[Params, Any], jax.Array]


class Stage(NamedTuple):
    """The network, examples and targets of one stage.

    Attributes:
        outputs_fn: (params, inputs) -> outputs [n, k], with the present statistics.
        inputs: Examples, new ones at each stage.
        wanted: Their target outputs [n, k], or their labels, integers [n].
    """

    outputs_fn: OutputsFn
    inputs: Any
    wanted: jax.Array | np.ndarray


class Rows(NamedTuple):
    """Arguments of :func:`woodfisher_jax.prune`.

    Attributes:
        loss_fn: The function whose gradients are the rows.
        samples: Their examples.
        targets: y, [N] or one number, the changes of the rows' functions; None for
            no targets.
        batch_size: m, examples for each row.
    """

    loss_fn: LossFn
    samples: Any
    targets: jax.Array | float | None
    batch_size: int = 1


def outputs_of(
    outputs_fn: OutputsFn, params: Params, inputs: Any, batch_size: int = 250
) -> np.ndarray:
    """Outputs of many examples [n, k], computed in batches of one size."""
    count = len(jax.tree.leaves(inputs)[0])
    size = -(-count // -(-count // batch_size))
    parts, outputs = [], as_partial(outputs_fn)
    for start in range(0, count, size):
        # The last one is filled up, to compile only once.
        rows = np.arange(start, start + size) % count
        part = jax.tree.map(lambda a, rows=rows: on_host(a)[rows], inputs)
        with explained():
            parts.append(np.asarray(_outputs(outputs, params, part)))
    return np.concatenate(parts)[:count]


@jax.jit
def _outputs(outputs_fn: Partial, params: Params, inputs: Any) -> jax.Array:
    return outputs_fn(params, inputs)


def matching_rows(
    stage: Stage, params: Params, key: jax.Array, metric: str = "identity"
) -> Rows:
    """Rows and targets of random projections of the outputs.

    ``g_n = ∇_w (r_n · f(w, x_n))`` and ``y_n = r_n · (f* - f(w, x_n))``: the arguments
    of :func:`woodfisher_jax.prune` for one damped Gauss-Newton step towards f*.

    Args:
        stage: f, x and f*.
        params: w.
        key: A JAX random key.
        metric: Metric of the distance to f*, one of
            :data:`~woodfisher_jax.rows.projections.METRICS`; default "identity".

    Raises:
        OptionError: If squares of the outputs or of f* leave float32.
    """
    outputs = outputs_of(stage.outputs_fn, params, stage.inputs)
    check_size("stage", "the network's outputs are", outputs)
    check_size("stage", "wanted outputs are", stage.wanted)
    r, missing = _directions_and_missing(
        key, jnp.asarray(stage.wanted), jnp.asarray(outputs), metric
    )
    samples = {"inputs": stage.inputs, "direction": np.asarray(r)}
    return Rows(projected(stage.outputs_fn), samples, missing)


@quickly_compiled("metric")
def _directions_and_missing(
    key: jax.Array, wanted: jax.Array, outputs: jax.Array, metric: str
) -> tuple[jax.Array, jax.Array]:
    """Directions r, and r · (f* - f) of each example [n]."""
    r = directions(key, wanted, metric)
    missing = r * (wanted - outputs)
    return r, jnp.sum(missing, axis=tuple(range(1, missing.ndim)))


def label_rows(stage: Stage, batch_size: int = 16) -> Rows:
    """Rows of the cross entropy of a few examples each, scaled to the Fisher of one.

    ``g_n = √m ∇_w (1/m) Σ_j CE(f(w, x_nj), label_nj)``. Where noise dominates the
    gradients, the mean of m has a second moment m times smaller; √m compensates. The
    first-order term is that of the loss, ``ḡ = Σ_n g_n / (N √m)``.

    Args:
        stage: f, x and the labels.
        batch_size: m; default 16.
    """
    root = float(batch_size) ** 0.5
    samples = {"inputs": stage.inputs, "labels": np.asarray(stage.wanted)}
    loss = scaled_cross_entropy(stage.outputs_fn, root)
    return Rows(loss, samples, -1.0 / root, batch_size)


def scaled_cross_entropy(outputs_fn: OutputsFn, scale: float) -> LossFn:
    """``(params, batch) -> scale · mean CE(f(w, inputs), labels)``.

    Args:
        outputs_fn: f; other arrays in a ``Partial`` of the same function do not compile
            again.
        scale: Factor on the loss.
    """
    if isinstance(outputs_fn, Partial):
        loss = _scaled_cross_entropy(outputs_fn.func, scale)
        return Partial(loss, *outputs_fn.args, **outputs_fn.keywords)
    return _scaled_cross_entropy(outputs_fn, scale)


@lru_cache(maxsize=8)
def _scaled_cross_entropy(outputs_fn: Callable[..., jax.Array], scale: float) -> LossFn:
    # Cached, because jit recognises a compiled function by its identity.
    def loss(*arguments: Any, **others: Any) -> jax.Array:
        *first, batch = arguments
        outputs = outputs_fn(*first, batch["inputs"], **others)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return scale * jnp.mean(entropy(outputs, batch["labels"]))

    return loss


@watched
def prune_matched(
    stage: Callable[[int, Params], Stage],
    params: Params,
    *,
    sparsity: float | Sequence[float],
    stages: int = 12,
    repairs: int = 0,
    masks: Masks | None = None,
    prunable: Prunable = None,
    metric: str = "identity",
    batch_size: int = 16,
    seed: int = 0,
    after: Callable[[int, Params, Masks, PruneInfo], Params | None] | None = None,
    **options: Any,
) -> tuple[Params, Masks, list[PruneInfo]]:
    """Prunes a network in stages and keeps its outputs near the targets.

    Args:
        stage: (number from 0, parameters) -> :class:`Stage`: draws new examples,
            estimates batch-norm statistics again, and so on. In the simplest case
            ``lambda i, params: Stage(net, images(i), net(dense, images(i)))``.
        params: w₀, any pytree of floating-point arrays.
        sparsity: Fraction of all prunable weights at the end, [0, 1), or a list with
            one for each stage.
        stages: Number of stages to one sparsity, each of which keeps the same share of
            the remaining weights; default 12.
        repairs: Number of stages that follow and prune nothing; default 0.
        masks: Masks of the weights that are pruned already, as for
            :func:`woodfisher_jax.prune`; default none are.
        prunable: As for :func:`woodfisher_jax.prune`, if no masks are given.
        metric: Metric of the distance of the outputs: "identity", or "softmax" for
            the curvature of the cross entropy; default "identity".
        batch_size: Examples for each row where the targets are labels; default 16.
        seed: Seed of the random directions.
        after: Called at the end of each stage with its number, parameters, masks and
            info. If it returns parameters, the next stage starts from them.
        **options: As for :func:`woodfisher_jax.prune`; defaults are
            method="woodtaylor", update="joint" and damping="auto", with labels
            :data:`LABEL_DAMPING`.

    Returns:
        ``(params, masks, infos)`` with the info of each stage.

    Raises:
        ValueError: If sparsity, stages or repairs is out of range, the first call of
            stage fails, or as for :func:`woodfisher_jax.prune`.
        TypeError: If stage is no function, or returns no :class:`Stage`.

    Example:
        >>> def net(params, x):
        ...     return x @ params["w"]
        >>> dense = {"w": jnp.array([[3.0, 0.1], [0.2, 2.0]])}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> def stage(i, params):
        ...     return wf.matching.Stage(net, x, net(dense, x))
        >>> params, masks, infos = wf.prune_matched(
        ...     stage, dense, sparsity=0.5, stages=2
        ... )
        >>> masks["w"].tolist(), len(infos)
        ([[True, False], [False, True]], 2)
    """
    check_concrete("wf.prune_matched", stage, params, sparsity, masks, options)
    method = options.get("method", METHOD)
    check_names(options, method, prune_matched, prune, without="targets")
    check_settings(stages=stages, repairs=repairs, metric=metric)
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    if not callable(stage):
        raise TypeError(f"stage is of type {type(stage).__name__}; expected {_A_STAGE}")
    check_no_shapes(params)
    check_params(params)
    found = _first(stage, params)
    axes = traced(found.outputs_fn, params, found.inputs, "outputs_fn").axes()
    said = []
    if not is_unwarned():
        few = next(regroup(found.inputs, 2))
        said = training_mode("outputs_fn", found.outputs_fn, params, few)
    masks = given_masks(params, masks, prunable, axes)
    way = _way(sparsity_of(masks), sparsity, stages, repairs)
    infos: list[PruneInfo] = []
    progress = options["progress"]
    for number, level in enumerate(way):
        progress("stages", number, len(way))
        found = _checked(stage(number, params), number) if number else found
        if np.issubdtype(found.wanted.dtype, np.integer):
            rows = label_rows(found, batch_size)
            damping: float | str = LABEL_DAMPING
        else:
            key = _key(np.int64(seed), np.int32(number))
            rows, damping = matching_rows(found, params, key, metric), "auto"
        given = {
            "method": METHOD,
            "update": "joint",
            "damping": damping,
            "axes": axes,
            **options,
            "targets": rows.targets,
            "batch_size": rows.batch_size,
        }
        step = (rows.loss_fn, params, rows.samples)
        if not number:
            # Before anything is pruned, and not by the level of some later stage.
            job = checked_job(*step, sparsity=way[-1], masks=masks, **given)
            check_reachable(job)
            said += sparser_layers(job.order, job.masks, job.goal)
            warn_of_texts(said, stacklevel=3)  # The caller's line: a decorator between.
        with unwarned():
            params, masks, info = prune(*step, sparsity=level, masks=masks, **given)
        infos.append(info)
        if after is not None:
            changed = after(number, params, masks, info)
            params = params if changed is None else changed
    progress("stages", len(way), len(way))
    warn_of(infos, stacklevel=3)
    return params, masks, with_warnings(infos, said)


@jax.jit
def _key(seed: np.int64, number: np.int32) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)


_A_STAGE = (
    "a function (number, params) -> wf.matching.Stage(outputs_fn, inputs, wanted), not "
    "the network: lambda i, params: wf.matching.Stage(net, inputs, net(dense, inputs))"
)


def _first(stage: Callable[[int, Params], Stage], params: Params) -> Stage:
    """The first stage; a network in place of the function fails here, on a number."""
    try:
        found = stage(0, params)
    except OptionError:
        raise
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise OptionError(
            "stage",
            f"stage(0, params) fails ({type(error).__name__}: {line}); expected "
            f"{_A_STAGE}",
        ) from error
    return _checked(found, 0)


def _checked(stage: Any, number: int) -> Stage:
    what = f"stage({number}, params) returned"
    if not isinstance(stage, Stage):
        raise TypeError(
            f"{what} {type(stage).__name__}; expected a "
            "wf.matching.Stage(outputs_fn, inputs, wanted)"
        )
    if not callable(stage.outputs_fn):
        raise OptionError(
            "stage",
            f"{what} a Stage whose outputs_fn is of type "
            f"{type(stage.outputs_fn).__name__}; expected a function (params, inputs) "
            "-> outputs [n, k]",
        )
    if not hasattr(stage.wanted, "dtype"):
        raise OptionError(
            "stage",
            f"{what} a Stage whose wanted is of type {type(stage.wanted).__name__}; "
            "expected an array: outputs [n, k], or labels, integers [n]",
        )
    return stage


def check_settings(*, stages: int, repairs: int, metric: str) -> None:
    """Raises unless stages can be counted and the metric is known.

    Raises:
        OptionError: Naming the argument.
    """
    for name, given, least in (("stages", stages, 1), ("repairs", repairs, 0)):
        check_whole(name, given, least)
    if metric not in METRICS:
        raise OptionError(
            "metric", f"metric={shown(metric)}; expected one of {list(METRICS)}"
        )


def _way(
    start: float, goal: float | Sequence[float], stages: int, repairs: int
) -> list[float]:
    """The sparsity of every stage.

    Raises:
        ValueError: Naming the argument that is out of range.
    """
    goal, stages, repairs = plain(goal), plain(stages), plain(repairs)
    single = np.ndim(goal) == 0
    more = " of weights to be zero, or a list with one for each stage"
    given = [goal] if single else goal
    way = [check_fraction("sparsity", level, more) for level in given]  # type: ignore
    if single:
        way = levels(start, way[0], stages - 1, None)
    if not way:
        raise ValueError("sparsity is an empty list; expected one for each stage")
    if not single and way != sorted(way):
        raise ValueError(
            f"sparsity={way}; expected levels that do not fall from stage to stage, "
            "since a pruned weight does not come back"
        )
    return [*way, *([way[-1]] * repairs)]
