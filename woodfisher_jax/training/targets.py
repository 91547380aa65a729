"""The programs of a run, compiled for devices that are not there.

What each takes of a device, before anybody has one: the compiler of the target says
what does not compile, and how much memory the rest needs.
"""

import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.curvature import checked
from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.curvature.method import Sampled
from woodfisher_jax.progress import Callback
from woodfisher_jax.rows.gradients import trace_rows
from woodfisher_jax.rows.memory_plan import Storage
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import AXIS, num_devices, placed
from woodfisher_jax.rows.targets import Target, compiled
from woodfisher_jax.selection import scope
from woodfisher_jax.training import distributed, pruners
from woodfisher_jax.training.config import Config, ConfigError, step_options
from woodfisher_jax.training.evaluate import batch_sums, even_size
from woodfisher_jax.training.network.objective import frozen_loss
from woodfisher_jax.training.network.train_step import TrainState, averaging, train_step
from woodfisher_jax.training.plan import Phase, Plan
from woodfisher_jax.training.pruning_step import dense_copy
from woodfisher_jax.training.start import outline
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.samples import Examples

logger = logging.getLogger(__name__)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


class NotForTargetError(RuntimeError):
    """A program does not compile for a target, or does not fit in its memory."""


class Lowering(NamedTuple):
    """A program of a run that is not compiled yet.

    Attributes:
        name: What it does.
        lower: Returns it as ``jax.stages.Lowered``.
        seconds: Of the processor, where it has been compiled already, which JAX
            remembers.
    """

    name: str
    lower: Callable[[], Any]
    seconds: float = 0.0


class Report(NamedTuple):
    """A program as the compiler of a target made it; bytes and FLOP of one device.

    Attributes:
        name: What it does.
        arguments: Bytes that come in.
        results: Bytes that go out, those in memory of arguments among them.
        aliased: Bytes of results in memory of arguments.
        temporaries: Bytes while it runs.
        flops: As the compiler counts them; None where it does not, as for CUDA.
        collectives: How many of each kind.
        seconds: Of the processor, to lower and to compile.
        failure: Why it does not compile, or "".
    """

    name: str
    arguments: int = 0
    results: int = 0
    aliased: int = 0
    temporaries: int = 0
    flops: float | None = None
    collectives: dict[str, int] = {}  # noqa: RUF012 -- read only
    seconds: float = 0.0
    failure: str = ""

    @property
    def peak(self) -> int:
        """Bytes that it takes at once."""
        return self.arguments + self.results - self.aliased + self.temporaries

    def __str__(self) -> str:
        """The outcome in one line."""
        if self.failure:
            return f"{self.name} does not compile: {self.failure}"
        return (
            f"{self.name} takes {self.peak / 1e9:.3g} GB of a device; compiled in "
            f"{self.seconds:.1f} s of the processor"
        )


def compile_for(
    config: Config, target: Target, progress: Callback
) -> tuple[dict[str, Needs], list[Report]]:
    """Plans a run on a target and compiles its programs; nothing is read or run.

    Each program is logged as soon as it is compiled.

    Args:
        config: Of the run; what it starts from is not read.
        target: Its devices.
        progress: Called with (label, done, total).

    Returns:
        The plan of a step of each pruner that keeps gradients, and the programs.

    Raises:
        ConfigError: If the run would be refused on such devices.
        MemoryLimitError: If a pruning step does not fit.
    """
    plan, (variables, masks) = outline(config, distributed.in_one_row(target.devices))
    found = list(_training(plan, variables, masks))
    needs: dict[str, Needs] = {}
    for name in config.pruners:
        progress(f"plan of {name}", 0, 1)
        own, programs = _pruning(plan, name, variables, masks)
        needs |= own
        found += programs
    return needs, reports(found, plan.mesh, progress)


def reports(
    programs: Sequence[Lowering], mesh: Mesh | None, progress: Callback
) -> list[Report]:
    """Compiles programs for devices, and logs each as soon as it is compiled."""
    found = []
    for number, program in enumerate(programs):
        progress(program.name, number, len(programs))
        found.append(report(program, mesh))
        # Each may take minutes, and a table comes after the last.
        logger.info("%s", found[-1])
    return found


