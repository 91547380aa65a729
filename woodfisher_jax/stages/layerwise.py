"""Pruning layer after layer, from inputs alone: each layer keeps its outputs."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from woodfisher_jax.equations.fisher import matmul
from woodfisher_jax.equations.layerwise import layer_error, pruned_layer
from woodfisher_jax.options import OptionError, Options, option
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.rows.inputs import check_params
from woodfisher_jax.rows.projections import METRICS
from woodfisher_jax.selection.goal import SCOPES
from woodfisher_jax.selection.patterns import GroupNames, Pattern, groups_of, parse
from woodfisher_jax.stages.sensitivity import Sensitivity, sensitivities
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.tracing.capture import input_rows, weight_entries
from woodfisher_jax.tracing.layers import Convolution, Other, Product, Use
from woodfisher_jax.tracing.segments import Program, Segment
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.blocks import FlatOrder, as_read, flat_order
from woodfisher_jax.trees.masks import (
    Masks,
    Prunable,
    check_masks,
    init_masks,
    num_kept,
    sparsity_by_path,
)
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import num_examples, regroup, shapes_of

PENALTIES = (0.3, 1.0)
"""Penalties of ADMM in turn, in units of the second moment of an input."""


AIMS = ("network", "layer")
"""What a layer's outputs are to be near to."""


ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True)
class Layerwise(Options):
    """How layers are pruned one after another."""

    scope: str = option(
        "layer",
        "layer (the sparsity in each layer) or global (over all layers, by what their "
        "outputs mean to those of the network).",
        choices=SCOPES,
    )
    spread: float = option(
        0.2,
        "With scope='global': how far the sparsity of a layer may be from that of all.",
        least=0,
        most=1,
    )
    sensitivity_examples: int = option(
        8,
        "With scope='global': examples that tell what a layer's outputs mean.",
        least=1,
    )
    metric: str = option(
        "identity",
        "With scope='global': of the network's outputs, identity or softmax (of "
        "logits).",
        choices=METRICS,
    )
    seed: int = option(0, "With scope='global': of random projections of the outputs.")
    damping: float = option(
        0.01,
        "Added to the second moments of a layer's inputs, in units of their mean.",
        least=0,
    )
    aim: str = option(
        "network",
        "network (a layer's outputs are to be those in the unpruned network) or layer "
        "(those of the unpruned layer on the same inputs).",
        choices=AIMS,
    )
    rounds: int = option(8, "Rounds of ADMM with each of two penalties.", least=1)
    polish: int = option(
        8, "Steps of conjugate gradients on the weights that stay.", least=0
    )
    repair: int = option(
        0,
        "Passes over the inputs in which the weights that stay are moved so that the "
        "outputs of several layers together are those of the unpruned network.",
        least=0,
    )
    repair_stages: int = option(
        4,
        "Layers, counted one after another, that are repaired together; 4 are a block "
        "of a transformer.",
        least=1,
    )
    repair_rate: float = option(
        2e-3,
        "Learning rate of the repair at its start, relative to the weights of a "
        "tensor; it falls to zero.",
        above=0,
    )
    distil: int = option(
        0,
        "Passes over the inputs at the end in which all weights that stay are moved so "
        "that the network's outputs are those of the unpruned one.",
        least=0,
    )
    distil_rate: float = option(
        1e-3, "Learning rate of these passes, as ``repair_rate``.", above=0
    )
    batch_size: int = option(
        4, "Most examples that pass through the network at once.", least=1
    )


class LayerResult(NamedTuple):
    """What became of one layer.

    Attributes:
        path: Its weight tensor.
        index: Its number in a tensor of stacked layers; 0 for others.
        sparsity: Fraction of its weights that are zero.
        error: ``E ‖P x - W x‖² / E ‖W x‖²`` on the inputs that it was pruned with.
    """

    path: str
    index: int
    sparsity: float
    error: float


class LayerwiseInfo(NamedTuple):
    """What a layer-wise pruning did.

    Attributes:
        sparsity: Fraction of the prunable weights that are zero now.
        nonzero: How many prunable weights stay.
        prunable: How many prunable weights there are.
        sparsity_by_path: Sparsity of each prunable parameter.
        layers: Each layer in the order of the network.
        seconds: Wall time by phase.
    """

    sparsity: float
    nonzero: int
    prunable: int
    sparsity_by_path: dict[str, float]
    layers: tuple[LayerResult, ...]
    seconds: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """The error of each parameter, the mean over layers that are stacked in it."""
        found: dict[str, list[float]] = {}
        for layer in self.layers:
            found.setdefault(layer.path, []).append(layer.error)
        return {path: float(np.mean(errors)) for path, errors in found.items()}


