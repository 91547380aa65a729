"""The command line: the only file with flags.

    python -m woodfisher_jax.main --config=configs/digits.py

Any field of the config is overridden by ``--config.<field>=<value>``.
"""

import ast
import dataclasses
import functools
import logging
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import absl.logging
import ml_collections
from absl import app, flags
from ml_collections import config_dict, config_flags

from woodfisher_jax import config as config_
from woodfisher_jax import distributed, plots, report
from woodfisher_jax.config import Config, ConfigError
from woodfisher_jax.data import DataMissingError
from woodfisher_jax.plan import prepare
from woodfisher_jax.preemption import Stopped
from woodfisher_jax.progress import progress_bar
from woodfisher_jax.pruning.budget import MemoryLimitError
from woodfisher_jax.pruning.curvature import CurvatureError
from woodfisher_jax.pruning_step import forecast
from woodfisher_jax.train import DivergedError, run
from woodfisher_jax.workdir import LOG_FORMAT

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; started again with the same folder, a run resumes. "
    "Default runs/<config name>-<time>.",
)

PLAN = flags.DEFINE_bool(
    "plan",
    False,
    "Print what a pruning step needs (memory, traffic, arithmetic) and run nothing.",
)

USAGE = """Trains, prunes and retrains a network.

    python -m woodfisher_jax.main --config=configs/digits.py [--workdir=FOLDER]
        [--config.prune.target_sparsity=0.95] [--config.seed=1] ... [--plan]
"""