def report(program: Lowering, mesh: Mesh | None) -> Report:
    """Compiles a program for devices and says what it takes."""
    started = time.process_time() - program.seconds
    try:
        found = compiled(program.lower(), mesh)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        seconds = time.process_time() - started
        line = " ".join(str(error).split())
        return Report(program.name, seconds=seconds, failure=f"{line:.300}")
    seconds, memory = time.process_time() - started, found.memory_analysis()
    kinds = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", found.as_text())
    return Report(
        name=program.name,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=(found.cost_analysis() or {}).get("flops"),
        collectives=dict(Counter(kinds)),
        seconds=seconds,
    )


def check(reports: list[Report], target: Target) -> None:
    """Refuses a target for which some program was not made.

    Args:
        reports: Of all programs.
        target: Which they are for.

    Raises:
        NotForTargetError: Naming the programs, and why.
    """
    lines = [str(one) for one in reports if one.failure]
    lines += [
        f"{one.name} takes {one.peak / 1e9:.3g} GB of a device, which has "
        f"{target.kind.memory / 1e9:.3g} GB; take more devices, a smaller batch_size "
        "or more accumulation_steps"
        for one in reports
        if one.peak > target.kind.memory
    ]
    if lines:
        raise NotForTargetError(f"target={target.name!r}: " + "; ".join(lines))


# ---------------------------------------------------------------------- the programs


def _shapes(tree: Any, plan: Plan, *spec: str) -> Any:
    """Arrays as shapes on the devices of a plan: everywhere, or spread by rows."""
    sharding = placed(plan.mesh, *spec)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )


def _array(plan: Plan, shape: tuple[int, ...], dtype: Any, *spec: str) -> Any:
    return _shapes(jax.ShapeDtypeStruct(shape, dtype), plan, *spec)


def _batch(plan: Plan, size: int) -> dict[str, Any]:
    shape = (size, *plan.dataset.image_shape)
    return {
        "image": _array(plan, shape, jnp.float32, AXIS),
        "label": _array(plan, (size,), jnp.int32, AXIS),
    }


def _training(plan: Plan, variables: Any, masks: Any) -> Iterator[Lowering]:
    """The steps of both phases of training, and the evaluation."""
    for name, phase in (("dense", plan.dense), ("train", plan.train)):
        if phase.settings.epochs:
            yield Lowering(
                f"step of {name}",
                functools.partial(_train_step, plan, phase, variables, masks),
            )
    size = even_size(plan.config.eval_batch_size, plan.dataset, num_devices(plan.mesh))
    batch = _batch(plan, size)
    batch["weight"] = _array(plan, (size,), jnp.float32, AXIS)
    yield Lowering(
        "evaluation",
        lambda: batch_sums.lower(plan.model, _shapes(variables, plan), batch),
    )


def _train_step(plan: Plan, phase: Phase, variables: Any, masks: Any) -> Any:
    settings = phase.settings

    def start(variables: Any, masks: Any) -> TrainState:
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        state = TrainState(params, stats, masks, phase.tx.init(params))
        if any(pruner.keeps_dense for pruner in plan.config.pruners.values()):
            state = state._replace(dense=dense_copy(state))
        return averaging(state, settings.average_decay)

    state = _shapes(jax.eval_shape(start, variables, masks), plan)
    return train_step.lower(
        state,
        _batch(plan, settings.batch_size),
        _array(plan, (num_devices(plan.mesh),), jnp.float32, AXIS),
        model=phase.model,
        tx=phase.tx,
        label_smoothing=settings.label_smoothing,
        accumulation_steps=settings.accumulation_steps,
        average_decay=settings.average_decay,
    )


