"""Pruning a network so that its outputs stay: one call, from inputs alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.info import (
    PruneInfo,
    joined,
    unwarned,
    warn_of,
    warn_of_texts,
    with_warnings,
)
from woodfisher_jax.methods import check_names
from woodfisher_jax.options import OptionError, check_whole
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.inputs import (
    LARGEST,
    check_concrete,
    check_net,
    check_no_shapes,
    check_not_zero,
    check_numbers,
    check_params,
    check_reads,
    check_size,
    counted_inputs,
    named_not_finite,
    taken_by_net,
)
from woodfisher_jax.selection.named_patterns import GroupNames, parse
from woodfisher_jax.stages.matching import (
    METHOD,
    OutputsFn,
    Stage,
    check_settings,
    outputs_of,
    prune_matched,
)
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.prunable import Prunable
from woodfisher_jax.trees.samples import regroup


@watched
def prune_outputs(
    net_fn: OutputsFn,
    params: Params,
    inputs: Any,
    *,
    sparsity: float | None = None,
    pattern: str | GroupNames | None = None,
    stages: int = 12,
    num_samples: int = 1000,
    masks: Masks | None = None,
    prunable: Prunable = None,
    metric: str = "identity",
    seed: int = 0,
    **options: Any,
) -> tuple[Params, Masks, PruneInfo]:
    """Prunes a network and keeps its outputs near those it has now; no labels needed.

    In each stage a share of the weights that are left is pruned, and the others are
    moved so that ``E ‖f(w, x) - f(w₀, x)‖²`` over the inputs stays low
    (:func:`~woodfisher_jax.stages.matching.prune_matched`, which takes new inputs, new
    statistics or labels at every stage).

    Args:
        net_fn: (params, inputs) -> outputs [n, k], such as logits, in evaluation mode.
        params: w₀, any pytree of floating-point arrays.
        inputs: x, one batch: a pytree of arrays with a leading axis of examples; or a
            list of batches.
        sparsity: Fraction of all prunable weights to be zero afterwards, in [0, 1);
            default that of a pattern N:M.
        pattern: As for :func:`woodfisher_jax.prune`.
        stages: Default 12.
        num_samples: Inputs of each stage, drawn anew where there are more; default
            1000, or all there are.
        masks: As for :func:`woodfisher_jax.prune`.
        prunable: As for :func:`woodfisher_jax.prune`.
        metric: "identity", or "softmax" for the curvature of the cross entropy of
            logits; default "identity".
        seed: Of the drawn inputs and of the random projections of the outputs.
        **options: As for :func:`woodfisher_jax.prune`; defaults are
            method="woodtaylor", update="joint" and damping="auto".

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``; times
        in ``info`` are sums over the stages, and ``info.outputs_error`` says how far
        the outputs are from those of w₀.

    Raises:
        ValueError: As for :func:`woodfisher_jax.prune`.

    Example:
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["w"])
        >>> params = {"w": jnp.array([[3.0, 0.1], [0.2, 2.0]])}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> params, masks, info = wf.prune_outputs(net, params, x, sparsity=0.5)
        >>> masks["w"].tolist(), info.sparsity
        ([[True, False], [False, True]], 0.5)
    """
    check_concrete("wf.prune_outputs", net_fn, params, inputs, sparsity, masks, options)
    method = options.get("method", METHOD)
    functions = (prune_outputs, prune_matched, prune)
    check_names(options, method, *functions, without="targets")
    check_settings(stages=stages, repairs=options.get("repairs", 0), metric=metric)
    rule = parse(pattern)
    if sparsity is None and rule is not None:
        sparsity = rule.sparsity
    if sparsity is None:
        raise OptionError(
            "sparsity", "sparsity is missing; expected a fraction, such as 0.9"
        )
    check_whole("num_samples", num_samples, 1)
    check_whole("seed", seed, 0)
    wanted, images = _dense_outputs(net_fn, params, inputs)
    said = training_mode("net_fn", net_fn, params, next(regroup(images, 2)))
    warn_of_texts(said, stacklevel=3)  # The caller's line: a decorator is in between.
    drawn = _draws(len(wanted), num_samples, seed)

    def stage(number: int, params: Params) -> Stage:
        del params
        chosen = drawn(number)
        return Stage(net_fn, jax.tree.map(lambda a: a[chosen], images), wanted[chosen])

    if pattern is not None:
        options["pattern"] = pattern
    with unwarned():
        params, masks, infos = prune_matched(
            stage,
            params,
            sparsity=sparsity,
            stages=stages,
            masks=masks,
            prunable=prunable,
            metric=metric,
            seed=seed,
            **options,
        )
    warn_of(infos, stacklevel=3)
    after = stage(len(infos), params)
    found = outputs_of(net_fn, params, after.inputs)
    moved, size = np.linalg.norm(found - after.wanted), np.linalg.norm(after.wanted)
    error = float(moved / size) ** 2 if size else 0.0
    return (
        params,
        masks,
        joined(with_warnings(infos, said))._replace(outputs_error=error),
    )


def _dense_outputs(
    net_fn: OutputsFn, params: Params, inputs: Any
) -> tuple[np.ndarray, Any]:
    """The outputs of a network as it is, and its inputs as one batch.

    Args:
        net_fn: (params, inputs) -> outputs [n, k].
        params: Any pytree.
        inputs: One batch, or a list of batches.

    Raises:
        OptionError: If ``net_fn`` is no such function, its outputs are not finite, or
            their squares leave float32.
    """
    check_net(net_fn)
    check_no_shapes(params)
    check_params(params, "net_fn")
    (images,) = regroup(inputs, _number(inputs))
    check_not_zero(images)
    with taken_by_net(inputs, batches=True):
        _check_outputs(net_fn, params, images)
    check_numbers(net_fn, params, [images])
    wanted = outputs_of(net_fn, params, images)
    if not np.isfinite(wanted).all():
        wrong = named_not_finite(params) or "params or inputs"
        raise OptionError(
            "net_fn",
            "net_fn gives outputs that are not finite for some of the inputs; expected "
            f"finite logits, look for NaN or infinity in {wrong}",
        )
    check_size("net_fn", "net_fn gives outputs of", wanted, least=1 / LARGEST)
    return wanted, images


def _number(inputs: Any) -> int:
    """Of examples; all are used at once, so they must be countable."""
    number = counted_inputs(inputs)
    if number == 1:
        raise OptionError(
            "inputs",
            "inputs hold one example; expected at least 2, better 1,000: they are what "
            "tells which weights the outputs need",
        )
    return number


def _check_outputs(net_fn: OutputsFn, params: Params, inputs: Any) -> None:
    """Raises an error that names net_fn, unless it gives numbers for each example."""
    few = jax.tree.map(lambda a: a[:2], inputs)
    with explained():
        program, outputs = jax.make_jaxpr(net_fn, return_shape=True)(params, few)
    check_reads(program.jaxpr, params)
    what_to_do = ""
    if not hasattr(outputs, "shape"):
        found = f"a {type(outputs).__name__}"
        what_to_do = "; of several outputs take one, such as net(params, inputs)[0]"
    elif outputs.shape[:1] != (2,):
        found = f"an array of shape {outputs.shape} for 2 inputs"
    elif not jnp.issubdtype(outputs.dtype, jnp.floating):
        found = f"an array of {outputs.dtype}"
    else:
        return
    raise OptionError(
        "net_fn",
        f"net_fn returns {found}; expected one floating-point array with the outputs "
        f"of each input, such as logits [n, k]{what_to_do}",
    )


def _draws(available: int, number: int, seed: int) -> Callable[[int], np.ndarray]:
    """For each stage so many of the inputs, all of which come before one repeats."""
    size = min(available, number)
    order = np.random.default_rng(seed).permutation(available)
    return lambda stage: order[np.arange(stage * size, (stage + 1) * size) % available]