class _Layer(NamedTuple):
    """A layer to be pruned.

    Attributes:
        product: Where it is in the program.
        index: Its number in a tensor of stacked layers.
        groups: Which groups of the product belong to it.
        entries: Places of its weights in the flat tensor, [groups, outputs, inputs],
            inputs in the order of the pattern.
        columns: That order.
    """

    product: Product
    index: int
    groups: np.ndarray
    entries: np.ndarray
    columns: np.ndarray


@watched
def prune_layerwise(
    net_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    *,
    sparsity: float | None = None,
    pattern: str | GroupNames | None = None,
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
            tokens [sequences, tokens].
        sparsity: Fraction of the weights of each layer to be zero, in [0, 1).
        pattern: "2:4" or any N:M; default single weights.
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
    rule = _rule(pattern)
    check_params(params)
    batches = _batches(inputs, settings.batch_size)
    shapes = shapes_of(batches[0], len(jax.tree.leaves(batches[0])[0]))
    program = Program(net_fn, params, shapes)
    axes = find_axes(net_fn, params, shapes)
    if masks is None:
        known = axes if prunable is not None else _untied(axes, program.uses)
        masks = init_masks(params, prunable, known)
    check_masks(params, masks)
    level = _level(sparsity, rule)
    layers = _layers(program, masks, axes, rule)
    work = _Work(program, params, masks, batches, layers, rule, settings)
    work.allocate(level)
    return work.run(progress)


def _rule(pattern: str | GroupNames | None) -> Pattern | None:
    """The pattern, which has to be N:M."""
    rule = parse(pattern)
    if rule is not None and rule.size is None:
        raise OptionError(
            "pattern",
            f"pattern={rule.name!r} in layer-wise pruning; expected N:M such as 2:4, "
            "or none; wf.prune and wf.prune_outputs know the others",
        )
    return rule


def _level(sparsity: float | None, rule: Pattern | None) -> float:
    if sparsity is None and rule is not None:
        sparsity = rule.sparsity
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise OptionError(
            "sparsity",
            f"sparsity={sparsity!r}; expected the fraction of each layer's weights to "
            "be zero, from 0 to below 1",
        )
    if rule is not None and abs(sparsity - (rule.sparsity or 0.0)) > 1e-6:
        raise OptionError(
            "sparsity",
            f"sparsity={sparsity} with pattern={rule.name!r}; expected "
            f"{rule.sparsity}, or no sparsity",
        )
    return float(sparsity)


def _batches(inputs: Any, most: int) -> list[Any]:
    """The inputs in batches of one length."""
    number = num_examples(inputs)
    if not number:
        raise OptionError(
            "inputs",
            "inputs hold no examples that can be counted; expected one batch (array, "
            "tuple or dict of arrays) or a list of batches",
        )
    # Of one length, so that each segment is compiled once.
    size = next(n for n in range(min(most, number), 0, -1) if number % n == 0)
    return list(regroup(inputs, size))


# ------------------------------------------------------------------------- the layers


def _layers(
    program: Program, masks: Masks, axes: Axes, rule: Pattern | None
) -> dict[Product, list[_Layer]]:
    """The layers of the masks' tensors, by product.

    Raises:
        OptionError: If a tensor is not the weight of layers that can be followed, or a
            pattern does not fit it.
    """
    found: dict[Product, list[_Layer]] = {}
    for path, mask in masks.items():
        shape = tuple(mask.shape)
        products = _products(path, program.uses.get(path, ()))
        order = flat_order({path: mask}, axes)
        places = [weight_entries(product, shape) for product in products]
        _check_once(path, shape, places)
        for product, entries in zip(products, places, strict=True):
            found[product] = list(_parts(product, entries, order, rule))
    return found


def _untied(axes: Axes, uses: Mapping[str, Sequence[Use]]) -> Axes:
    """The axes without those of weights that are read otherwise as well.

    A classifier that is the embedding is one: what its rows are worth as an embedding,
    the inputs of the classifier do not tell.
    """
    return {
        path: found
        for path, found in axes.items()
        if not any(isinstance(u, Other) and not u.hides_product for u in uses[path])
    }


def _products(path: str, uses: Sequence[Use]) -> list[Product]:
    remedy = "leave it out with prunable (or masks), or prune with wf.prune_outputs"
    for use in uses:
        if isinstance(use, Other):
            raise OptionError(
                "prunable", f"layer-wise pruning: {path!r} {use.reason}; {remedy}"
            )
    products = [use for use in uses if isinstance(use, Product)]
    if not products or len(products) < len(uses):
        what = "is no layer's weight" if uses else "is not used by net_fn"
        raise OptionError("prunable", f"layer-wise pruning: {path!r} {what}; {remedy}")
    return products


def _check_once(path: str, shape: tuple[int, ...], places: list[np.ndarray]) -> None:
    """Raises unless every weight belongs to exactly one layer."""
    counts = np.zeros(int(np.prod(shape)), np.int32)
    for entries in places:
        np.add.at(counts, entries.reshape(-1), 1)
    if (counts == 1).all():
        return
    how = "in several layers" if counts.max() > 1 else "only in part"
    raise OptionError(
        "prunable",
        f"layer-wise pruning: {path!r} of shape {shape} is used {how}; expected each "
        "of its weights in one layer, whose inputs are then known; leave it out with "
        "prunable (or masks), or prune with wf.prune_outputs",
    )


def _parts(
    product: Product, entries: np.ndarray, order: FlatOrder, rule: Pattern | None
) -> Iterator[_Layer]:
    """The layers that one product has: several for stacked ones, as of experts."""
    axes = order.axes[0]
    read = np.empty(order.size, np.int64)
    read[as_read(axes, np.arange(order.size).reshape(order.shapes[0]))] = np.arange(
        order.size
    )
    place = read[entries]
    number = place // (order.size // axes.sizes[0])
    of = None if rule is None else groups_of(rule, order).of
    for index in np.unique(number):
        groups = np.flatnonzero((number == index).all(axis=(1, 2)))
        columns = np.arange(entries.shape[2])
        if of is not None:
            names = of[place[groups]]
            columns = np.argsort(names[0, 0], kind="stable")
            names = names[..., columns].reshape(*names.shape[:2], -1, rule.size)
            if (names != names[..., :1]).any():
                raise OptionError(
                    "pattern",
                    f"pattern={rule.name!r}: the groups of {product.path!r} do not lie "
                    "along the inputs of its layer; leave it out with prunable",
                )
        yield _Layer(
            product, int(index), groups, entries[groups][..., columns], columns
        )


def _operand_key(product: Product) -> Any:
    """What the rows of a layer's inputs depend on, beside the inputs."""
    if isinstance(product.geometry, Convolution):
        return product._replace(path="", position=(), views=(), rule="")
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


def _plain(product: Product) -> Product:
    """The product without its place, so that equal layers share a program."""
    return product._replace(path="", position=(), views=(), rule="")


def _scores(leaf: Any, layer: _Layer, found: Sensitivity) -> np.ndarray:
    """What each weight of a layer is worth to the outputs of the network [weights].

    ``w_oi² E[g_o²] E[x_i²]``: the diagonal of the layer's Kronecker factors.
    """
    weights = np.asarray(leaf).reshape(-1)[layer.entries].astype(np.float32)
    g = np.asarray(found.outputs)[layer.groups][:, :, None]
    x = np.asarray(found.inputs)[layer.groups][:, layer.columns][:, None, :]
    return (np.square(weights) * g * x).reshape(-1)


def _shared_out(scores: list[np.ndarray], level: float, spread: float) -> list[int]:
    """How many weights of each layer stay, by one threshold for all layers.

    Args:
        scores: Of each layer, [weights].
        level: Sparsity of all together.
        spread: How far the sparsity of a layer may be from it.
    """
    sizes = np.array([len(layer) for layer in scores])
    least = np.array([num_kept(n, min(level + spread, 1.0)) for n in sizes])
    most = np.array([num_kept(n, max(level - spread, 0.0)) for n in sizes])
    goal = num_kept(int(sizes.sum()), level)
    rising = [np.sort(layer) for layer in scores]

    def counts(threshold: float) -> np.ndarray:
        above = [len(s) - np.searchsorted(s, threshold, "right") for s in rising]
        return np.clip(above, least, most)

    low, high = 1e-45, max(float(s[-1]) for s in rising)
    for _ in range(100):
        middle = float(np.sqrt(low) * np.sqrt(high))
        low, high = (middle, high) if counts(middle).sum() > goal else (low, middle)
    found = counts(high)
    # What ties at the threshold leave over goes to the largest layers with room.
    for i in np.argsort(-sizes):
        found[i] += min(most[i] - found[i], goal - int(found.sum()))
    return [int(n) for n in found]


def _importance(squares: np.ndarray) -> np.ndarray:
    """Weights of a layer's outputs, √E[g²] with mean square 1 [groups, outputs]."""
    mean = np.mean(squares) or 1.0
    # An output that means nothing still gets a solution.
    return np.sqrt(np.maximum(squares / mean, 1e-6)).astype(np.float32)


# --------------------------------------------------------------------------- the work


class _Work:
    """A network on its way: parameters, and what is left of each batch."""

    def __init__(
        self,
        program: Program,
        params: Params,
        masks: Masks,
        batches: list[Any],
        layers: dict[Product, list[_Layer]],
        rule: Pattern | None,
        settings: Layerwise,
    ) -> None:
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
        self.distances: list[float] = []
        self.sparse: list[Any] = live
        self.dense: list[Any] = list(live)
        self.results: list[LayerResult] = []
        self.found: dict[Product, Sensitivity] = {}
        self.seconds = dict.fromkeys(("inputs", "weights", "repair"), 0.0)

    def allocate(self, level: float) -> None:
        """Decides how many weights of each layer stay."""
        every = [(p, layer) for p, layers in self.layers.items() for layer in layers]
        sizes = [layer.entries.size for _, layer in every]
        counts = [num_kept(size, level) for size in sizes]
        if self.settings.scope == "global" and self.rule is None:
            start = time.perf_counter()
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
            scores = [
                _scores(self.original[p.path], layer, self.found[p])
                for p, layer in every
            ]
            counts = _shared_out(scores, level, self.settings.spread)
            self.seconds["allocation"] = time.perf_counter() - start
        self.kept = {
            (product, layer.index): count
            for (product, layer), count in zip(every, counts, strict=True)
        }

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
            if self.settings.repair and (number + 1) % span in (0, total % span):
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
        window = _Window(self.program, segments, self.masks, self.leaves, self.original)
        window.fit(sparse, wanted, self.settings)
        self.leaves |= window.leaves(self.leaves)
        self.sparse = sparse
        for segment in segments[:-1]:
            values = self._values(segment, self.leaves)
            self.sparse = [segment.run(values, taken)[0] for taken in self.sparse]
        self.seconds["repair"] += time.perf_counter() - start

    def _distil(self, progress: Any) -> None:
        """Moves all weights towards the outputs of the unpruned network."""
        start = time.perf_counter()
        total, span = len(self.stages), self.settings.repair_stages
        windows = [
            _Window(
                self.program,
                self.segments[first + 1 : min(first + span, total) + 1],
                self.masks,
                self.leaves,
                self.original,
            )
            for first in range(0, total, span)
        ]
        head = _Head(
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
            value, slopes = head.slopes(states[-1], wanted[batch])
            self.distances.append(float(value))
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
        across = self.settings.aim == "network" and stage is not self.first
        both = across or self.settings.repair or self.settings.aim == "network"
        for i in range(len(self.sparse)):
            self.sparse[i], x = segment.run(new, self.sparse[i])
            z = x
            if both:
                self.dense[i], z = segment.run(old, self.dense[i])
            place = dict(zip(segment.inputs, zip(x, z, strict=True), strict=True))
            for key, product in products.items():
                own, other = place[key[0]]
                parts = [_moment(_plain(product), own, own)]
                if across:
                    parts.append(_moment(_plain(product), other, own))
                sums[key] = jax.tree.map(jnp.add, sums[key], parts) if i else parts
                rows[key] += _positions(product, own)
        found = {
            key: (total[0] / rows[key], total[-1] / rows[key])
            for key, total in sums.items()
        }
        jax.block_until_ready(found)
        self.seconds["inputs"] += time.perf_counter() - start
        return found

    def _prune(self, product: Product, moment: jax.Array, cross: jax.Array) -> None:
        """Prunes the layers of a product, and writes their weights and masks."""
        start = time.perf_counter()
        path = product.path
        leaf = np.array(self.leaves[path])
        mask = self.masks[path].reshape(-1)
        for layer in self.layers[product]:
            order = np.ix_(layer.groups, layer.columns, layer.columns)
            own, other = moment[order], cross[order]
            weights = leaf.reshape(-1)[layer.entries].astype(np.float32)
            allowed = mask[layer.entries]
            kept = min(self.kept[product, layer.index], int(allowed.sum()))
            found = self.found.get(product)
            importance = np.ones(weights.shape[:2], np.float32)
            if found is not None:
                importance = _importance(np.asarray(found.outputs)[layer.groups])
            pruned, stays = pruned_layer(
                weights,
                own,
                other,
                importance,
                allowed,
                kept,
                self.settings.damping,
                jnp.asarray(PENALTIES),
                pattern=None if self.rule is None else (self.rule.kept, self.rule.size),
                rounds=self.settings.rounds,
                polish=self.settings.polish,
            )
            error = float(layer_error(weights, pruned, own))
            leaf.reshape(-1)[layer.entries] = np.asarray(pruned).astype(leaf.dtype)
            mask[layer.entries] = np.asarray(stays)
            self.results.append(
                LayerResult(path, layer.index, 1 - int(stays.sum()) / stays.size, error)
            )
        self.leaves[path] = leaf
        self.seconds["weights"] += time.perf_counter() - start


def _positions(product: Product, inputs: jax.Array) -> int:
    """Rows of a layer's inputs in a batch."""
    shape = jax.eval_shape(partial(input_rows, product), inputs).shape
    return shape[1]


class _Window:
    """Some layers one after another, whose weights are fitted together."""

    def __init__(
        self,
        program: Program,
        segments: Sequence[Segment],
        masks: Mapping[str, np.ndarray],
        leaves: Mapping[str, Any],
        original: Mapping[str, Any],
    ) -> None:
        self._program, self._segments = program, segments
        reads = list(dict.fromkeys(r for segment in segments for r in segment.reads))
        self._own = [read for read in reads if read.path in masks]
        self._others = [read for read in reads if read.path not in masks]
        self.weights = [jnp.array(r.of(leaves[r.path])) for r in self._own]
        self._masks = [jnp.array(r.of(masks[r.path])) for r in self._own]
        self._sizes = [
            jnp.sqrt(jnp.mean(jnp.square(r.of(original[r.path])))) for r in self._own
        ]
        self._fixed = (
            [jnp.array(r.of(leaves[r.path])) for r in self._others],
            [segment.constants for segment in segments],
        )
        self._state = ADAM.init(self.weights)
        self._compiled: dict[str, Callable[..., Any]] = {}

    def _run(self, name: str, f: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function that is traced once for the window."""
        if name not in self._compiled:
            self._compiled[name] = self._program.compiled(f, *arguments)
        return self._compiled[name](*arguments)

    def leaves(self, old: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The tensors with the fitted weights."""
        found: dict[str, np.ndarray] = {}
        for read, value in zip(self._own, self.weights, strict=True):
            leaf = found.setdefault(read.path, np.array(old[read.path]))
            read.of(leaf)[...] = np.asarray(value)
        return found

    def _outputs(
        self, weights: list[jax.Array], fixed: Any, taken: list[Any]
    ) -> list[Any]:
        others, constants = fixed
        known = dict(zip(self._own, weights, strict=True))
        known |= zip(self._others, others, strict=True)
        ends: list[Any] = []
        for segment, own in zip(self._segments, constants, strict=True):
            values = [known[read] for read in segment.reads]
            taken, ends = segment.pure(values, taken, own)
        return taken or ends

    def _distance(
        self, weights: list[jax.Array], fixed: Any, taken: list[Any], wanted: list[Any]
    ) -> jax.Array:
        """Relative squared distance of what is left after the layers, its mean."""
        found = self._outputs(weights, fixed, taken)
        return jnp.mean(jnp.stack(_distances(found, wanted)))

    def _moved(
        self,
        slopes: list[jax.Array],
        weights: list[jax.Array],
        state: Any,
        masks: list[jax.Array],
        sizes: list[jax.Array],
        rate: jax.Array,
    ) -> tuple[list[jax.Array], Any]:
        slopes = jax.tree.map(lambda g, m: g * m, slopes, masks)
        moves, state = ADAM.update(slopes, state)
        weights = [
            w - rate * size * move * mask
            for w, size, move, mask in zip(weights, sizes, moves, masks, strict=True)
        ]
        return weights, state

    def forward(self, taken: list[Any]) -> list[Any]:
        """What is left of a batch after the layers."""
        return self._run("forward", self._outputs, self.weights, self._fixed, taken)

    def step(self, taken: list[Any], slopes: list[Any], rate: jax.Array) -> list[Any]:
        """Moves the weights by the gradients at what the layers give.

        Returns:
            The gradients at what they take.
        """

        def step(
            weights: list[jax.Array],
            state: Any,
            masks: list[jax.Array],
            sizes: list[jax.Array],
            fixed: Any,
            rate: jax.Array,
            taken: list[Any],
            slopes: list[Any],
        ) -> tuple[list[jax.Array], Any, list[Any]]:
            def forward(weights: list[jax.Array], floating: list[Any]) -> list[Any]:
                found = self._outputs(weights, fixed, mixed(taken, floating))
                return floats(found)

            _, pull = jax.vjp(forward, weights, floats(taken))
            own, before = pull(slopes)
            return *self._moved(own, weights, state, masks, sizes, rate), before

        arguments = (
            self.weights,
            self._state,
            self._masks,
            self._sizes,
            self._fixed,
            rate,
            taken,
            slopes,
        )
        self.weights, self._state, before = self._run("step", step, *arguments)
        return before

    def fit(
        self, taken: list[Any], wanted: list[Any], settings: Layerwise
    ) -> tuple[float, float]:
        """Moves the weights by Adam.

        Returns:
            The distance of the first and of the last pass, means over the batches.
        """

        def step(
            weights: list[jax.Array],
            state: Any,
            masks: list[jax.Array],
            sizes: list[jax.Array],
            fixed: Any,
            rate: jax.Array,
            taken: list[Any],
            wanted: list[Any],
        ) -> tuple[list[jax.Array], Any, jax.Array]:
            value, slopes = jax.value_and_grad(self._distance)(
                weights, fixed, taken, wanted
            )
            return *self._moved(slopes, weights, state, masks, sizes, rate), value

        total = settings.repair * len(taken)
        values = []
        for number in range(total):
            batch = number % len(taken)
            rate = jnp.float32(settings.repair_rate * (1 - number / total))
            arguments = (
                self.weights,
                self._state,
                self._masks,
                self._sizes,
                self._fixed,
                rate,
                taken[batch],
                wanted[batch],
            )
            self.weights, self._state, value = self._run("fit", step, *arguments)
            values.append(value)
        first, last = values[: len(taken)], values[-len(taken) :]
        return float(np.mean(first)), float(np.mean(last))


class _Head:
    """What follows the last pruned layer, and the distance of the outputs."""

    def __init__(
        self,
        program: Program,
        segments: Sequence[Segment],
        leaves: Mapping[str, Any],
        metric: str,
    ) -> None:
        self._program, self._segments, self._metric = program, segments, metric
        self._values = [
            [jnp.array(read.of(leaves[read.path])) for read in segment.reads]
            for segment in segments
        ]
        self._constants = [segment.constants for segment in segments]
        self._compiled: Callable[..., Any] | None = None

    def _outputs(self, values: Any, constants: Any, taken: list[Any]) -> list[Any]:
        ends = taken
        for segment, own, fixed in zip(self._segments, values, constants, strict=True):
            taken, ends = segment.pure(own, taken, fixed)
        return floats(ends)

    def slopes(self, taken: list[Any], wanted: list[Any]) -> tuple[Any, list[Any]]:
        """The distance of the outputs, and its gradient at what the head takes."""

        def distance(
            floating: list[Any], values: Any, constants: Any, taken: Any, wanted: Any
        ) -> jax.Array:
            found = self._outputs(values, constants, mixed(taken, floating))
            aims = self._outputs(values, constants, wanted)
            if self._metric == "identity":
                return jnp.mean(jnp.stack(_distances(found, aims)))
            pairs = zip(found, aims, strict=True)
            return sum(jnp.mean(_divergence(z, aim)) for z, aim in pairs)

        f = jax.value_and_grad(distance)
        arguments = (floats(taken), self._values, self._constants, taken, wanted)
        self._compiled = self._compiled or self._program.compiled(f, *arguments)
        return self._compiled(*arguments)


def _divergence(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """KL divergence of the softmax of some logits from that of the wanted ones."""
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _distances(found: list[Any], wanted: list[Any]) -> list[jax.Array]:
    """Relative squared distances of arrays."""
    return [
        jnp.sum(jnp.square(z - aim)) / jnp.maximum(jnp.sum(aim * aim), 1e-30)
        for z, aim in zip(floats(found), floats(wanted), strict=True)
    ]


def floats(arrays: Sequence[Any]) -> list[Any]:
    """Those that are floating-point numbers."""
    return [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]


def mixed(arrays: Sequence[Any], floating: Sequence[Any]) -> list[Any]:
    """The arrays with other floating-point ones."""
    parts = iter(floating)
    return [next(parts) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
