"""Pruning layer after layer, from inputs alone: each layer keeps its outputs."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.equations.fisher import matmul
from woodfisher_jax.equations.layerwise import (
    layer_error,
    pruned_layer,
    without_inputs,
)
from woodfisher_jax.layerwise.arguments import (
    batches_of,
    check_differentiable,
    check_no_budget,
    check_together,
    level_of,
    rule_of,
)
from woodfisher_jax.layerwise.budgets import importance_of, scores_of, shared_out
from woodfisher_jax.layerwise.layers import Layer, find_layers, untied
from woodfisher_jax.layerwise.sensitivity import Sensitivity, sensitivities
from woodfisher_jax.layerwise.settings import LayerResult, Layerwise, LayerwiseInfo
from woodfisher_jax.layerwise.structures import (
    Reader,
    counts_of,
    goal_of,
    readers,
)
from woodfisher_jax.layerwise.windows import Head, Window
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.inputs import check_params
from woodfisher_jax.selection.accounts import Budget
from woodfisher_jax.selection.latencies import timed
from woodfisher_jax.selection.patterns import GroupNames, Pattern
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.tracing.capture import input_rows
from woodfisher_jax.tracing.layers import Convolution, Product
from woodfisher_jax.tracing.segments import Program, Segment
from woodfisher_jax.trees.masks import (
    Masks,
    Prunable,
    check_masks,
    init_masks,
    num_kept,
    sparsity_by_path,
)
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import shapes_of

STEPS = 64
"""In which a layer's structures go, some at once in each."""

PENALTIES = (0.3, 1.0)
"""Penalties of ADMM in turn, in units of the second moment of an input."""


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
        ``(params, masks, info)``: pruned weights are exactly zero in ``params``.

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
    settings = Layerwise().replace(**options)
    rule = rule_of(pattern)
    check_params(params)
    batches = batches_of(inputs, settings.batch_size)
    shapes = shapes_of(batches[0], len(jax.tree.leaves(batches[0])[0]))
    program = Program(net_fn, params, shapes)
    axes = find_axes(net_fn, params, shapes)
    if masks is None:
        known = axes if prunable is not None else untied(axes, program.uses)
        masks = init_masks(params, prunable, known)
    check_masks(params, masks)
    if rule is None or rule.size:
        check_no_budget(macs, size, latency)
        level = level_of(sparsity, rule)
        check_together(program, settings, rule)
        check_differentiable(net_fn, params, shapes, masks, settings)
        layers = find_layers(program, masks, axes, rule)
        work = _Work(program, params, masks, batches, layers, rule, settings)
        work.allocate(level)
        return work.run(progress)
    check_together(program, settings, None)
    check_differentiable(net_fn, params, shapes, masks, settings)
    found = (rule.structures or structures(net_fn, params, shapes)).of(rule.kinds)
    chosen = readers(found, {path: tuple(mask.shape) for path, mask in masks.items()})
    families = tuple(f for reader in chosen.values() for f in reader.families)
    found = found._replace(families=families)
    if latency is not None and not found.speeds:
        found = timed(found)
    shares = {"macs": macs, "size": size, "latency": latency}
    level, budget = goal_of(found, sparsity, shares)
    every = find_layers(program, masks, axes, None)
    layers = {p: own for p, own in every.items() if p.path in chosen}
    work = _Work(program, params, masks, batches, layers, None, settings, chosen)
    work.allocate_structures(found, level, budget)
    return work.run(progress)


def _operand_key(product: Product) -> Any:
    """What the rows of a layer's inputs depend on, beside the inputs."""
    if isinstance(product.geometry, Convolution):
        return product.anywhere()
    other = 1 - product.side
    return (
        product.geometry.batch[other],
        product.geometry.contract[other],
        product.operands[other],
    )


