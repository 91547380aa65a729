"""What the fields of a config may be together, and the step options they amount to."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from woodfisher_jax.curvature.fisher import AUTO, WoodFisher
from woodfisher_jax.curvature.method import Method, Sampled
from woodfisher_jax.methods import applicable, check_together, method_named, resolve
from woodfisher_jax.options import OptionError, fields_of, shown
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.training.config.sections import (
    Config,
    DistributedConfig,
    PruneConfig,
    TrainConfig,
)
from woodfisher_jax.training.config.values import (
    ConfigError,
    build,
    in_config,
)
from woodfisher_jax.training.network.optimizer import check_settings


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a config.

    Args:
        values: As for :func:`~.values.build`.

    Raises:
        ConfigError: If a key is unknown (with the nearest known one), a value has the
            wrong type or is out of range, or values contradict one another.
    """
    config = build(values)
    check(config)
    return config


Require = Callable[[bool, str, str], None]
"""(condition, field, expected value in words): raises unless the condition holds."""


def _requirements(section: Any, where: str) -> Require:
    """Requirements of the fields of a section, which the message names."""

    def require(condition: bool, field: str, expected: str) -> None:
        if not condition:
            value = shown(getattr(section, field))
            message = f"{where}.{field}={value}; expected {expected}"
            raise ConfigError(message)

    return require


def check(config: Config) -> None:
    """Raises if fields contradict one another or a method.

    Raises:
        ConfigError: Naming the field, what came and what was expected.
    """
    _check_distributed(config.distributed, "config.distributed")
    _check_train(config.dense, "config.dense")
    _check_train(config.train, "config.train")
    for name, pruner in config.pruners.items():
        _check_pruner(config, pruner, f"config.{name}")
        _check_schedule(config, pruner, f"config.{name}")
        _requirements(config.prune, "config.prune")(
            pruner.one_shot == config.prune.one_shot,
            "one_shot",
            "the same in all pruners, for there is no training after it",
        )
    for method in config.compare_with:
        try:
            other = compared(config, method)
            for pruner in other.pruners.values():
                _resolved(other, pruner)
        except OptionError as error:
            raise ConfigError(f"config.compare_with: {error}") from error


def _check_distributed(distributed: DistributedConfig, where: str) -> None:
    require = _requirements(distributed, where)
    place, count = distributed.coordinator, distributed.num_processes
    number = distributed.process_id
    require(
        place in (None, "auto") or re.fullmatch(r".+:\d+", place) is not None,
        "coordinator",
        "host:port of process 0, auto, or None for a single process",
    )
    if place is None:
        require(count in (None, 1), "num_processes", "None without a coordinator")
        require(number in (None, 0), "process_id", "None without a coordinator")
    elif place != "auto":
        require(count is not None, "num_processes", "how many processes there are")
        require(number is not None, "process_id", "which process this is, from 0")
    require(
        number is None or number < (count or number + 1),
        "process_id",
        f"0 to {(count or 1) - 1}, with num_processes={count}",
    )


# --------------------------------------------------------------------------- training


def _check_train(train: TrainConfig, where: str) -> None:
    require = _requirements(train, where)
    require(
        train.batch_size % train.accumulation_steps == 0,
        "accumulation_steps",
        f"a divisor of batch_size={train.batch_size}",
    )
    require(
        bool(train.decay_at_epochs) == (train.schedule == "multistep"),
        "decay_at_epochs",
        "epochs, such as (30, 60), with schedule='multistep', and none with any other",
    )
    require(
        train.final_learning_rate <= train.learning_rate,
        "final_learning_rate",
        f"0 to learning_rate={train.learning_rate}",
    )
    try:
        check_settings(train.optimizer.name, train.optimizer.settings)
    except OptionError as error:
        raise in_config(error, f"{where}.optimizer") from error


# ---------------------------------------------------------------------------- pruning


MOST_STEPS = 10_000
"""Pruning steps of a schedule."""

FIELDS = {
    "memory_limit": "memory_limit_gb",
    "sparsity": "target_sparsity",
    "targets": "match",
    "weight_decay": "damping_plus_weight_decay",
}
"""From an option of a step to the field that sets it, where their names differ."""


class StepOptions(NamedTuple):
    """What the pruning steps of a pruner have in common.

    Attributes:
        method: With its options.
        goal: That of the last step.
        compute: Without devices and progress, which the run has.
    """

    method: Method
    goal: Goal
    compute: Compute


def step_options(config: Config, pruner: PruneConfig) -> StepOptions:
    """The method, goal and compute of a pruner's steps.

    Args:
        config: Its run.
        pruner: One of ``config.pruners``.

    Raises:
        OptionError: If an option is out of range, none of the method, or contradicts
            another.
    """
    row = method_named(pruner.method)
    given = {**pruner.options, "num_samples": pruner.num_samples}
    if pruner.auto_damping:
        given["damping"] = AUTO
    if pruner.damping_plus_weight_decay:
        given["weight_decay"] = config.train.weight_decay
    if given.get("hessian", getattr(row, "hessian", None)) == "hutchinson":
        given["probe_seed"] = config.seed
    if not row.needs_samples:
        # They are compared with other methods under one set of options.
        given = applicable(pruner.method, given)
    if pruner.memory_limit_gb is not None:
        given["memory_limit"] = pruner.memory_limit_gb * 1e9
    if "flops_target" not in given:
        given["sparsity"] = pruner.target_sparsity
    return StepOptions(*resolve(pruner.method, Compute(), given))


