"""What the fields of a config may be, alone and together."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable
from typing import Any

from woodfisher_jax.curvature.hessian import ESTIMATORS
from woodfisher_jax.equations.fisher import SOLVERS
from woodfisher_jax.methods import (
    METHODS,
    OPTIONS,
    UPDATES,
    applicable,
    check_options,
    method_named,
    scope_of,
)
from woodfisher_jax.recompute import SCHEDULES, degree_of
from woodfisher_jax.rows.projections import METRICS
from woodfisher_jax.selection.patterns import check_goal, parse
from woodfisher_jax.settings import STORE_DTYPES, STORES
from woodfisher_jax.stages.matching import MATCHES
from woodfisher_jax.tracing.macs import RESCALINGS
from woodfisher_jax.training.optimizer import LR_SCHEDULES, optimizer_settings
from woodfisher_jax.training.sections import (
    Config,
    DistributedConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)

DTYPES = ("float32", "bfloat16")
"""What training may compute in."""


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field."""


def check_key(key: str, known: typing.Iterable[str], where: str) -> None:
    """Raises with the nearest known key unless the key is known."""
    known = list(known)
    if key in known:
        return
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {where}.{close[0]}?" if close else f"; there are {known}"
    raise ConfigError(f"{where}.{key} does not exist{hint}")


