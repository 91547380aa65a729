"""Progress of long work: live bars on a terminal, one line each elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Callback = Callable[[str, int, int], None]
"""Called with (label, done, total) after every piece of some work."""


def silent(label: str, done: int, total: int) -> None:
    """Shows no progress."""


@contextmanager
def progress_bar(
    console: Console | None = None, min_seconds: float = 1.0, quiet: bool = False
) -> Iterator[Callback]:
    """Shows the progress of labelled pieces of work while the context is open.

    Each label prints one line when it is finished, if it took long enough. On a
    terminal it has a live bar until then, with its rate and the time left; elsewhere (a
    log file, a notebook) nothing else is shown.

    Args:
        console: where to show it; by default the standard error.
        min_seconds: work shorter than this prints no line.
        quiet: whether to show nothing at all.

    Yields:
        A callback; ``done=0`` starts the clock of a label. A label may come again after
        it is finished.
    """
    if quiet:
        yield silent
        return
    if console is None:
        # The stream decides: with FORCE_COLOR in the environment, as some schedulers
        # set it, Rich would treat a file as a terminal.
        console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    if not console.is_terminal:
        yield _lines(console, min_seconds)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _bars(progress, _lines(console, min_seconds))


class _Rate(ProgressColumn):
    """Pieces a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


def _bars(progress: Progress, lines: Callback) -> Callback:
    """A callback that draws one bar for each unfinished label."""
    running: dict[str, TaskID] = {}

    def callback(label: str, done: int, total: int) -> None:
        if label not in running:
            running[label] = progress.add_task(label, total=total)
        progress.update(running[label], completed=done, total=total)
        if done >= total:
            progress.remove_task(running.pop(label))
        lines(label, done, total)

    return callback


def _lines(console: Console, min_seconds: float) -> Callback:
    """A callback that prints one line for each finished label."""
    started: dict[str, float] = {}

    def callback(label: str, done: int, total: int) -> None:
        start = started.setdefault(label, time.monotonic())
        if done >= total:
            del started[label]
            seconds = time.monotonic() - start
            line = f"{label}: {total:,} in {seconds:.1f} s"
            if seconds >= min_seconds:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    return callback
