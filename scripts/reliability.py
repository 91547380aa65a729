"""Kills runs, damages saves and gives wrong configs, and writes down what happened.

    python scripts/reliability.py
    python scripts/reliability.py --kills=2 --saves=2 --configs=5 --page=

Minutes on two cores; the tables of docs/reliability.md are written again.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from woodfisher_jax import main
from woodfisher_jax.progress import silent
from woodfisher_jax.training import loop
from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.config.arguments import read_config
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.training.start import prepare

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by scripts/reliability.py -->", "<!-- end of tables -->"

RUN = [
    "--config=digits",
    "--config.dense.epochs=2",
    "--config.train.epochs=4",
    "--config.prune.end=3",
    "--config.compare_with=()",
]
"""A run of seconds: two epochs dense, four pruning steps, four epochs."""

WRONG = [
    *(f"seed={value}" for value in ("-1", "2**40", "1099511627776", "nan", "1.5")),
    *(f"eval_batch_size={value}" for value in ("0", "-5", "word")),
    *(f"train.learning_rate={value}" for value in ("0", "nan", "inf", "1e300", "fast")),
    *(f"train.optimizer.momentum={value}" for value in ("nan", "1.0", "word")),
    *("train.optimizer.nesterov=maybe", "train.optimizer.name=sdg"),
    *(f"train.epochs={value}" for value in ("-1", "1000000000", "many")),
    *("train.batch_size=1000000000", "train.schedule=stairs"),
    *(f"model.hidden={value}" for value in ("(0,)", "word", "(-3,)", "(2.5,)")),
    *("model.num_classes=3", "model.use_bias={}", "model.name=mpl"),
    *(f"prune.recompute={value}" for value in ("-1", "1000000000")),
    *(f"prune.target_sparsity={value}" for value in ("1", "90", "nan")),
    *("prune.end=1000000000000", "prune.damping=-1", "prune.method=woodfish"),
    *("prune.num_samples=1000000", "prune.dampning=1e-4", "prune.prunable=("),
    *("init_from=nowhere.pth", "data.name=digitz"),
]
"""Overrides of a config, each of which is to be refused."""


def command(workdir: Path, cache: Path) -> list[str]:
    """The command of the run."""
    flags = [f"--workdir={workdir}", f"--config.compile_cache_dir={cache}", "--quiet"]
    return [sys.executable, "-m", "woodfisher_jax.main", *RUN, *flags]


def finish(workdir: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs to the end."""
    return subprocess.run(
        command(workdir, cache), capture_output=True, text=True, check=False
    )


