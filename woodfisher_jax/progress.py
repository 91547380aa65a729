"""Progress of long work: live on a terminal and in a notebook, lines in a log.

A thread draws several times a second, so that the display also moves while XLA
compiles; the work itself only notes how far it is.
"""

import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

Callback = Callable[[str, int, int], None]
"""Called with (label, done, total) after every piece of some work."""

DELAY = 0.25
"""Seconds before anything is drawn; work that is over by then shows nothing."""

REFRESH = 0.2
"""Seconds from one picture to the next."""

LEAST = 1.0
"""Seconds that finished work has to have taken for a line in a log."""

_display = threading.Lock()
"""Held while something is drawn: a terminal has room for one display."""


def silent(label: str, done: int, total: int) -> None:
    """Shows no progress."""


@contextmanager
def live(
    title: str, otherwise: Callback = silent, quiet: bool = False
) -> Iterator[Callback]:
    """Draws the progress of labelled work while the context is open.

    On the standard error, if that is a terminal, or in the output of a notebook's cell;
    the drawing disappears with the end of the work.

    Args:
        title: Of the whole work, which is drawn from beginning to end.
        otherwise: What to yield where nobody watches; default :func:`silent`.
        quiet: Whether to show nothing anywhere; default False.

    Yields:
        A callback; ``done=0`` starts the clock of a label, ``done=total`` ends it.
    """
    if quiet:
        yield silent
        return
    view = _view()
    if view is None or not _display.acquire(blocking=False):
        yield otherwise
        return
    try:
        running = _Running(title)
        closed = threading.Event()
        drawing = threading.Thread(
            target=_draw, args=(view, running, closed), name="progress", daemon=True
        )
        drawing.start()
        try:
            yield running.note
        finally:
            closed.set()
            drawing.join()
    finally:
        _display.release()


def lines() -> Callback:
    """A callback that prints a line on the standard error for each finished label."""
    started: dict[str, float] = {}

    def callback(label: str, done: int, total: int) -> None:
        start = started.setdefault(label, time.monotonic())
        if done >= total:
            del started[label]
            seconds = time.monotonic() - start
            if seconds >= LEAST and sys.stderr:
                with contextlib.suppress(OSError, ValueError):  # It may be closed.
                    print(f"{label}: {total:,} in {seconds:.1f} s", file=sys.stderr)

    return callback


class Row(NamedTuple):
    """What is drawn of one label.

    Attributes:
        label: Its name.
        done: Pieces done.
        total: Of so many; a single piece is drawn without a bar.
        seconds: Since it began.
    """

    label: str
    done: int
    total: int
    seconds: float

    @property
    def pieces(self) -> str:
        """How far it is."""
        return f"{self.done:,}/{self.total:,}" if self.total > 1 else ""

    @property
    def time(self) -> str:
        """How long it takes: until now, and from now on."""
        left = ""
        if 0 < self.done < self.total:
            left = f", {self.seconds * (self.total / self.done - 1):.0f} s left"
        return f"{int(self.seconds)} s{left}"


class _Running:
    """The labels that have begun and not ended, in order."""

    def __init__(self, title: str) -> None:
        self._title, self._begun = title, time.monotonic()
        self._labels: dict[str, tuple[int, int, float]] = {}

    def note(self, label: str, done: int, total: int) -> None:
        """The callback."""
        if done >= total:
            self._labels.pop(label, None)
            return
        _, _, begun = self._labels.get(label) or (0, 0, time.monotonic())
        self._labels[label] = done, total, begun

    def rows(self) -> list[Row]:
        """The title, and every label."""
        now = time.monotonic()
        labels = list(self._labels.items())  # At once: the work goes on meanwhile.
        return [
            Row(self._title, 0, 1, now - self._begun),
            *(Row(label, n, of, now - begun) for label, (n, of, begun) in labels),
        ]


Show = Callable[[list[Row]], Any]
View = Callable[[], contextlib.AbstractContextManager[Show]]


def _draw(view: View, running: _Running, closed: threading.Event) -> None:
    """Draws until the work has ended."""
    if closed.wait(DELAY):
        return
    # Work does not end because it cannot be watched any more: the terminal may be gone.
    with contextlib.suppress(Exception), view() as show:
        while not closed.is_set():
            show(running.rows())
            closed.wait(REFRESH)


def _view() -> View | None:
    """How to draw here; None where nobody watches."""
    if _is_terminal(sys.stderr):
        return _on_terminal
    shell = "IPython" in sys.modules and sys.modules["IPython"].get_ipython()
    # That of a kernel; Colab's is a class of its own.
    return _in_notebook if hasattr(shell, "kernel") else None


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # There is none, or it is closed.
        return False


@contextmanager
def _on_terminal() -> Iterator[Show]:
    """A bar a row below what else is printed."""
    # Not at the top: most processes draw nothing.
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    if isinstance(sys.stderr, FileProxy):
        yield lambda rows: None  # The program has a display of its own there.
        return
    spinner = Spinner("dots")

    def picture(rows: list[Row]) -> Table:
        table = Table.grid(padding=(0, 1))
        for number, row in enumerate(rows):
            bar = ProgressBar(row.total, row.done, width=30) if row.total > 1 else ""
            texts = (Text(text) for text in (row.pieces, row.time))
            table.add_row("" if number else spinner, Text(row.label), bar, *texts)
        return table

    # The stream decides: with FORCE_COLOR in the environment, as some schedulers set
    # it, Rich would treat a file as a terminal.
    console = Console(stderr=True, force_terminal=True)
    # What goes to a file goes on going there.
    redirect = _is_terminal(sys.stdout)
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=redirect
    ) as display:
        yield lambda rows: display.update(picture(rows), refresh=True)


@contextmanager
def _in_notebook() -> Iterator[Show]:
    """A bar a row in the output of the cell, in its colours."""
    # Whoever has a notebook has imported it.
    display = sys.modules["IPython"].display.display

    def data(rows: list[Row]) -> dict[str, str]:
        texts = [f"{row.label} {row.pieces} {row.time}" for row in rows]
        bars = "<br>".join(map(_html, rows))
        return {"text/plain": "; ".join(texts), "text/html": bars}

    handle = display(data([]), raw=True, display_id=True)
    yield lambda rows: handle.update(data(rows), raw=True)
    handle.update(data([]), raw=True)


def _html(row: Row) -> str:
    bar = ""
    if row.total > 1:
        bar = f'<progress value="{row.done}" max="{row.total}"></progress> '
    return f"{html.escape(row.label)} {bar}{row.pieces} {row.time}"
