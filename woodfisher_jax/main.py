"""The command line: the only file with flags.

    python -m woodfisher_jax.main digits

Any field of the config is overridden by ``--config.<field>=<value>``.
"""

import contextlib
import difflib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import absl.logging
from absl import app, flags

from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.data import DataMissingError
from woodfisher_jax.exit_codes import FAILED, USAGE, exits
from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.progress import lines, live
from woodfisher_jax.report import language
from woodfisher_jax.report.elements import tables
from woodfisher_jax.report.page import write_page
from woodfisher_jax.rows.memory_plan import MemoryLimitError
from woodfisher_jax.rows.targets import TargetError, target
from woodfisher_jax.training import config as config_
from woodfisher_jax.training import distributed
from woodfisher_jax.training.config import Config, ConfigError, LanguageConfig, files
from woodfisher_jax.training.config.arguments import (
    PROGRAM,
    is_config,
    joined,
    listed,
    names_config,
    read_config,
)
from woodfisher_jax.training.language import one_shot
from woodfisher_jax.training.language.targets import compile_language
from woodfisher_jax.training.loop import (
    DivergedError,
    RunFailedError,
    run,
)
from woodfisher_jax.training.pruning_step import forecast
from woodfisher_jax.training.resuming.preemption import Stopped
from woodfisher_jax.training.resuming.workdir import LOG_FORMAT
from woodfisher_jax.training.start import fit, prepare
from woodfisher_jax.training.targets import NotForTargetError, check, compile_for

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; started again with the same folder, a run resumes. "
    "Default runs/<config name>-<time>.",
)

PLAN = flags.DEFINE_bool(
    "plan",
    False,
    "Print the memory plan of a pruning step (traffic, arithmetic) and run nothing.",
)

TARGET = flags.DEFINE_string(
    "target",
    None,
    "With --plan: compile every program of the run for devices that need not be here "
    "(tpu:v5e:4x4, tpu:v4:2x2x2, cuda:h100, cuda:h100:8), and print what each takes of "
    "one. Data and weights are not read.",
)

QUIET = flags.DEFINE_bool(
    "quiet",
    False,
    "Print a line for each result, and errors. The log is in the folder of the run.",
)

OTHER_COMMANDS = ("evaluate", "export", "report", "torch_weights")
"""Modules that somebody may take for words of this command."""

HELP = """Trains a network, prunes it and retrains it.

usage: {program} NAME [options]

  NAME, --config=NAME    a config of the package (below), or the path of a file
  NAME:WORD              a variant of it, such as resnet50:smoke
  --config.FIELD=VALUE   override a field of the config; may be repeated
  --workdir=FOLDER       where the run goes (default runs/NAME-TIME); given again,
                         a run that was stopped goes on
  --plan                 print the memory plan of a pruning step, run nothing
  --plan --target=NAME   the same for a machine that is not there, such as
                         tpu:v5e:4x4 or cuda:h100, with all programs compiled for it
  --quiet                print a line for each result, and errors
  --helpfull             every field of the config with its value, and all flags

configs:
{configs}

examples:
  {program} digits
  {program} digits --config.seed=1 \\
      --config.prune.method=kfac --config.prune.target_sparsity=0.9
  {program} resnet50:smoke --workdir=runs/smoke
  {program} my_config.py --plan

exit codes: 0 done, or stopped by SIGTERM or SIGHUP and saved; 1 the run failed; 2
nothing was run, for the command has to be changed; 130 stopped by Ctrl-C and saved
"""

ERRORS: dict[type[Exception], int] = {
    ConfigError: USAGE,
    flags.Error: USAGE,
    DataMissingError: USAGE,
    MemoryLimitError: USAGE,
    NotForTargetError: USAGE,
    TargetError: USAGE,
    CurvatureError: FAILED,
    DivergedError: FAILED,
    RunFailedError: FAILED,
    ValueError: FAILED,
    OSError: FAILED,
}
"""What may end a run without a traceback, and with which exit code."""