def _resolved(config: Config, pruner: PruneConfig) -> StepOptions:
    """:func:`step_options` that go with the fields of the section."""
    found = step_options(config, pruner)
    targets = None if pruner.match == "none" else pruner.match
    check_together(
        pruner.method, found.method, found.goal, pruner.mean_samples, targets
    )
    return found


def _check_pruner(config: Config, pruner: PruneConfig, where: str) -> None:
    require = _requirements(pruner, where)
    try:
        method, goal, _ = _resolved(config, pruner)
    except OptionError as error:
        names = FIELDS | ({"damping": "auto_damping"} if pruner.auto_damping else {})
        raise in_config(error, where, names) from error
    own = goal.pattern.sparsity if isinstance(goal.pattern, Pattern) else None
    require(
        own is None or pruner.target_sparsity >= own - 1e-6,
        "target_sparsity",
        f"{own or 0:.6g} with pattern={pruner.value_of('pattern')!r}",
    )
    matches, searches = pruner.match != "none", pruner.damping_search_samples > 0
    require(
        not searches or not method.needs_samples or hasattr(method, "damping"),
        "damping_search_samples",
        f"0 with method={pruner.method!r}, which has no damping",
    )
    require(
        not (matches and goal.recompute),
        "match",
        "none with recompute: each step has rows of its own; for several steps set "
        "repeated_one_shot=True",
    )
    require(
        not (matches and searches),
        "damping_search_samples",
        f"0 with match={pruner.match!r}, whose stages choose it by their rows",
    )
    require(
        not (searches and goal.recompute and pruner.redraw_samples),
        "damping_search_samples",
        "0 with recompute, whose later draws may hold the same examples; or set "
        "redraw_samples=False",
    )
    require(
        pruner.match != "outputs" or pruner.num_examples == pruner.num_samples,
        "match",
        "another value with batch_size above 1, for its rows are one an example",
    )


def _check_schedule(config: Config, pruner: PruneConfig, where: str) -> None:
    require = _requirements(pruner, where)
    require(
        pruner.initial_sparsity <= pruner.target_sparsity,
        "target_sparsity",
        f"at least initial_sparsity={pruner.initial_sparsity}",
    )
    require(pruner.start <= pruner.end, "end", f"at least start={pruner.start}")
    # Before the steps are listed.
    require(
        pruner.one_shot or pruner.end - pruner.start <= MOST_STEPS * pruner.frequency,
        "end",
        f"at most {MOST_STEPS} times frequency={pruner.frequency} after start",
    )
    require(
        pruner.unit == "steps"
        or pruner.one_shot
        or not pruner.stages
        or pruner.stages[-1].time <= config.train.epochs,
        "end",
        f"at most train.epochs={config.train.epochs}",
    )
    require(
        not (pruner.one_shot and pruner.repeated_one_shot),
        "repeated_one_shot",
        "False with one_shot=True, which is a single step",
    )
    require(
        pruner.repeated_one_shot or not pruner.from_dense,
        "from_dense",
        "False without repeated_one_shot=True",
    )
    require(
        not pruner.at_launch or (pruner.initial_sparsity > 0 and not pruner.one_shot),
        "at_launch",
        "False without an initial_sparsity above 0, which is pruned to then, and with "
        "one_shot=True",
    )
    require(
        pruner.loss_path_steps == 0 or pruner.loss_samples != 0,
        "loss_path_steps",
        "0 with loss_samples=0, for there is nothing to measure the loss on",
    )


def compared(config: Config, method: str) -> Config:
    """The same run by another method, without the options that it does not have.

    Args:
        config: The run.
        method: A name of METHODS.

    Raises:
        OptionError: If there is no such method.
    """
    row = method_named(method)
    changes: dict[str, Any] = {"method": method}
    if not row.first_order:
        changes |= {"match": "none", "mean_samples": None}
    if isinstance(row, Sampled):
        fields = fields_of(type(row))
        if not isinstance(row, WoodFisher):
            changes["auto_damping"] = False
        if "damping" not in fields:
            changes["damping_search_samples"] = 0
        if "weight_decay" not in fields:
            changes["damping_plus_weight_decay"] = False

    def by_it(pruner: PruneConfig) -> PruneConfig:
        options = {k: v for k, v in pruner.options.items() if k != "scope"}
        if row.needs_samples:
            options = applicable(method, options)
        return dataclasses.replace(pruner, **changes, options=options)

    first, *others = map(by_it, config.pruners.values())
    return dataclasses.replace(
        config, prune=first, also_prune=tuple(others), compare_with=()
    )
