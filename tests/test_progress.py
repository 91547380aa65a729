"""Progress shows on a terminal, and leaves readable lines in a log."""

import io
import re
import sys

import pytest
from rich.console import Console

from woodfisher_jax.progress import progress_bar


def run(terminal: bool, *calls: tuple[str, int, int]) -> str:
    """Returns what the calls of the callback show."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    with progress_bar(console, min_seconds=0) as callback:
        for call in calls:
            callback(*call)
    return shown.getvalue()


def test_a_log_gets_one_line_a_finished_label() -> None:
    shown = run(False, ("a [b]", 0, 4), ("c", 1, 2), ("a [b]", 2, 4), ("a [b]", 4, 4))
    assert shown == "a [b]: 4 in 0.0 s\n"


def test_a_log_leaves_out_quick_work() -> None:
    shown = io.StringIO()
    with progress_bar(Console(file=shown, force_terminal=False)) as callback:
        callback("quick", 0, 1)
        callback("quick", 1, 1)
    assert shown.getvalue() == ""


def test_a_label_can_come_again() -> None:
    shown = run(False, *[("gradients", done, 2) for done in (0, 1, 2)] * 3)
    assert shown.count("gradients: 2 in") == 3


def test_a_terminal_has_a_bar_of_what_runs_and_a_line_of_what_is_done() -> None:
    shown = run(
        True, ("gradients", 0, 7), ("gradients", 7, 7), ("[a]", 1, 30), ("x", 1, 1)
    )
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown)  # Colours and cursor moves.
    assert "gradients: 7 in 0.0 s" in text
    assert "x: 1 in 0.0 s" in text
    *_, running = [line.split() for line in text.splitlines() if line]
    assert running[0] == "[a]"
    assert "1/30" in running


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_go_to_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """Also where the environment says what Rich would believe."""
    error = io.StringIO()
    monkeypatch.setattr(error, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as callback:
        callback("gradients", 1, 2)
    assert ("gradients" in error.getvalue()) == terminal


def test_quiet_shows_nothing() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True)
    with progress_bar(console, min_seconds=0, quiet=True) as callback:
        callback("gradients", 1, 2)
        callback("gradients", 2, 2)
    assert shown.getvalue() == ""


def test_a_total_of_nothing() -> None:
    assert run(False, ("empty", 0, 0)) == "empty: 0 in 0.0 s\n"
    assert "empty" in run(True, ("empty", 0, 0))