def _pruning(
    plan: Plan, name: str, variables: Any, masks: Any
) -> tuple[dict[str, Needs], list[Lowering]]:
    """The plan of a pruner's step, where it keeps gradients, and its programs."""
    pruner = plan.config.pruners[name]
    paths = pruners.selected_paths(variables["params"], pruner, plan.axes)
    order = blocks.flat_order({path: masks[path] for path in paths}, plan.axes)
    method, goal, compute = step_options(plan.config, pruner)
    programs, needs = [], {}
    if isinstance(method, Sampled):
        shapes = _shapes(variables, plan)
        one = {
            "image": np.zeros((1, *plan.dataset.image_shape), np.float32),
            "label": np.zeros(1, np.int32),
        }
        problem = Problem(
            frozen_loss(
                plan.model, shapes.get("batch_stats", {}), pruner.label_smoothing
            ),
            shapes["params"],
            {path: masks[path] for path in paths},
            Examples(pruner.num_examples, lambda: iter([one])),
            order,
            pruner.num_samples,
            method.batch_size,
            compute.replace(mesh=plan.mesh),
        )
        try:
            if isinstance(method, WoodFisher):
                started = time.process_time()
                needs[name], storage = method.planned(problem)
                seconds = time.process_time() - started
                length = needs[name].microbatch_size
                rows = functools.partial(_rows, problem, length)
                programs.append(Lowering("gradients", rows, seconds))
                programs += _curvature(plan, method, problem, storage)
            else:
                needs[name] = method.plan(problem)
        except ValueError as error:
            raise ConfigError(f"config.{name}: {error}") from error
        except jax.errors.JaxRuntimeError as error:
            # Without the plan what follows the gradients is not known.
            again = functools.partial(_raise, error)
            programs.append(Lowering("gradients", again))
    if goal.flops_target is None and goal.pattern is None:
        assert goal.scope is not None
        bounds = scope.bounds_of(order, goal.scope)
        vectors = (
            _array(plan, (order.size,), jnp.float32),
            _array(plan, (order.size,), bool),
        )
        numbers = (0,) * (len(bounds) - 1)
        programs.append(
            Lowering(
                "selection",
                lambda: scope.keep.lower(*vectors, numbers, bounds, order.offsets),
            )
        )
    if len(plan.config.pruners) > 1:
        programs = [one._replace(name=f"{name}: {one.name}") for one in programs]
    return needs, programs


def _raise(error: Exception) -> Any:
    raise error


def _rows(problem: Problem, length: int) -> Any:
    return trace_rows(problem, length).lower()


def _curvature(
    plan: Plan, method: WoodFisher, problem: Problem, storage: Storage
) -> Iterator[Lowering]:
    """The diagonal and the update of a tile of each shape."""
    number, compute = problem.num_samples, problem.compute
    devices = num_devices(plan.mesh)
    tiles = dict.fromkeys((t.num_blocks, t.width) for t in storage.whole.tiles)
    for each, width in tiles:
        total, solver = devices * each, compute.solver_for(number, width)
        side = number if solver == "sample_space" else width
        factor = _array(plan, (total, side, side), np.float64, AXIS)
        tasks: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "diagonal": (checked.diagonal_alone, ())
        }
        if storage.keep_factors:
            tasks["diagonal"] = (checked.diagonal, ())
        weights = _array(plan, (total, width), jnp.float32, AXIS)
        targets = _array(plan, (total, number), jnp.float32, AXIS)
        known = (factor,) if storage.keep_factors else ()
        if method.first_order:
            tasks["Newton step"] = (checked.newton, (targets, *known))
        if method.moves and method.update == "joint":
            kept = _array(plan, (total, width), bool, AXIS)
            tasks["update"] = (checked.joint, (weights, kept, targets))
        elif method.moves:
            tasks["update"] = (checked.product, (weights, *known))
        for label, (task, others) in tasks.items():
            yield Lowering(
                f"{label}, {total} blocks of {width}",
                functools.partial(
                    checked.run_blocks.lower,
                    task,
                    _array(plan, (total, number, width), compute.store_dtype, AXIS),
                    others,
                    _array(plan, (), jnp.float32),
                    solver,
                    plan.mesh,
                ),
            )
