"""Several layers together, fitted to the outputs that they had unpruned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.tracing.segments import Program, Segment, floats, mixed

ADAM = optax.scale_by_adam()


class Window:
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
        values = [r.of(leaves[r.path]) for r in self._own]
        self._dtypes = [value.dtype for value in values]
        # In float32 whatever they are given in: steps are small.
        self.weights = [jnp.array(value, jnp.float32) for value in values]
        self._masks = [jnp.array(r.of(masks[r.path])) for r in self._own]
        self._sizes = [
            jnp.sqrt(
                jnp.mean(jnp.square(jnp.array(r.of(original[r.path]), jnp.float32)))
            )
            for r in self._own
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
        cast = [w.astype(d) for w, d in zip(weights, self._dtypes, strict=True)]
        known = dict(zip(self._own, cast, strict=True))
        known |= zip(self._others, others, strict=True)
        ends: list[Any] = []
        for segment, own in zip(self._segments, constants, strict=True):
            values = [known[read] for read in segment.reads]
            taken, ends = segment.pure(values, taken, own)
        return taken or ends

    def forward(self, taken: list[Any]) -> list[Any]:
        """What is left of a batch after the layers."""
        return self._run("forward", self._outputs, self.weights, self._fixed, taken)

    def step(self, taken: list[Any], slopes: list[Any], rate: jax.Array) -> list[Any]:
        """Moves the weights by the gradients at what the layers give.

        Returns:
            The gradients at what they take.
        """
        return self._moved("step", lambda _, given: given, taken, slopes, rate)

    def fit(self, taken: list[Any], wanted: list[Any], settings: Layerwise) -> None:
        """Moves the weights so that what the layers give comes near to what is wanted.

        Args:
            taken: What the layers take of each batch.
            wanted: What they should give.
            settings: Number of passes and learning rate.
        """
        total = settings.repair * len(taken)
        for number in range(total):
            batch = number % len(taken)
            rate = jnp.float32(settings.repair_rate * (1 - number / total))
            self._moved("fit", jax.grad(_distance), taken[batch], wanted[batch], rate)

    def _moved(
        self,
        name: str,
        slopes_of: Callable[[list[Any], list[Any]], list[Any]],
        taken: list[Any],
        given: list[Any],
        rate: jax.Array,
    ) -> list[Any]:
        """One step of Adam; ``slopes_of`` (outputs, given) are gradients at outputs."""

        def step(
            weights: list[jax.Array],
            state: Any,
            masks: list[jax.Array],
            sizes: list[jax.Array],
            fixed: Any,
            rate: jax.Array,
            taken: list[Any],
            given: list[Any],
        ) -> tuple[list[jax.Array], Any, list[Any]]:
            def forward(weights: list[jax.Array], floating: list[Any]) -> list[Any]:
                return floats(self._outputs(weights, fixed, mixed(taken, floating)))

            found, pull = jax.vjp(forward, weights, floats(taken))
            own, before = pull(slopes_of(found, floats(given)))
            own = jax.tree.map(lambda g, m: g * m, own, masks)
            moves, state = ADAM.update(own, state)
            weights = [
                w - rate * size * move * mask
                for w, size, move, mask in zip(
                    weights, sizes, moves, masks, strict=True
                )
            ]
            return weights, state, before

        self.weights, self._state, before = self._run(
            name,
            step,
            self.weights,
            self._state,
            self._masks,
            self._sizes,
            self._fixed,
            rate,
            taken,
            given,
        )
        return before


class Head:
    """What follows the last pruned layer, and the distance of the outputs."""

    def __init__(
        self,
        program: Program,
        segments: Sequence[Segment],
        leaves: Mapping[str, Any],
        metric: str,
    ) -> None:
        self._program, self._segments, self._metric = program, segments, metric
        self._values = [segment.values(leaves) for segment in segments]
        self._constants = [segment.constants for segment in segments]
        self._compiled: Callable[..., Any] | None = None

    def _outputs(self, values: Any, constants: Any, taken: list[Any]) -> list[Any]:
        ends = taken
        for segment, own, fixed in zip(self._segments, values, constants, strict=True):
            taken, ends = segment.pure(own, taken, fixed)
        return floats(ends)

    def slopes(self, taken: list[Any], wanted: list[Any]) -> list[Any]:
        """The gradient of the outputs' distance at what the head takes."""

        def distance(
            floating: list[Any], values: Any, constants: Any, taken: Any, wanted: Any
        ) -> jax.Array:
            found = self._outputs(values, constants, mixed(taken, floating))
            aims = self._outputs(values, constants, wanted)
            if self._metric == "identity":
                return _distance(found, aims)
            logs = (
                [jax.nn.log_softmax(z.astype(jnp.float32)) for z in ends]
                for ends in (found, aims)
            )
            parts = [
                jnp.mean(optax.losses.kl_divergence_with_log_targets(log_q, log_p))
                for log_q, log_p in zip(*logs, strict=True)
            ]
            return jnp.mean(jnp.stack(parts))

        f = jax.grad(distance)
        arguments = (floats(taken), self._values, self._constants, taken, wanted)
        self._compiled = self._compiled or self._program.compiled(f, *arguments)
        found: list[Any] = self._compiled(*arguments)
        return found


def _distance(found: list[Any], wanted: list[Any]) -> jax.Array:
    """Relative squared distance of arrays from others, the mean over them."""
    pairs = zip(found, wanted, strict=True)
    wide = [(z.astype(jnp.float32), aim.astype(jnp.float32)) for z, aim in pairs]
    parts = [
        jnp.sum(jnp.square(z - aim)) / jnp.maximum(jnp.sum(aim * aim), 1e-30)
        for z, aim in wide
    ]
    return jnp.mean(jnp.stack(parts))
