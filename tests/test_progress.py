"""Progress shows where somebody watches, and never stands in the way of the work."""

import contextlib
import io
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from woodfisher_jax import progress
from woodfisher_jax.progress import lines, live, silent


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        super().isatty()  # which a closed one refuses
        return True

    @property
    def text(self) -> str:
        """All that was written, without colours and moves of the cursor."""
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", self.getvalue())


Start = Callable[[], Terminal]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes a terminal the standard error, with pictures at short intervals."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "REFRESH", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def start() -> Terminal:
        # Called in the test, before which pytest sets a stream of its own.
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return start


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.005)


# ------------------------------------------------------------------------- a terminal


def test_a_terminal_has_a_row_for_what_runs_and_nothing_at_the_end(
    start: Start,
) -> None:
    terminal = start()
    with live("pruning") as callback:
        callback("[gradients]", 250, 1000)
        callback("compiling", 0, 1)
        until(lambda: "compiling" in terminal.text)
        *_, title, row, single = terminal.text.splitlines()
        assert re.search(r"pruning +\d+ s", title)
        assert re.search(r"\[gradients\] +━+.* 250/1,000 +\d+ s, \d+ s left", row)
        assert "1/1" not in single
        assert "━" not in single
        callback("compiling", 1, 1)
        before = len(terminal.text)
        until(lambda: "pruning" in terminal.text[before:].rpartition("left")[0])
    # The rows are erased, the cursor is back.
    assert terminal.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K")


def test_it_moves_while_the_work_says_nothing(start: Start) -> None:
    terminal = start()
    with live("pruning"):
        until(lambda: terminal.text.count("pruning") > 3)


def test_quick_work_shows_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = start()
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with live("pruning") as callback:
        callback("gradients", 1, 2)
    assert terminal.getvalue() == ""


def test_a_file_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment says what Rich would believe."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with live("pruning") as callback:
        assert callback is silent
    with live("pruning", lines()) as callback:
        assert callback is not silent


def test_quiet_is_quiet(start: Start) -> None:
    start()
    with live("pruning", lines(), quiet=True) as callback:
        assert callback is silent


def test_one_display_at_a_time(start: Start) -> None:
    start()
    with live("pruning"), live("another") as callback:
        assert callback is silent
        found: list[Any] = []

        def elsewhere() -> None:
            with live("in a thread") as callback:
                found.append(callback)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found == [silent]
    with live("pruning") as callback:
        assert callback is not silent


def test_what_is_printed_meanwhile_stays(start: Start) -> None:
    terminal = start()
    with live("pruning"):
        until(lambda: "pruning" in terminal.text)
        print("a warning", file=sys.stderr)
    assert sys.stderr is terminal
    assert "a warning\n" in terminal.text


def test_output_that_goes_to_a_file_goes_on_going_there(start: Start) -> None:
    terminal = start()
    with contextlib.redirect_stdout(io.StringIO()) as file, live("pruning"):
        until(lambda: "pruning" in terminal.text)
        print("a result")
    assert file.getvalue() == "a result\n"


def test_a_display_of_the_program_itself_is_left_alone(start: Start) -> None:
    terminal = start()
    from rich.console import Console
    from rich.live import Live

    other = Live("of the program", console=Console(stderr=True), auto_refresh=False)
    with other, live("pruning"):
        time.sleep(0.1)
    assert "of the program" in terminal.text
    assert "pruning" not in terminal.text


def test_a_terminal_that_goes_away_ends_no_work(start: Start) -> None:
    terminal = start()
    with live("pruning") as callback:
        until(lambda: "pruning" in terminal.text)
        terminal.close()
        time.sleep(0.05)
        callback("gradients", 1, 2)
    with live("pruning") as callback:
        assert callback is silent


def test_without_a_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with live("pruning") as callback:
        assert callback is silent


def test_an_error_comes_through_and_ends_the_display(start: Start) -> None:
    terminal = start()

    def fail() -> None:
        with live("pruning"):
            until(lambda: "pruning" in terminal.text)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not [t for t in threading.enumerate() if t.name == "progress"]


# ------------------------------------------------------------------------- a notebook


def test_a_notebook_has_bars_in_the_output_of_the_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[dict[str, str]] = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data))
    display = types.SimpleNamespace(display=lambda *_, raw, display_id: handle)
    shell = types.SimpleNamespace(
        get_ipython=lambda: types.SimpleNamespace(kernel=1), display=display
    )
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with live("pruning") as callback:
        callback("a<b", 3, 12)
        until(lambda: shown and "a&lt;b" in shown[-1]["text/html"])
        assert '<progress value="3" max="12"></progress> 3/12 0 s' in str(shown[-1])
        assert "; a<b 3/12 0 s" in shown[-1]["text/plain"]
    assert shown[-1] == {"text/plain": "", "text/html": ""}


# ------------------------------------------------------------------------------ a log


def test_a_log_gets_one_line_a_finished_label(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LEAST", 0.0)
    callback = lines()
    for call in (("a [b]", 0, 4), ("c", 1, 2), ("a [b]", 2, 4), ("a [b]", 4, 4)):
        callback(*call)
    assert capsys.readouterr().err == "a [b]: 4 in 0.0 s\n"
    callback("a [b]", 4, 4)  # A label may come again, and a total of nothing.
    callback("none", 0, 0)
    assert capsys.readouterr().err == "a [b]: 4 in 0.0 s\nnone: 0 in 0.0 s\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_log_that_is_gone_ends_no_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stream: Any
) -> None:
    monkeypatch.setattr(progress, "LEAST", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    if stream:
        stream.close()
    lines()("gradients", 4, 4)
    assert capsys.readouterr().out == ""


def test_a_log_leaves_out_quick_work(capsys: pytest.CaptureFixture) -> None:
    callback = lines()
    callback("quick", 0, 1)
    callback("quick", 1, 1)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------- cost


def test_a_note_costs_microseconds(start: Start) -> None:
    start()
    with live("pruning") as callback:
        begun = time.perf_counter()
        for done in range(10_000):
            callback("gradients", done, 10_000)
        assert time.perf_counter() - begun < 1


def test_nothing_is_imported_to_show_nothing() -> None:
    code = (
        "import sys\nfrom woodfisher_jax.progress import live\n"
        "with live('pruning'): pass\nprint('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
