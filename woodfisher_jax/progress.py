"""Progress of long work: live bars on a terminal, one line each elsewhere."""

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


def silent(label: str, done: int, total: int) -> None:
    """Shows no progress."""


@contextmanager
def progress_bar(
    console: Console | None = None, min_seconds: float = 1.0
) -> Iterator[Callback]:
    """Shows the progress of labelled pieces of work while the context is open.

    On a terminal each label has a live bar with its rate and the time left. Elsewhere
    (a log file, a notebook) each label prints one line, when it is finished, unless
    it was done in a moment.

    Args:
        console: where to show it; by default the standard error.
        min_seconds: work shorter than this prints no line.

    Yields:
        ``callback(label, done, total)``, to call after every piece. Calling it with
        ``done=0`` first starts the clock. A label may come again after it is finished.
    """
    console = console or Console(stderr=True)
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
        yield _bars(progress)


class _Rate(ProgressColumn):
    """Pieces a second, of the running bar or over a finished one's whole time."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.3g}/s")


def _bars(progress: Progress) -> Callback:
    """Makes a callback that draws one bar a label."""
    running: dict[str, TaskID] = {}

    def callback(label: str, done: int, total: int) -> None:
        if label not in running:
            running[label] = progress.add_task(label, total=total)
        progress.update(running[label], completed=done, total=total)
        if done >= total:
            del running[label]

    return callback


def _lines(console: Console, min_seconds: float) -> Callback:
    """Makes a callback that prints one line a finished label."""
    started: dict[str, float] = {}

    def callback(label: str, done: int, total: int) -> None:
        start = started.setdefault(label, time.monotonic())
        if done >= total:
            del started[label]
            seconds = time.monotonic() - start
            line = f"{label}: {total} in {seconds:.1f} s"
            if seconds >= min_seconds:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    return callback