def _require(condition: bool, where: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config.{where}={value!r}; expected {expected}")


def _check_choice(value: Any, where: str, choices: typing.Iterable[str]) -> None:
    """Raises with the nearest of the choices unless the value is one of them."""
    choices = list(choices)
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    _require(value in choices, where, value, f"one of {choices}{hint}")


def check(config: Config) -> None:
    """Raises at the first field that a run could not be started with.

    Raises:
        ConfigError: Naming it, what came and what was expected.
    """
    _require(config.seed >= 0, "seed", config.seed, "0 or more")
    for name in ("checkpoint_every_epochs", "eval_batch_size"):
        value = getattr(config, name)
        _require(value >= 1, name, value, "1 or more")
    for method in config.compare_with:
        _named("compare_with", method_named, method)
        for pruner in compared(config, method).pruners.values():
            _named("compare_with", check_options, method, _method_options(pruner))
    _check_distributed(config.distributed)
    _check_train(config.dense, "dense")
    _check_train(config.train, "train")
    for name, pruner in config.pruners.items():
        _check_prune(pruner, name)
        stages = _named(name, lambda pruner=pruner: pruner.stages)
        if pruner.unit == "epochs" and not pruner.one_shot and stages:
            _require(
                stages[-1].time <= config.train.epochs,
                f"{name}.end",
                pruner.end,
                f"at most train.epochs={config.train.epochs}",
            )
    if config.also_prune:
        kinds = {pruner.one_shot for pruner in config.pruners.values()}
        _require(
            len(kinds) == 1,
            "prune.one_shot",
            config.prune.one_shot,
            "the same in all pruners, for there is no training after it",
        )


def _check_distributed(distributed: DistributedConfig) -> None:
    def require(condition: bool, field: str, expected: str) -> None:
        value = getattr(distributed, field)
        _require(condition, f"distributed.{field}", value, expected)

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
    require(count is None or count >= 1, "num_processes", "1 or more")
    require(
        number is None or 0 <= number < (count or number + 1),
        "process_id",
        f"0 to {(count or 1) - 1}, with num_processes={count}",
    )
    for field in ("start_timeout_seconds", "heartbeat_timeout_seconds"):
        require(getattr(distributed, field) >= 1, field, "1 or more")


def _named(where: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls, and gives what is refused the name of the field."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ConfigError(f"config.{where}: {error}") from error


def _check_fields(
    section: Any, name: str, fields: tuple[str, ...], least: float, expected: str
) -> None:
    """Each field is None or not below the least value."""
    for field in fields:
        value = getattr(section, field)
        _require(value is None or value >= least, f"{name}.{field}", value, expected)


def _check_share(value: float, where: str) -> None:
    _require(0 <= value < 1, where, value, "a number in [0, 1)")


def _check_train(train: TrainConfig, name: str) -> None:
    for field in ("learning_rate", "decay_rate"):
        value = getattr(train, field)
        _require(value > 0, f"{name}.{field}", value, "a positive number")
    counts = ("batch_size", "decay_every_epochs", "accumulation_steps")
    _check_fields(train, name, counts, 1, "1 or more")
    amounts = (
        "epochs",
        "weight_decay",
        "decay_start_epoch",
        "decay_end_epoch",
        "warmup_epochs",
    )
    _check_fields(train, name, amounts, 0, "0 or more")
    _require(
        train.batch_size % train.accumulation_steps == 0,
        f"{name}.accumulation_steps",
        train.accumulation_steps,
        f"a divisor of batch_size={train.batch_size}",
    )
    _check_choice(train.dtype, f"{name}.dtype", DTYPES)
    _check_share(train.average_decay, f"{name}.average_decay")
    _check_choice(train.schedule, f"{name}.schedule", LR_SCHEDULES)
    milestones = train.decay_at_epochs
    _require(
        all(type(epoch) is int and epoch >= 0 for epoch in milestones),
        f"{name}.decay_at_epochs",
        milestones,
        "epochs, such as (30, 60)",
    )
    _require(
        bool(milestones) == (train.schedule == "multistep"),
        f"{name}.decay_at_epochs",
        milestones,
        "epochs with schedule='multistep', and none with any other",
    )
    _require(
        0 <= train.final_learning_rate <= train.learning_rate,
        f"{name}.final_learning_rate",
        train.final_learning_rate,
        f"0 to learning_rate={train.learning_rate}",
    )
    _check_share(train.label_smoothing, f"{name}.label_smoothing")
    _check_optimizer(train.optimizer, f"{name}.optimizer")


def _check_optimizer(optimizer: OptimizerConfig, name: str) -> None:
    known = _named(name, optimizer_settings, optimizer.name)
    for key, value in optimizer.settings.items():
        check_key(key, known, f"config.{name}")
        _require(
            value is None or isinstance(value, (bool, int, float, str)),
            f"{name}.{key}",
            value,
            "a number, True, False or None",
        )
        if key in ("momentum", "b1", "b2", "decay") and value is not None:
            _check_share(value, f"{name}.{key}")


def _method_options(prune: PruneConfig) -> dict[str, Any]:
    """What makes sense for some methods only."""
    return {name: getattr(prune, name) for name in OPTIONS if hasattr(prune, name)}


def compared(config: Config, method: str) -> Config:
    """The same run by another method; options that it does not have are left out."""
    first, *others = (
        dataclasses.replace(
            pruner,
            method=method,
            scope=None,
            **applicable(method, _method_options(pruner)),
        )
        for pruner in config.pruners.values()
    )
    return dataclasses.replace(
        config, prune=first, also_prune=tuple(others), compare_with=()
    )


def _check_prune(prune: PruneConfig, name: str) -> None:
    def require(condition: bool, field: str, expected: str) -> None:
        _require(condition, f"{name}.{field}", getattr(prune, field), expected)

    _check_choice(prune.method, f"{name}.method", METHODS)
    _named(name, scope_of, prune.method, prune.scope)
    for field in ("target_sparsity", "initial_sparsity"):
        value = getattr(prune, field)
        require(0 <= value < 1, field, "a fraction in [0, 1), such as 0.9")
    require(
        prune.initial_sparsity <= prune.target_sparsity,
        "target_sparsity",
        f"at least initial_sparsity={prune.initial_sparsity}",
    )
    require(prune.unit in ("epochs", "steps"), "unit", "epochs or steps")
    counts = (
        "num_samples",
        "batch_size",
        "microbatch_size",
        "block_size",
        "mean_samples",
        "num_probes",
    )
    _check_fields(prune, name, counts, 1, "1 or more")
    amounts = (
        "batch_norm_samples",
        "damping_search_samples",
        "loss_samples",
        "loss_path_steps",
        "recompute",
        "swaps",
        "flops_power",
    )
    _check_fields(prune, name, amounts, 0, "0 or more")
    require(
        0 < prune.damping < float("inf"), "damping", "a positive number, such as 1e-5"
    )
    require(
        prune.match == "none" or prune.recompute == 0,
        "match",
        "none with recompute: each step has rows of its own; for several steps set "
        "repeated_one_shot=True",
    )
    require(
        prune.match == "none" or prune.damping_search_samples == 0,
        "damping_search_samples",
        f"0 with match={prune.match!r}, whose stages choose it by their rows",
    )
    require(
        not (prune.damping_search_samples and prune.recompute and prune.redraw_samples),
        "damping_search_samples",
        "0 with recompute, whose later draws may hold the same examples; or set "
        "redraw_samples=False",
    )
    require(
        prune.match != "outputs" or prune.batch_size == 1,
        "batch_size",
        "1 with match='outputs', whose rows are one an example",
    )
    _check_share(prune.label_smoothing, f"{name}.label_smoothing")
    for field, choices in (
        ("solver", ["auto", *SOLVERS]),
        ("store", ["auto", *STORES]),
        ("store_dtype", list(STORE_DTYPES)),
        ("hessian", list(ESTIMATORS)),
        ("update", list(UPDATES)),
        ("match", list(MATCHES)),
        ("match_metric", list(METRICS)),
        ("flops_normalize", list(RESCALINGS)),
        ("recompute_schedule", list(SCHEDULES)),
    ):
        _check_choice(getattr(prune, field), f"{name}.{field}", choices)
    for field in ("memory_limit_gb", "flops_target", "normalize_update"):
        value = getattr(prune, field)
        require(value is None or value > 0, field, "a positive number or None")
    _named(name, check_options, prune.method, _method_options(prune))
    _named(name, degree_of, prune.recompute_schedule, prune.recompute_degree)
    _named(f"{name}.pattern", _check_pattern, prune)
    _check_steps(prune, require)


def _check_pattern(prune: PruneConfig) -> None:
    """A pattern goes with the goal, and a network obeys it in the end."""
    pattern = parse(prune.pattern)
    if pattern is None:
        return
    target, own = prune.target_sparsity, pattern.sparsity
    check_goal(
        pattern,
        target,
        scope_of(prune.method, prune.scope),
        prune.flops_target,
        prune.flops_power,
    )
    if own is not None and target < own - 1e-6:
        raise ValueError(
            f"target_sparsity={target} with pattern={prune.pattern!r}; expected "
            f"{own:.6g}"
        )


def _check_steps(prune: PruneConfig, require: Callable[..., None]) -> None:
    """The options of the schedule do not contradict one another."""
    require(
        not (prune.one_shot and prune.repeated_one_shot),
        "repeated_one_shot",
        "False with one_shot=True, which is a single step",
    )
    require(
        prune.repeated_one_shot or not prune.from_dense,
        "from_dense",
        "False without repeated_one_shot=True",
    )
    require(
        not prune.at_launch or (prune.initial_sparsity > 0 and not prune.one_shot),
        "at_launch",
        "False without an initial_sparsity above 0, which is pruned to then, and with "
        "one_shot=True",
    )
    require(
        prune.loss_path_steps == 0 or prune.loss_samples != 0,
        "loss_path_steps",
        "0 with loss_samples=0, for there is nothing to measure the loss on",
    )