# ------------------------------------------------------------------- the command line


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags of this file; prints the help where it is asked for.

    Returns:
        The program, the arguments that name or override a config (the name as
        ``--config=NAME``), and stray ones.
    """
    given = joined(argv)
    own = [argument for argument in given if is_config(argument)]
    rest = [argument for argument in given if not is_config(argument)]
    if any(a in ("-h", "-help", "--help", "--helpshort") for a in rest):
        print(HELP.format(program=PROGRAM, configs=listed()), end="")
        raise SystemExit(0)
    with exits(ERRORS):
        try:
            program, *stray = flags.FLAGS([a for a in rest if a != "--helpfull"])
        except flags.IllegalFlagValueError as error:
            found = re.match(r"flag --(\w+)=(.*?): ", str(error))
            if found is None:
                raise
            message = f"{found[1]}={found[2]!r}; expected True or False"
            raise ConfigError(message) from error
        except flags.UnrecognizedFlagError as error:
            raise ConfigError(_unknown(error)) from error
        if stray and not any(map(names_config, own)):
            name = stray.pop(0)
            if name in OTHER_COMMANDS:
                raise ConfigError(
                    f"{name} is a command of its own; expected python -m "
                    f"woodfisher_jax.{shlex.join([name, *stray])}"
                )
            own.insert(0, f"--config={name}")
        if "--helpfull" in rest:
            print(_full_help(own))
            raise SystemExit(0)
    return [program, *own, *stray]


def _full_help(arguments: Sequence[str]) -> str:
    name, config = read_config(arguments) if arguments else ("a config", Config())
    return (
        f"Every field of {name} with its value:\n{files.explained(config)}\n\n"
        f"All flags:\n{flags.FLAGS.get_help()}"
    )


def _unknown(error: flags.UnrecognizedFlagError) -> str:
    """The message for an unknown flag; of a field without its section, with it."""
    name = error.flagname
    fields = re.findall(r"^  --(config\.\S+?)=", files.explained(Config()), re.M)
    close = [field for field in fields if f".{field}".endswith(f".{name}")]
    hint = " (--help says which there are)"
    head, _, rest = name.partition(".")
    if rest and difflib.get_close_matches(head, ["config"]):
        hint = f"; did you mean --config.{rest}?"
    if close:
        hint = f"; did you mean {' or '.join(f'--{field}' for field in close[:3])}?"
    return f"there is no flag --{name}{hint}"


# ---------------------------------------------------------------------------- the run


def main(argv: Sequence[str]) -> None:
    """Runs the config, then the methods to compare it with."""
    with exits(ERRORS):
        own = [argument for argument in argv[1:] if is_config(argument)]
        stray = argv[1 + len(own) :]
        if stray:
            raise ConfigError(f"unexpected arguments {stray}; options start with --")
        name, config = read_config(own)
        _check_workdir(WORKDIR.value)
        _log_to_console()
        if TARGET.value is not None:
            if not PLAN.value:
                raise ConfigError(
                    f"target={TARGET.value!r} without --plan; a run takes the devices "
                    "that are there, and --plan --target compiles for others"
                )
            if isinstance(config, LanguageConfig):
                print_language_target(config, TARGET.value)
            else:
                print_target(config, TARGET.value)
            return
        if isinstance(config, LanguageConfig):
            run_language(config, Path(WORKDIR.value or _default_workdir(name)))
            return
        distributed.initialize(config.distributed)
        if not distributed.is_first():
            logging.getLogger("woodfisher_jax").setLevel(logging.WARNING)
        if PLAN.value:
            print_plan(fit(config)[0])
        else:
            run_all(config, Path(WORKDIR.value or _default_workdir(name)))


def run_language(config: LanguageConfig, workdir: Path) -> None:
    """Prunes a language model, and prints what became of it."""
    if PLAN.value:
        raise ConfigError(
            "--plan: a language model has no memory plan, for it is pruned without "
            "per-sample gradients; leave it out, or add --target to compile the "
            "programs of the run for a machine that is not there"
        )
    results = one_shot.run(config, workdir, quiet=QUIET.value)
    if QUIET.value:
        dense, pruned = (
            results["perplexity"][name]["all"] for name in ("dense", "pruned")
        )
        print(
            f"{100 * results['sparsity']:.2f} % sparse, perplexity {pruned:.2f} "
            f"(dense {dense:.2f}), {results['seconds_total']:.1f} s, {workdir}"
        )
        return
    language.print_results(results)
    print(f"The pruned model is in {workdir / one_shot.MODEL}")
    if (workdir / "report.html").exists():
        print(f"Plots and all numbers: {workdir / 'report.html'}")


def run_all(config: Config, workdir: Path) -> None:
    """Runs the config and the methods to compare it with, and prints the results."""
    results: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    for method in (config.prune.method, *config.compare_with):
        is_main = not results
        folders[method] = workdir if is_main else workdir / f"compare-{method}"
        one = config if is_main else config_.compared(config, method)
        try:
            results[method] = run(
                one,
                folders[method],
                quiet=QUIET.value,
                command=resume_command(workdir) if is_main else "",
            )
        except Stopped as stopped:
            if distributed.is_first():
                print(f"{stopped}; to resume:\n  {resume_command(workdir)}")
            raise SystemExit(stopped.exit_code) from None
        except distributed.PeerLostError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            # On the usual way out JAX waits for that process, and aborts.
            os._exit(FAILED)
        if distributed.is_first() and not QUIET.value:
            tables.print_table(results[method])
    if not distributed.is_first():
        return
    if len(results) > 1:
        # Where matplotlib is missing, each run has said so.
        with contextlib.suppress(MissingExtraError), live("report", quiet=QUIET.value):
            write_page(workdir, config_.to_dict(Config()))
    if QUIET.value:
        for method, folder in folders.items():
            print(result_line(results[method], folder))
        return
    if len(results) > 1:
        tables.print_comparison(results)
    print(f"Results and checkpoints are in {workdir}")
    if (workdir / "report.html").exists():
        print(f"Plots and all numbers: {workdir / 'report.html'}")


def result_line(results: dict[str, Any], folder: Path) -> str:
    """The result of a run in one line."""
    return (
        f"{results['method']}: {100 * results['sparsity']:.2f} % sparse, "
        f"top-1 {results['final']['top1']:.2f} % "
        f"(dense {results['dense']['top1']:.2f} %), "
        f"{results['seconds_total']:.1f} s, {folder}"
    )


def resume_command(workdir: Path) -> str:
    """This command, with the folder of the run."""
    by_name = Path(sys.argv[0]).name == "woodfisher"
    given = shlex.join(sys.argv[1:])
    folder = "" if WORKDIR.present else f" {shlex.quote(f'--workdir={workdir}')}"
    return f"{'woodfisher' if by_name else PROGRAM} {given}{folder}"


def print_plan(config: Config) -> None:
    """Prints the memory plan of a pruning step; nothing is run or written."""
    quiet = QUIET.value or not distributed.is_first()
    with live("memory plan", lines(), quiet) as progress:
        plan, given = prepare(config, progress)
        needs = forecast(plan, *given)
    if not distributed.is_first():
        return
    for name, pruner in config.pruners.items():
        if name in needs:
            tables.print_needs(needs[name])
        else:
            print(f"{name}: {pruner.method!r} keeps no gradients: nothing to plan")


def print_target(config: Config, name: str) -> None:
    """Prints what a run takes of devices that need not be here.

    Raises:
        NotForTargetError: After that, if some program cannot run there.
    """
    devices = target(name)
    with live("compiling", lines(), QUIET.value) as progress:
        needs, reports = compile_for(config, devices, progress)
    print(f"{name}: {len(devices.devices)} x {devices.kind.device_kind}")
    tables.print_programs([one._asdict() for one in reports], devices.kind.memory)
    for pruner in needs:
        print()
        print(f"{pruner}: ", end="")
        tables.print_needs(needs[pruner])
    check(reports, devices)


def print_language_target(config: LanguageConfig, name: str) -> None:
    """Prints what pruning a language model takes of a device that need not be here.

    Raises:
        NotForTargetError: After that, if some program cannot run there.
    """
    devices = target(name)
    with live("compiling", lines(), QUIET.value) as progress:
        reports = compile_language(config, devices, progress)
    number = len(devices.devices)
    print(
        f"{name}: 1 x {devices.kind.device_kind}"
        + (f" of {number}; layers are pruned on one device" if number > 1 else "")
    )
    tables.print_programs([one._asdict() for one in reports], devices.kind.memory)
    check(reports, devices)


def _check_workdir(given: str | None) -> None:
    """Raises for a workdir that cannot be a folder, before anything is read."""
    if given is None:
        return
    there = next(p for p in (Path(given), *Path(given).parents) if p.exists())
    if not given or not there.is_dir():
        reason = f": {str(there)!r} is a file" if given else ""
        raise ConfigError(
            f"workdir={given!r}{reason}; expected a folder, new or that of a run, or "
            "no --workdir for one in runs"
        )


def _default_workdir(config_file: str) -> Path:
    name = Path(config_file.partition(":")[0]).stem
    # The clocks of processes differ.
    when = distributed.of_first(time.strftime("%Y%m%d-%H%M%S"))
    return Path("runs") / f"{name}-{when}"


class _StandardError(logging.StreamHandler):
    """Writes to the standard error of the moment, which live bars take over."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Does nothing: there is only one."""


def _log_to_console() -> None:
    """Sends this package's messages to the standard error, and quietens the others."""
    if not any(argument.startswith("--verbosity") for argument in sys.argv):
        # Orbax reports every file it writes; --verbosity=0 shows that.
        absl.logging.set_verbosity(absl.logging.WARNING)
    logger = logging.getLogger("woodfisher_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _StandardError()
    handler.setLevel(logging.ERROR if QUIET.value else logging.INFO)
    handler.setFormatter(LOG_FORMAT)
    logger.addHandler(handler)


def cli() -> None:
    """Entry point of ``python -m woodfisher_jax.main`` and ``woodfisher``."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
