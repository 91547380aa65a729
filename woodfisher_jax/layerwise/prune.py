"""Pruning layer after layer, from inputs alone: each layer keeps its outputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from woodfisher_jax.info import warn_of_texts
from woodfisher_jax.layerwise.arguments import (
    batches_of,
    check_differentiable,
    check_finite,
    check_no_budget,
    check_times,
    check_together,
    level_of,
    rule_of,
    without_effect,
)
from woodfisher_jax.layerwise.layers import find_layers, has_product, untied
from woodfisher_jax.layerwise.removal import Removal
from woodfisher_jax.layerwise.sequence import Layers, Sequence, Solver
from woodfisher_jax.layerwise.settings import Layerwise, LayerwiseInfo
from woodfisher_jax.layerwise.structures import (
    asked_for,
    checked_goal,
    goal_of,
    readers,
    ungrouped,
)
from woodfisher_jax.layerwise.weights import SingleWeights
from woodfisher_jax.options import check_known, fields_of, keywords
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.inputs import (
    check_concrete,
    check_net,
    check_no_shapes,
    check_numbers,
    check_params,
    check_reads,
    taken_by_net,
)
from woodfisher_jax.selection.findings import stay_sparser
from woodfisher_jax.selection.latencies import timed
from woodfisher_jax.selection.named_patterns import GroupNames
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.tracing.segments import Program
from woodfisher_jax.tracing.training_mode import explained
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.masks import Masks, left_out, most_sparse
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.prunable import Prunable, given_masks
from woodfisher_jax.trees.samples import regroup, shapes_of


@watched
def prune_layerwise(
    net_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    *,
    sparsity: float | None = None,
    macs: float | None = None,
    size: float | None = None,
    latency: float | None = None,
    times: str | Path | None = None,
    pattern: str | GroupNames | Structures | None = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    progress: Any = True,
    **options: Any,
) -> tuple[Params, Masks, LayerwiseInfo]:
    """Prunes a network layer after layer, each so that its outputs stay; no labels.

    Each layer minimises ``E ‖P x - W z‖²`` (:mod:`~woodfisher_jax.equations.layerwise`)
    on inputs x that come from the layers before it as they are pruned by then, and z of
    the unpruned network. The function's own program is run in segments between the
    layers, so that this takes one pass over the inputs for a network of any depth.

    Args:
        net_fn: (params, inputs) -> any pytree of arrays, in evaluation mode.
        params: Any pytree of floating-point arrays.
        inputs: One batch: a pytree of arrays with a leading axis of examples, such as
            tokens [sequences, tokens]; or a list of batches.
        sparsity: Fraction of the weights of each layer to be zero, in [0, 1).
        macs: With structures in place of a sparsity, the share of the network's
            multiply-accumulates to be left, in (0, 1].
        size: The same for its parameters; one of them or several.
        latency: The same for the time of its products on this machine, for a batch of
            ``batch_size`` examples; they are timed first, unless ``pattern`` is what
            :func:`~woodfisher_jax.selection.latencies.timed` returns.
        times: JSON file that keeps the times of this machine, only with a latency; what
            is in it is not timed again. Default none.
        pattern: "2:4" or any N:M; "structures" ("channels", "neurons", "heads"), with
            ``sparsity`` the share of each layer's structures that go; or what
            :func:`woodfisher_jax.structures` found; default single weights.
            :func:`woodfisher_jax.shrink` takes structures out.
        masks: Masks of the weights that are pruned already; default none are.
        prunable: As for :func:`woodfisher_jax.prune`, if no masks are given; default
            weights of dense layers and convolutions that are nothing else, so no
            classifier that is the embedding.
        progress: As for :func:`woodfisher_jax.prune`.
        **options: Fields of :class:`Layerwise`.

    Returns:
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``, arrays
        as of :func:`woodfisher_jax.prune`.

    Raises:
        ValueError: If an argument is out of range, or a tensor is not the weight of
            layers that can be followed; with its path and what to do.

    Example:
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["w"])
        >>> params = {"w": jnp.array([[3.0, 0.1], [0.2, 2.0]])}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> params, masks, info = wf.prune_layerwise(net, params, x, sparsity=0.5)
        >>> masks["w"].tolist()
        [[True, False], [False, True]]
    """
    arguments = (net_fn, params, inputs, sparsity, masks, options)
    check_concrete("wf.prune_layerwise", arguments)
    check_no_shapes(params)
    for name in options:
        names = [*keywords(prune_layerwise), *fields_of(Layerwise)]
        check_known(name, names, "wf.prune_layerwise")
    sequence, solver = prepared(
        net_fn,
        params,
        inputs,
        sparsity=sparsity,
        shares={"macs": macs, "size": size, "latency": latency},
        times=times,
        pattern=pattern,
        masks=masks,
        prunable=prunable,
        progress=progress,
        **options,
    )
    params, masks, info = sequence.run(solver, progress)
    if isinstance(solver, Removal):
        info = info._replace(costs=solver.costs(masks), whole=solver.whole)
    said = []
    if isinstance(solver, SingleWeights) and solver.sparser:
        said.append(stay_sparser(solver.sparser, solver.level))
    if sequence.emptied:
        by_layer = sequence.settings.scope == "layer"
        ways = "raise the budget" if isinstance(solver, Removal) else "lower sparsity"
        if isinstance(solver, SingleWeights) and by_layer:
            most = most_sparse(min(sequence.emptied.values()))
            ways = f"lower sparsity={solver.level} to {most}, which leaves one in each"
            if not most:  # Of a single weight.
                ways = "lower sparsity to 0"
        other = ", or use scope='global'" if by_layer else ""
        said.append(
            f"no weight is left of {list(sequence.emptied)}; {ways}, or leave them out "
            f"of prunable{other}"
        )
    warn_of_texts(said, stacklevel=3)  # The caller's line: a decorator is in between.
    return params, masks, info._replace(warnings=(*info.warnings, *said))


def prepared(
    net_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    *,
    sparsity: float | None,
    shares: Mapping[str, float | None],
    times: str | Path | None = None,
    pattern: str | GroupNames | Structures | None = None,
    masks: Masks | None = None,
    prunable: Prunable = None,
    progress: Any,
    **options: Any,
) -> tuple[Sequence, Solver]:
    """What :func:`prune_layerwise` runs, with every argument checked.

    Args:
        net_fn: As there, with all that follows; for single weights and N:M ``params``
            may be shapes.
        params: The same.
        inputs: The same.
        sparsity: The same.
        shares: ``macs``, ``size`` and ``latency`` of there.
        times: The same.
        pattern: The same.
        masks: The same.
        prunable: The same.
        progress: The same.
        **options: The same.

    Returns:
        The layers in sequence, and what is done to each.

    Raises:
        ValueError: As there.
    """
    settings = Layerwise().replace(**options)
    rule = rule_of(pattern)
    found = None if rule is None else rule.structures
    check_times(
        times, shares["latency"], timed=found is not None and bool(found.speeds)
    )
    check_net(net_fn)
    check_params(params, "net_fn")
    batches = batches_of(inputs, settings.batch_size)
    shapes = shapes_of(batches[0], len(jax.tree.leaves(batches[0])[0]))
    with taken_by_net(inputs, batches=True, called=shapes), explained():
        program = Program(net_fn, params, shapes)
    check_reads(program.jaxpr, params)
    check_numbers(net_fn, params, batches)
    axes = find_axes(net_fn, params, shapes)
    chosen = masks is not None or prunable is not None
    known = axes if chosen else untied(axes, program.uses)
    masks = given_masks(params, masks, prunable, known)
    check_finite(params, masks)
    said = without_effect(settings, options)
    said += training_mode("net_fn", net_fn, params, next(regroup(inputs, 2)))
    if not chosen:
        said += _not_followed(program, axes, masks)
    # The caller's line: prune_layerwise and a decorator are in between.
    warn_of_texts(said, stacklevel=4)
    solver: Solver
    if rule is None or rule.size:
        check_no_budget(shares)
        solver = SingleWeights(rule, level_of(sparsity, rule))
        groups = rule
        layers = find_layers(program, masks, axes, groups)
    else:
        given = rule.structures or structures(net_fn, params, shapes)
        sparsity, budgets = checked_goal(sparsity, shares)
        asked = asked_for(given, rule, params)
        groups = None
        layers = find_layers(program, masks, axes, groups)
        solver = _removal(asked, layers, sparsity, budgets, times, progress)
    check_together(program, settings, groups)
    check_differentiable(net_fn, params, shapes, masks, settings)
    layers = solver.chosen(layers)
    if isinstance(solver, SingleWeights) and rule is None:
        solver.check_left(layers, masks, settings.scope)
    sequence = Sequence(program, params, masks, axes, batches, layers, settings, said)
    return sequence, solver


def _not_followed(program: Program, axes: Axes, masks: Masks) -> list[str]:
    """A warning of tensors that stay, for what they multiply is in no layer."""
    followed = {p for p, uses in program.uses.items() if has_product(uses)}
    others = sorted(axes.keys() - masks.keys() - followed)
    if not others:
        return []
    return [
        f"{others} multiply activations otherwise than in a layer that can be "
        "followed, as in sum(x * w, -1), and stay as they are; write them as "
        "matrix products, or prune with wf.prune_outputs; to end this warning, "
        f"{left_out(*others)}"
    ]


def _removal(
    asked: Structures,
    layers: Layers,
    sparsity: float | None,
    budgets: Mapping[str, float],
    times: str | Path | None,
    progress: Any,
) -> Removal:
    """The structures that one layer alone reads, timed where their time counts.

    Args:
        asked: Structures of the kinds that may go.
        layers: Of the masks.
        sparsity: The share of each family that goes, if it is given.
        budgets: Else of costs of the network what may be left.
        times: As for :func:`prune_layerwise`.
        progress: Called with (label, done, total).
    """
    read = readers(asked, ungrouped(layers))
    families = tuple(f for reader in read.values() for f in reader.families)
    found = asked._replace(families=families)
    if "latency" in budgets and not found.speeds:
        progress("latency", 0, 1)
        found = timed(found, times)
        progress("latency", 1, 1)
    units = set(found.units)
    whole = tuple(f.name for f in asked.families if f.units not in units)
    return Removal(found, read, *goal_of(found, sparsity, budgets, whole), whole)