def outcome(workdir: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The bits of the last save, and the metrics but for times."""
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        shapes = checkpoint.read_shapes(manager, None)
        arrays, _ = checkpoint.restore(manager, None, shapes)
    bits = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        for timed in ("seconds", "starved"):
            row.pop(timed, None)
    return bits, rows


def events(workdir: Path) -> list[int]:
    """The numbers of the saves, complete or not."""
    return sorted(
        int(path.name)
        for path in workdir.glob("checkpoints/*")
        if path.name.isdecimal()
    )


# ----------------------------------------------------------------------------- kills


def killed(workdir: Path, cache: Path, seconds: float) -> str:
    """Starts the run, kills it some time after it began, and says where it was."""
    log = workdir / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    child = subprocess.Popen(
        command(workdir, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while child.poll() is None and (not log.exists() or log.stat().st_size == before):
        time.sleep(0.01)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
    if child.returncode != -signal.SIGKILL:
        return "after its end"
    if list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp")):
        return "while it wrote a save"
    if found := events(workdir):
        if not (workdir / "checkpoints" / str(found[-1]) / checkpoint.SUMS).exists():
            return "while it wrote the checksums of a save"
        return "between two saves"
    return "before its first save"


def try_kills(number: int, whole: Path, cache: Path, draw: random.Random) -> list[str]:
    """Kills runs at random moments and lets them go on; rows of the table."""
    expected = outcome(whole)
    folder = whole.parent / "timed"
    started = time.perf_counter()
    finish(folder, cache)
    length = time.perf_counter() - started
    found: collections.Counter = collections.Counter()
    while found.total() < number:
        workdir = whole.parent / "killed"
        where = killed(workdir, cache, draw.uniform(0, 0.4 * length))
        if where == "after its end":
            shutil.rmtree(workdir)
            continue
        done = finish(workdir, cache)
        same = done.returncode == 0 and outcome(workdir) == expected
        happened = "resumed; the same bits and the same metrics" if same else "LOST"
        found[f"SIGKILL {where}", happened] += 1
        shutil.rmtree(workdir)
    return rows_of(found)


# ----------------------------------------------------------------------------- saves


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    """Cuts a file off."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path: Path, draw: random.Random) -> None:
    """Removes a file."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped in": flip,
    "cut off:": truncate,
    "removed:": remove,
}


def try_saves(number: int, whole: Path, cache: Path, draw: random.Random) -> list[str]:
    """Damages the latest save of a run and starts it again; rows of the table."""
    expected = outcome(whole)
    _, config = read_config([*RUN, f"--config.compile_cache_dir={cache}"])
    assert isinstance(config, Config)
    latest = str(events(whole)[-1])
    files = [
        path.relative_to(whole)
        for path in sorted((whole / "checkpoints" / latest).rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    draw.shuffle(files)
    found: collections.Counter = collections.Counter()
    for trial in range(number):
        workdir = whole.parent / f"damaged-{trial}"
        shutil.copytree(whole, workdir)
        (workdir / "log.txt").unlink()
        file = files[trial % len(files)]
        what = list(DAMAGES)[trial % len(DAMAGES)]
        DAMAGES[what](workdir / file, draw)
        loop.run(config, workdir, quiet=True)
        told = f"{latest} is damaged" in (workdir / "log.txt").read_text()
        same = outcome(workdir) == expected
        happened = "LOST"
        if same:
            happened = "resumed from the save before; the same bits"
            happened = f"named; {happened}" if told else "harmless; the same bits"
        found[f"{what} `{kind_of(file)}`", happened] += 1
        shutil.rmtree(workdir)
    return rows_of(found)


def kind_of(file: Path) -> str:
    """A file of a save, without numbers and names that differ from save to save."""
    inside = file.relative_to(*file.parts[:1]).parts[1:]
    return re.sub(r"/[0-9a-f]{16,}", "/...", "/".join(inside))


# --------------------------------------------------------------------------- configs


def refused(override: str) -> str:
    """The message by which a config is refused; empty if it is not."""
    try:
        _, config = read_config([*RUN, f"--config.{override}"])
        assert isinstance(config, Config)
        prepare(config, silent)
    except tuple(main.ERRORS) as error:
        code = next(c for kind, c in main.ERRORS.items() if isinstance(error, kind))
        message = str(error)
        field = override.partition("=")[0].rpartition(".")[2]
        is_right = code == 2 and "\n" not in message and field in message
        return message if is_right and isinstance(error, ConfigError) else ""
    return ""


def try_configs(number: int) -> list[str]:
    """Gives wrong values; rows of the table."""
    lines = []
    for override in WRONG[:number]:
        message = refused(override) or "NOT REFUSED"
        short = message if len(message) <= 110 else f"{message[:110]} ..."
        short = short.replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{override}` | {short} |")
    return lines


# ------------------------------------------------------------------------------ page


def rows_of(found: collections.Counter) -> list[str]:
    """Rows of a table: what was tried, how often, what happened."""
    return [
        f"| {tried} | {count} | {happened} |"
        for (tried, happened), count in sorted(found.items())
    ]


def tables(kills: int, saves: int, configs: int, seed: int) -> str:
    """The tables, in Markdown."""
    draw = random.Random(seed)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        whole, cache = Path(name) / "whole", Path(name) / "cache"
        if kills or saves:
            done = finish(whole, cache)
            if done.returncode:
                raise SystemExit(done.stderr)
            head = ["| tried | times | what happened |", "|---|---|---|"]
            lines += [f"{kills} kills and {saves} damaged saves:", "", *head]
            lines += try_kills(kills, whole, cache, draw) if kills else []
            lines += try_saves(saves, whole, cache, draw) if saves else []
            lines += [""]
    lines += [f"{min(configs, len(WRONG))} wrong values, each exit code 2:", ""]
    lines += ["| field=value | message |", "|---|---|", *try_configs(configs)]
    return "\n".join(lines)


def cli() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--configs", type=int, default=len(WRONG))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", default=str(PAGE), help="empty: print the tables")
    given = parser.parse_args()
    text = tables(given.kills, given.saves, given.configs, given.seed)
    if not given.page:
        print(text)
        return
    page = Path(given.page)
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    cli()
