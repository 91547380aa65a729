"""A network run in segments, whose layers are pruned on the way."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.driver import memory
from woodfisher_jax.equations.precision import matmul
from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.layerwise.sensitivity import Sensitivity, sensitivities
from woodfisher_jax.layerwise.settings import LayerResult, Layerwise, LayerwiseInfo
from woodfisher_jax.layerwise.windows import Head, Window
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.inputs import LARGEST
from woodfisher_jax.selection.findings import emptied, outputs_without_inputs
from woodfisher_jax.tracing.capture import input_rows
from woodfisher_jax.tracing.layers import Convolution, Product
from woodfisher_jax.tracing.segments import Program, Segment
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.blocks import flat_mask, flat_order
from woodfisher_jax.trees.masks import Masks, sparsity_by_path
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves

Layers = dict[Product, list[Layer]]
"""The layers of each product that are pruned."""


class Solver(Protocol):
    """What is taken from each layer, and how its other weights move."""

    def chosen(self, layers: Layers) -> Layers:
        """The layers that it prunes."""

    def allocate(self, sequence: "Sequence") -> None:
        """Decides how much of each layer stays."""

    def prune(
        self,
        sequence: "Sequence",
        product: Product,
        moment: jax.Array,
        cross: jax.Array,
    ) -> None:
        """Prunes the layers of a product, and writes their weights and masks.

        Args:
            sequence: Of which it changes leaves, masks and results.
            product: Of these layers.
            moment: ``E[x xᵀ]`` of its inputs [groups, inputs, inputs].
            cross: ``E[z xᵀ]``, with z in the unpruned network.
        """


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
def summed_moment(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """``Σ_t z_t x_tᵀ`` of the inputs of a layer [groups, inputs, inputs]."""
    z, x = (input_rows(product, a.astype(jnp.float32)) for a in (left, right))
    return matmul(jnp.swapaxes(z, 1, 2), x)


class Sequence:
    """A network whose layers are pruned one after another.

    Attributes:
        original: Parameters before anything is pruned, by path.
        leaves: Parameters as they are by now.
        masks: Of the prunable ones.
        layers: That are pruned.
        found: What outputs of layers mean to those of the network; empty until
            :meth:`look`.
        results: Of the layers that are done.
        emptied: How many weights each layer has of which the last are gone, by name;
            none until :meth:`run`.
        settings: Given by the caller.
    """

    def __init__(
        self,
        program: Program,
        params: Params,
        masks: Masks,
        axes: Axes,
        batches: list[Any],
        layers: Layers,
        settings: Layerwise,
        said: list[str],
    ) -> None:
        self.program, self.params, self.settings = program, params, settings
        self.layers, self.emptied = layers, dict[str, int]()
        self._before, self._axes, self._said = masks, axes, said
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

    def look(self) -> None:
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
        for product, own in self.found.items():
            _check_finite(product.path, own.inputs)
            if not bool(jnp.all(jnp.isfinite(own.outputs))):
                raise OptionError(
                    "scope",
                    f"scope='global': the gradients of net_fn at the layer of "
                    f"{product.path!r} are not finite for some of the examples, as "
                    "that of a square root or a norm at zero; look for NaN in the "
                    "outputs, write such functions with jnp.where inside, leave these "
                    "examples out, or take scope='layer'",
                )
        if not any(bool(jnp.any(own.outputs > 0)) for own in self.found.values()):
            metric = self.settings.metric
            raise OptionError(
                "scope",
                f"scope='global' with metric={metric!r}: no layer's outputs mean "
                "anything to those of net_fn, whose gradients are all zero; expected "
                "outputs that depend on the layers, metric='identity' for a single "
                "logit, or scope='layer'",
            )

    def done(self, path: str, number: int, sparsity: float, error: jax.Array) -> None:
        """Keeps what became of a layer, whose error is finite if its weights are."""
        _check_finite(path, error)
        self.results.append(LayerResult(path, number, sparsity, float(error)))

    def run(self, solver: Solver, progress: Any) -> tuple[Params, Masks, LayerwiseInfo]:
        """Prunes every layer, and repairs them."""
        start = time.perf_counter()
        solver.allocate(self)
        self.seconds["allocation"] = time.perf_counter() - start
        total, span = len(self.stages), self.settings.repair_stages
        entry: tuple[int, list[Any]] = (0, [])
        for number in range(total):
            progress("layers", number, total)
            memory.give_back()
            stage = self.stages[number]
            moments = self._moments(stage, self.segments[number])
            if number % span == 0:
                entry = number, list(self.sparse)
            for product in stage:
                start = time.perf_counter()
                solver.prune(self, product, *moments[self._key(product)])
                self.seconds["weights"] += time.perf_counter() - start
            ends = (number + 1) % span == 0 or number + 1 == total
            if self.settings.repair and ends:
                self._repair(*entry, number)
        progress("layers", total, total)
        if self.settings.distil:
            self._distil(progress)
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        size = sum(mask.size for mask in self.masks.values())
        masks: Masks = {}
        changed, empty = {}, dict[str, int]()
        for path in list(self.masks):
            # Popped, so that a large network is not there once more.
            masks[path] = jnp.asarray(self.masks.pop(path))
            changed[path] = jnp.asarray(self.leaves.pop(path))
            memory.give_back()
            order = flat_order({path: masks[path]}, self._axes)
            left = flat_mask(order, masks)
            self.emptied |= emptied(flat_mask(order, self._before), left, order)
            empty |= outputs_without_inputs(left, order)
        info = LayerwiseInfo(
            1 - kept / size,
            kept,
            size,
            sparsity_by_path(masks),
            tuple(self.results),
            self.seconds,
            empty,
            tuple(self._said),
            costs={},
            whole=(),
        )
        # What is not pruned too: NumPy may have a type that JAX takes as another.
        params = jax.device_put(replace_leaves(self.params, changed))
        return params, masks, info

    def windows(self) -> list[Window]:
        """All stages, some together."""
        total, span = len(self.stages), self.settings.repair_stages
        return [
            Window(
                self.program,
                self.segments[first + 1 : min(first + span, total) + 1],
                self.masks,
            )
            for first in range(0, total, span)
        ]

    def head(self) -> Head:
        """What comes after them."""
        after = self.segments[len(self.stages) + 1 :]
        return Head(self.program, after, self.settings.metric)

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
        window = Window(self.program, segments, self.masks)
        window.start(self.masks, self.leaves, self.original)
        window.fit(sparse, wanted, self.settings)
        window.check_finite("repair")
        self.leaves |= window.leaves(self.leaves)
        # A list of its own: what is before the stages stays as it is.
        self.sparse = list(sparse)
        for segment in segments[:-1]:
            values = segment.values(self.leaves)
            self.sparse = [segment.run(values, taken)[0] for taken in self.sparse]
        self.seconds["repair"] += time.perf_counter() - start

    def _distil(self, progress: Any) -> None:
        """Moves all weights towards the outputs of the unpruned network."""
        start = time.perf_counter()
        total = len(self.stages)
        windows = [
            window.start(self.masks, self.leaves, self.original)
            for window in self.windows()
        ]
        head = self.head().start(self.original)
        entry = self.segments[0]
        values = entry.values(self.original)
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
            if number in (0, rounds - 1):  # At once, and at the end.
                for window in windows:
                    window.check_finite("distil")
        progress("distillation", rounds, rounds)
        for window in windows:
            self.leaves |= window.leaves(self.leaves)
        self.seconds["distillation"] = time.perf_counter() - start

    def _after(self, segment: Segment) -> list[list[Any]]:
        """What is left of each batch in the unpruned network after a segment."""
        values = segment.values(self.original)
        found = (segment.run(values, dense) for dense in self.dense)
        return [given or ends for given, ends in found]

    def measured(self, stage: list[Product]) -> dict[Any, Product]:
        """A layer for each input of the layers of a stage, by what its rows are."""
        return {self._key(product): product for product in stage}

    def unpruned(self) -> Iterator[tuple[Product, jax.Array]]:
        """E[x xᵀ] of each layer's inputs in the unpruned network, in their order."""
        states = list(self.batches)
        # Without what comes after the last stage.
        for stage, segment in zip(self.stages, self.segments, strict=False):
            values, products = segment.values(self.original), self.measured(stage)
            sums: dict[Any, jax.Array] = {}
            rows = dict.fromkeys(products, 0)
            for i, state in enumerate(states):
                states[i], given = segment.run(values, state)
                place = dict(zip(segment.inputs, given, strict=True))
                for key, product in products.items():
                    x = place[key[0]]
                    part = summed_moment(product.anywhere(), x, x)
                    sums[key] = sums[key] + part if i else part
                    rows[key] += _positions(product, x)
            for product in stage:
                key = self._key(product)
                moment = sums[key] / rows[key]
                _check_finite(product.path, moment)
                yield product, moment

    def _key(self, product: Product) -> Any:
        return self.program.operand(product), _operand_key(product)

    def _moments(
        self,
        stage: list[Product],
        segment: Segment,
    ) -> dict[Any, tuple[jax.Array, jax.Array]]:
        """Second moments of the inputs of a stage: E[x xᵀ] and E[z xᵀ]."""
        start = time.perf_counter()
        products = self.measured(stage)
        sums: dict[Any, list[jax.Array]] = {}
        largest: dict[Any, jax.Array] = {}
        rows = dict.fromkeys(products, 0)
        new = segment.values(self.leaves)
        old = segment.values(self.original)
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
                parts = [summed_moment(product.anywhere(), own, own)]
                if across:
                    parts.append(summed_moment(product.anywhere(), other, own))
                sums[key] = jax.tree.map(jnp.add, sums[key], parts) if i else parts
                most = jnp.max(jnp.abs(own)).astype(jnp.float32)
                largest[key] = jnp.maximum(largest[key], most) if i else most
                rows[key] += _positions(product, own)
        found = {
            key: (total[0] / rows[key], total[-1] / rows[key])
            for key, total in sums.items()
        }
        # Not the dict, whose keys cannot be sorted.
        jax.block_until_ready(list(found.values()))
        for key, both in found.items():
            _check_finite(products[key].path, *both)
            _check_not_tiny(products[key].path, float(largest[key]))
        self.seconds["inputs"] += time.perf_counter() - start
        return found


def _check_finite(path: str, *moments: jax.Array) -> None:
    if not all(bool(jnp.all(jnp.isfinite(moment))) for moment in moments):
        raise OptionError(
            "inputs",
            f"the inputs of the layer of {path!r}, or their squares, are not finite "
            "for some of the examples; look for NaN or infinity in inputs, infinity in "
            "params, and numbers that leave the range of the network's precision",
        )


def _check_not_tiny(path: str, largest: float) -> None:
    least = 1 / LARGEST
    if 0 < largest < least:
        raise OptionError(
            "inputs",
            f"the inputs of the layer of {path!r} are {largest:.3g} at most; expected "
            f"{least:g} or more, since their squares have to stay in float32: "
            "multiply inputs by a constant",
        )


def _positions(product: Product, inputs: jax.Array) -> int:
    """Rows of a layer's inputs in a batch."""
    shape = jax.eval_shape(partial(input_rows, product), inputs).shape
    return shape[1]