def defaults(section: type = Config) -> ml_collections.ConfigDict:
    """The dataclass defaults as a ConfigDict; an absent value knows its type."""
    values = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        annotation = config_.field_types(section)[field.name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            values[field.name] = defaults(annotation)
        elif field.name in ("settings", "also_prune"):
            continue  # Keys of their own, where a config file has them.
        else:
            expected, _ = config_.value_type(annotation)
            default = field.default
            values[field.name] = (
                config_dict.placeholder(expected) if default is None else default
            )
    return values


def further_pruner() -> ml_collections.ConfigDict:
    """The fields of ``prune_2`` and the like; what stays None is as in ``prune``."""
    values = ml_collections.ConfigDict()
    for name, annotation in config_.field_types(config_.PruneConfig).items():
        values[name] = config_dict.placeholder(config_.value_type(annotation)[0])
    return values


def load_config(path: str) -> ml_collections.ConfigDict:
    """Reads a config file over the defaults.

    Args:
        path: A Python file with ``get_config()``; ``file.py:word`` calls
            ``get_config("word")``.

    Returns:
        A locked ConfigDict with every field.

    Raises:
        ConfigError: If there is no such file or it names fields that do not exist.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise ConfigError(
            f"--config={path}: there is no such file (from {Path.cwd()}); try "
            "--config=configs/digits.py"
        )
    get_config = runpy.run_path(name).get("get_config")
    if get_config is None:
        raise ConfigError(f"--config={path}: the file must define get_config()")
    try:
        values = get_config(argument) if argument else get_config()
    except ValueError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    merged = defaults()
    for key in filter(config_.is_pruner, values):
        merged[key] = further_pruner()
    _merge(merged, values, "config")
    return merged.lock()


def _merge(target: ml_collections.ConfigDict, values: Mapping, where: str) -> None:
    for key, value in values.items():
        if where not in config_.OPEN_GROUPS:
            config_.check_key(key, target, where)
        if isinstance(target.get(key), ml_collections.ConfigDict):
            _merge(target[key], value, f"{where}.{key}")
        elif key not in target:
            target[key] = value
        else:
            try:
                target[key] = value
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{where}.{key}={value!r}: {error}") from error


def add_settings(arguments: Sequence[str], values: ml_collections.ConfigDict) -> None:
    """Makes room for settings that overrides add to a model or an optimizer."""
    for argument in arguments:
        name, given, text = argument.lstrip("-").partition("=")
        where, _, key = name.rpartition(".")
        if not given or where not in config_.OPEN_GROUPS:
            continue
        group = functools.reduce(lambda v, k: v[k], where.split(".")[1:], values)
        if key not in group:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            with group.unlocked():
                group[key] = value


def check_overrides(arguments: Sequence[str], known: ml_collections.ConfigDict) -> None:
    """Raises for an override of a field that does not exist, with the nearest one."""
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        level, where = known, "config"
        for key in name.split(".")[1:]:
            if not isinstance(level, ml_collections.ConfigDict):
                raise ConfigError(f"{where} is no group of fields, so {name} is none")
            config_.check_key(key, level, where)
            level, where = level[key], f"{where}.{key}"


def parse(argv: Sequence[str]) -> list[str]:
    """Defines the config's flags from its file and parses the command line."""
    paths = [a.partition("=")[2] for a in argv if _is_config_flag(a)]
    rest = [a for a in argv if not _is_config_flag(a)]
    try:
        if len(paths) == 1 and paths[0]:
            values = load_config(paths[0])
            add_settings(rest[1:], values)
            check_overrides(rest[1:], values)
            config_flags.DEFINE_config_dict("config", values, sys_argv=rest)
            flags.DEFINE_string("config_file", paths[0], "The --config given.")
        elif not any(a.lstrip("-").startswith("help") for a in rest):
            raise ConfigError("give one config: --config=configs/digits.py")
        return flags.FLAGS(rest)
    except (ConfigError, flags.Error) as error:
        _fail(error)


def _is_config_flag(argument: str) -> bool:
    return argument.lstrip("-").startswith("config=") and argument.startswith("-")


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _default_workdir(config_file: str) -> Path:
    name = Path(config_file.partition(":")[0]).stem
    # The clocks of processes differ.
    when = distributed.of_first(time.strftime("%Y%m%d-%H%M%S"))
    return Path("runs") / f"{name}-{when}"


def _log_to_console() -> None:
    """Sends this package's messages to the standard error, and quietens the others."""
    if not any(argument.startswith("--verbosity") for argument in sys.argv):
        # Orbax reports every file it writes; --verbosity=0 shows that.
        absl.logging.set_verbosity(absl.logging.WARNING)
    logger = logging.getLogger("woodfisher_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(LOG_FORMAT)
    logger.addHandler(handler)


def print_plan(config: Config) -> None:
    """Prints what a pruning step of the run needs; nothing is run or written."""
    with progress_bar() as progress:
        plan, given = prepare(config, progress)
        needs = forecast(plan, *given)
    if not distributed.is_first():
        return
    for name, pruner in config.pruners.items():
        if name in needs:
            report.print_needs(needs[name])
        else:
            print(f"{name}: {pruner.method!r} keeps no gradients: nothing to plan")


def main(argv: Sequence[str]) -> None:
    """Runs the config, then the methods to compare it with."""
    if len(argv) > 1:
        _fail(ConfigError(f"unexpected arguments {argv[1:]}; options start with --"))
    try:
        config = config_.from_dict(flags.FLAGS.config.to_dict())
        _log_to_console()
        distributed.initialize(config.distributed)
        if not distributed.is_first():
            # What all processes do, the first one tells.
            logging.getLogger("woodfisher_jax").setLevel(logging.WARNING)
        workdir = Path(WORKDIR.value or _default_workdir(flags.FLAGS.config_file))
        if PLAN.value:
            print_plan(config)
            return
        folders = {config.prune.method: workdir}
        results = {config.prune.method: run(config, workdir)}
        for method in config.compare_with:
            folders[method] = workdir / f"compare-{method}"
            results[method] = run(config_.compared(config, method), folders[method])
    except Stopped as stopped:
        if distributed.is_first():
            print(
                f"{stopped}; to resume, give the same command with --workdir={workdir}"
            )
        raise SystemExit(stopped.exit_code) from None
    except (
        ConfigError,
        DataMissingError,
        CurvatureError,
        DivergedError,
        MemoryLimitError,
        ValueError,
        OSError,
    ) as error:
        _fail(error)
    if not distributed.is_first():
        return
    if len(results) > 1:
        rows = {name: report.read_metrics(folder) for name, folder in folders.items()}
        plots.plot_accuracy(workdir / "comparison.png", rows)
        report.print_comparison(results)
    print(f"Results, plots and checkpoints are in {workdir}")


def cli() -> None:
    """Entry point of ``python -m woodfisher_jax.main``."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
