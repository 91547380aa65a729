"""Several layers together, fitted to the outputs that they had unpruned."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.options import OptionError
from woodfisher_jax.tracing.convolutions import fast_weight_gradients
from woodfisher_jax.tracing.segments import Compiled, Program, Segment, floats, mixed

ADAM = optax.scale_by_adam()


class Window:
    """Some layers one after another, whose weights are fitted together.

    Attributes:
        segments: These layers.
        weights: Fitted so far, once :meth:`start` has been called.
    """

    def __init__(
        self, program: Program, segments: Sequence[Segment], paths: Collection[str]
    ) -> None:
        self._program, self.segments = program, segments
        self._reads = {
            read: shape
            for segment in segments
            for read, shape in zip(segment.reads, segment.shapes[0], strict=True)
        }
        self._own = [read for read in self._reads if read.path in paths]
        self._others = [read for read in self._reads if read.path not in paths]
        self._compiled: dict[str, Compiled] = {}

    def start(
        self,
        masks: Mapping[str, np.ndarray],
        leaves: Mapping[str, Any],
        original: Mapping[str, Any],
    ) -> Self:
        """Takes the weights to start from, and the sizes of the unpruned ones."""
        values = [r.of(leaves[r.path]) for r in self._own]
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
            [segment.constants for segment in self.segments],
        )
        self._state = ADAM.init(self.weights)
        return self

    def shapes(self) -> tuple[Any, ...]:
        """Of what a window that has started holds: the first arguments of a step."""
        own = [self._reads[read].shape for read in self._own]
        weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in own]
        masks = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in own]
        sizes = [jax.ShapeDtypeStruct((), jnp.float32) for _ in own]
        constants = [segment.constants for segment in self.segments]
        fixed = [self._reads[read] for read in self._others], constants
        return weights, jax.eval_shape(ADAM.init, weights), masks, sizes, fixed

    def compiled(self, name: str, *arguments: Any) -> Compiled:
        """A function of the window for arguments or their shapes.

        Args:
            name: "forward" (what the layers give), "fit" or "step" (new weights).
            *arguments: Of "forward" the weights, what is fixed and what the layers
                take; of the others all that :meth:`shapes` has, the rate, what the
                layers take, and what they should give, or the gradients there.
        """
        functions: dict[str, Callable[..., Any]] = {
            "forward": self._outputs,
            "fit": self._moved_by(jax.grad(_distance)),
            "step": self._moved_by(lambda _, given: given),
        }
        return self._program.compiled(functions[name], *arguments)

    def _run(self, name: str, *arguments: Any) -> Any:
        """Calls a function, which is traced once for the window."""
        if name not in self._compiled:
            self._compiled[name] = self.compiled(name, *arguments)
        return self._compiled[name](*arguments)

    def check_finite(self, option: str) -> None:
        """Raises if a fitted weight is not finite.

        Args:
            option: "repair" or "distil", by which it was fitted.

        Raises:
            OptionError: With the weight's path.
        """
        for read, value in zip(self._own, self.weights, strict=True):
            if not bool(jnp.all(jnp.isfinite(value))):
                raise OptionError(
                    option,
                    f"{option} has given weights of {read.path!r} that are not finite: "
                    "the gradients of net_fn are not for some of the examples, as that "
                    f"of a square root or a norm at zero, or {option}_rate is too "
                    "large; look for NaN in the outputs, write such functions with "
                    "jnp.where inside, leave these examples out, lower "
                    f"{option}_rate, or prune with {option}=0",
                )

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
        known = {
            read: weight.astype(self._reads[read].dtype)
            for read, weight in zip(self._own, weights, strict=True)
        }
        known |= zip(self._others, others, strict=True)
        ends: list[Any] = []
        for segment, own in zip(self.segments, constants, strict=True):
            values = [known[read] for read in segment.reads]
            taken, ends = segment.pure(values, taken, own)
        return taken or ends

    def forward(self, taken: list[Any]) -> list[Any]:
        """What is left of a batch after the layers."""
        found: list[Any] = self._run("forward", self.weights, self._fixed, taken)
        return found

    def step(self, taken: list[Any], slopes: list[Any], rate: jax.Array) -> list[Any]:
        """Moves the weights by the gradients at what the layers give.

        Returns:
            The gradients at what they take.
        """
        return self._moved("step", taken, slopes, rate)

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
            self._moved("fit", taken[batch], wanted[batch], rate)

    def _moved(
        self, name: str, taken: list[Any], given: list[Any], rate: jax.Array
    ) -> list[Any]:
        held = self.weights, self._state, self._masks, self._sizes, self._fixed
        self.weights, self._state, before = self._run(name, *held, rate, taken, given)
        return before

    def _moved_by(
        self, slopes_of: Callable[[list[Any], list[Any]], list[Any]]
    ) -> Callable[..., tuple[list[jax.Array], Any, list[Any]]]:
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

            with fast_weight_gradients():
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

        return step


class Head:
    """What follows the last pruned layer, and the distance of the outputs."""

    def __init__(
        self, program: Program, segments: Sequence[Segment], metric: str
    ) -> None:
        self._program, self._segments, self._metric = program, segments, metric
        self._constants = [segment.constants for segment in segments]
        self._compiled: Compiled | None = None

    def start(self, leaves: Mapping[str, Any]) -> Self:
        """Takes the parameters that it uses, from all by path."""
        self._values = [segment.values(leaves) for segment in self._segments]
        return self

    def arguments(self, values: Any, taken: list[Any], wanted: list[Any]) -> Any:
        """What :meth:`compiled` and its result take, as arrays or shapes.

        Args:
            values: Of the parameters, by segment.
            taken: What the head takes.
            wanted: What it takes in the unpruned network.
        """
        return floats(taken), values, self._constants, taken, wanted

    def _outputs(self, values: Any, constants: Any, taken: list[Any]) -> list[Any]:
        ends = taken
        for segment, own, fixed in zip(self._segments, values, constants, strict=True):
            taken, ends = segment.pure(own, taken, fixed)
        return floats(ends)

    def compiled(self, *arguments: Any) -> Compiled:
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

        return self._program.compiled(jax.grad(distance), *arguments)

    def slopes(self, taken: list[Any], wanted: list[Any]) -> list[Any]:
        """The gradient of the outputs' distance at what the head takes."""
        arguments = self.arguments(self._values, taken, wanted)
        self._compiled = self._compiled or self.compiled(*arguments)
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