@partial(jax.jit, static_argnames="product")
def _moment(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """``Σ_t z_t x_tᵀ`` of the inputs of a layer [groups, inputs, inputs]."""
    z, x = (input_rows(product, a.astype(jnp.float32)) for a in (left, right))
    return matmul(jnp.swapaxes(z, 1, 2), x)


# --------------------------------------------------------------------------- the work


class _Work:
    """A network on its way: parameters, and what is left of each batch."""

    def __init__(
        self,
        program: Program,
        params: Params,
        masks: Masks,
        batches: list[Any],
        layers: dict[Product, list[Layer]],
        rule: Pattern | None,
        settings: Layerwise,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        self.readers = readers or {}
        self.program, self.params, self.settings = program, params, settings
        self.layers, self.rule = layers, rule
        self.original = leaves_by_path(params)
        self.leaves: dict[str, Any] = dict(self.original)
        self.masks = {path: np.array(mask) for path, mask in masks.items()}
        # Products that are not pruned are cuts as well: there a repair may end.
        every = [u for uses in program.uses.values() for u in uses]
        stages = program.stages(u for u in every if isinstance(u, Product))
        self.stages = [[p for p in stage if p in layers] for stage in stages]
        self.first = next(stage for stage in self.stages if stage)
        while not self.stages[-1]:
            self.stages.pop()
        targets = [
            tuple(dict.fromkeys(program.operand(p) for p in stage)) for stage in stages
        ]
        targets.append(tuple(v for v in program.jaxpr.outvars if v in program.varies))
        self.segments = program.segments(targets)
        live = [jax.tree.leaves(batch) for batch in batches]
        self.batches = list(live)
        self.sparse: list[Any] = live
        self.dense: list[Any] = list(live)
        self.results: list[LayerResult] = []
        self.found: dict[Product, Sensitivity] = {}
        self.seconds = dict.fromkeys(("inputs", "weights", "repair"), 0.0)

    def allocate(self, level: float) -> None:
        """Decides how many weights of each layer stay."""
        every = [(p, layer) for p, layers in self.layers.items() for layer in layers]
        sizes = [layer.size for _, layer in every]
        counts = [num_kept(size, level) for size in sizes]
        if self.settings.scope == "global" and self.rule is None:
            start = time.perf_counter()
            self._look()
            scores = [
                scores_of(self.original[p.path], layer, self.found[p])
                for p, layer in every
            ]
            counts = shared_out(scores, level, self.settings.spread)
            self.seconds["allocation"] = time.perf_counter() - start
        self.kept = {
            (product, layer.number): count
            for (product, layer), count in zip(every, counts, strict=True)
        }

    def allocate_structures(
        self, found: Structures, level: float, budget: Budget
    ) -> None:
        """Decides how many structures each layer no longer reads."""
        start, losses = time.perf_counter(), None
        if self.settings.scope == "global":
            self._look()
            losses = {
                unit: loss
                for product, (layer,) in self.layers.items()
                for unit, loss in self.readers[product.path]
                .losses(
                    layer,
                    scores_of(self.original[product.path], layer, self.found[product]),
                )
                .items()
            }
        counts = counts_of(found, level, budget, losses, self.settings.spread)
        self.gone = dict(zip(found.units, counts, strict=True))
        self.seconds["allocation"] = time.perf_counter() - start

    def _look(self) -> None:
        """Asks what the outputs of each layer mean to those of the network."""
        number = len(jax.tree.leaves(self.sparse[0])[0])
        some = -(-self.settings.sensitivity_examples // number)
        self.found = sensitivities(
            self.program,
            list(self.layers),
            self.original,
            self.sparse[:some],
            self.settings.metric,
            self.settings.seed,
        )

    def run(self, progress: Any) -> tuple[Params, Masks, LayerwiseInfo]:
        """Prunes every layer, and repairs them."""
        total, span = len(self.stages), self.settings.repair_stages
        entry: tuple[int, list[Any]] = (0, [])
        for number in range(total):
            progress("layers", number, total)
            stage = self.stages[number]
            moments = self._moments(stage, self.segments[number])
            if number % span == 0:
                entry = number, list(self.sparse)
            for product in stage:
                self._prune(product, *moments[self._key(product)])
            ends = (number + 1) % span == 0 or number + 1 == total
            if self.settings.repair and ends:
                self._repair(*entry, number)
        progress("layers", total, total)
        if self.settings.distil:
            self._distil(progress)
        masks = {path: jnp.asarray(mask) for path, mask in self.masks.items()}
        changed = {path: jnp.asarray(self.leaves[path]) for path in masks}
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        size = sum(mask.size for mask in self.masks.values())
        info = LayerwiseInfo(
            1 - kept / size,
            kept,
            size,
            sparsity_by_path(masks),
            tuple(self.results),
            self.seconds,
        )
        return replace_leaves(self.params, changed), masks, info

    def _repair(self, first: int, sparse: list[Any], last: int) -> None:
        """Moves the weights of some stages towards the outputs of the unpruned network.

        Args:
            first: The first of the stages.
            sparse: What each batch has left before it.
            last: The last; what is left of a batch after it is matched.
        """
        start = time.perf_counter()
        segments = self.segments[first + 1 : last + 2]
        wanted = self._after(segments[-1])
        window = Window(self.program, segments, self.masks, self.leaves, self.original)
        window.fit(sparse, wanted, self.settings)
        self.leaves |= window.leaves(self.leaves)
        # A list of its own: what is before the stages stays as it is.
        self.sparse = list(sparse)
        for segment in segments[:-1]:
            values = self._values(segment, self.leaves)
            self.sparse = [segment.run(values, taken)[0] for taken in self.sparse]
        self.seconds["repair"] += time.perf_counter() - start

    def _distil(self, progress: Any) -> None:
        """Moves all weights towards the outputs of the unpruned network."""
        start = time.perf_counter()
        total, span = len(self.stages), self.settings.repair_stages
        windows = [
            Window(
                self.program,
                self.segments[first + 1 : min(first + span, total) + 1],
                self.masks,
                self.leaves,
                self.original,
            )
            for first in range(0, total, span)
        ]
        head = Head(
            self.program,
            self.segments[total + 1 :],
            self.original,
            self.settings.metric,
        )
        entry = self.segments[0]
        values = self._values(entry, self.original)
        batches = [entry.run(values, list(leaves))[0] for leaves in self.batches]
        # The unpruned network is at the last stage.
        wanted = self._after(self.segments[total])
        rounds = self.settings.distil * len(batches)
        for number in range(rounds):
            progress("distillation", number, rounds)
            batch = number % len(batches)
            rate = jnp.float32(self.settings.distil_rate * (1 - number / rounds))
            states = [batches[batch]]
            for window in windows:
                states.append(window.forward(states[-1]))
            slopes = head.slopes(states[-1], wanted[batch])
            for window, taken in zip(windows[::-1], states[-2::-1], strict=True):
                slopes = window.step(taken, slopes, rate)
        progress("distillation", rounds, rounds)
        for window in windows:
            self.leaves |= window.leaves(self.leaves)
        self.seconds["distillation"] = time.perf_counter() - start

    def _after(self, segment: Segment) -> list[list[Any]]:
        """What is left of each batch in the unpruned network after a segment."""
        values = self._values(segment, self.original)
        found = (segment.run(values, dense) for dense in self.dense)
        return [given or ends for given, ends in found]

    def _values(self, segment: Segment, leaves: Mapping[str, Any]) -> list[jax.Array]:
        # Copies: leaves of NumPy are written to later.
        return [jnp.array(read.of(leaves[read.path])) for read in segment.reads]

    def _key(self, product: Product) -> Any:
        return self.program.operand(product), _operand_key(product)

    def _moments(
        self,
        stage: list[Product],
        segment: Segment,
    ) -> dict[Any, tuple[jax.Array, jax.Array]]:
        """Second moments of the inputs of a stage: E[x xᵀ] and E[z xᵀ]."""
        start = time.perf_counter()
        products = {self._key(product): product for product in stage}
        sums: dict[Any, list[jax.Array]] = {}
        rows = dict.fromkeys(products, 0)
        new = self._values(segment, self.leaves)
        old = self._values(segment, self.original)
        settings = self.settings
        # Before the first layer both networks are one.
        across = settings.aim == "network" and stage is not self.first
        follows = settings.aim == "network" or settings.repair or settings.distil
        for i in range(len(self.sparse)):
            self.sparse[i], x = segment.run(new, self.sparse[i])
            z = x
            if follows:
                self.dense[i], z = segment.run(old, self.dense[i])
            place = dict(zip(segment.inputs, zip(x, z, strict=True), strict=True))
            for key, product in products.items():
                own, other = place[key[0]]
                parts = [_moment(product.anywhere(), own, own)]
                if across:
                    parts.append(_moment(product.anywhere(), other, own))
                sums[key] = jax.tree.map(jnp.add, sums[key], parts) if i else parts
                rows[key] += _positions(product, own)
        found = {
            key: (total[0] / rows[key], total[-1] / rows[key])
            for key, total in sums.items()
        }
        # Not the dict, whose keys cannot be sorted.
        jax.block_until_ready(list(found.values()))
        for key, both in found.items():
            _check_finite(products[key].path, *both)
        self.seconds["inputs"] += time.perf_counter() - start
        return found

    def _prune(self, product: Product, moment: jax.Array, cross: jax.Array) -> None:
        """Prunes the layers of a product, and writes their weights and masks."""
        start = time.perf_counter()
        path = product.path
        leaf = np.array(self.leaves[path])
        mask = self.masks[path].reshape(-1)
        if path in self.readers:
            self._take_out(product, moment, cross)
            return
        for layer in self.layers[product]:
            own, other = (_part(matrix, layer) for matrix in (moment, cross))
            entries = layer.entries()
            weights = leaf.reshape(-1)[entries].astype(np.float32)
            allowed = mask[entries]
            kept = min(self.kept[product, layer.number], int(allowed.sum()))
            found = self.found.get(product)
            importance = np.ones(weights.shape[:2], np.float32)
            if found is not None:
                importance = importance_of(np.asarray(found.outputs)[layer.groups])
            pruned, stays = pruned_layer(
                weights,
                own,
                other,
                importance,
                allowed,
                kept,
                np.float32(self.settings.damping),
                np.asarray(PENALTIES, np.float32),
                pattern=None if self.rule is None else (self.rule.kept, self.rule.size),
                rounds=self.settings.rounds,
                polish=self.settings.polish,
            )
            error = float(layer_error(weights, pruned, own))
            leaf.reshape(-1)[entries] = np.asarray(pruned).astype(leaf.dtype)
            mask[entries] = np.asarray(stays)
            self.results.append(
                LayerResult(
                    path, layer.number, 1 - int(stays.sum()) / stays.size, error
                )
            )
        self.leaves[path] = leaf
        self.seconds["weights"] += time.perf_counter() - start

    def _take_out(self, product: Product, moment: jax.Array, cross: jax.Array) -> None:
        """Takes structures from the layer that reads them and those that make them."""
        start = time.perf_counter()
        (layer,), reader = self.layers[product], self.readers[product.path]
        columns = reader.columns(layer)
        leaf = np.array(self.leaves[reader.path])
        entries = layer.entries()[0][:, columns]
        weights = leaf.reshape(-1)[entries].astype(np.float32)
        order = np.ix_(columns, columns)
        own, other = moment[0][order], cross[0][order]
        stays = reader.there(self.masks[reader.path], layer)
        start_at = 0
        for family in reader.families:
            mine = np.zeros(len(stays), bool)
            mine[start_at : start_at + len(family.units)] = True
            start_at += len(family.units)
            number = max(0, self.gone[family.units] - int((mine & ~stays).sum()))
            pruned, stays = without_inputs(
                weights,
                own,
                other,
                stays,
                mine,
                np.float32(self.settings.damping),
                size=len(columns) // len(stays),
                number=number,
                together=-(-number // STEPS) or 1,
            )
            stays = np.asarray(stays)
            units = np.array(family.units)[~stays[mine]]
            family.take_out(self.masks, set(units.tolist()))
        leaf.reshape(-1)[entries] = np.asarray(pruned).astype(leaf.dtype)
        self.leaves[reader.path] = leaf
        members = {m.path for family in reader.families for m in family.members}
        for path in members & self.masks.keys():
            leaf = np.array(self.leaves[path])
            leaf[~self.masks[path]] = 0
            self.leaves[path] = leaf
        error = float(layer_error(weights[None], pruned[None], own[None]))
        left = float(np.mean(stays))
        self.results.append(LayerResult(reader.path, layer.number, 1 - left, error))
        self.seconds["weights"] += time.perf_counter() - start


def _check_finite(path: str, *moments: jax.Array) -> None:
    if not all(bool(jnp.all(jnp.isfinite(moment))) for moment in moments):
        raise OptionError(
            "inputs",
            f"the inputs of the layer of {path!r} are not finite for some of the "
            "examples; look for NaN or infinity in inputs and params, and for numbers "
            "that leave the range of the network's precision",
        )


def _part(moment: jax.Array, layer: Layer) -> jax.Array:
    """The second moments of a layer's groups, in the order of its columns."""
    whole = len(layer.groups) == len(moment)
    if whole and (np.diff(layer.columns) == 1).all():
        return moment
    return moment[np.ix_(layer.groups, layer.columns, layer.columns)]


def _positions(product: Product, inputs: jax.Array) -> int:
    """Rows of a layer's inputs in a batch."""
    shape = jax.eval_shape(partial(input_rows, product), inputs).shape
    return shape[1]
