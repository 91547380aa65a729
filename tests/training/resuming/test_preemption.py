"""A signal is noted, once; the second one ends the process."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from woodfisher_jax.training.resuming import preemption
from woodfisher_jax.training.resuming.preemption import (
    EXIT_CODES,
    Stopped,
    stop_requests,
)


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """The suite itself may be run by nohup, under which a run takes no hang-up."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", list(EXIT_CODES))
def test_a_signal_is_noted_and_nothing_else_happens(number: int) -> None:
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert request.signal == 0
        os.kill(os.getpid(), number)
        assert request.signal == number
    assert signal.getsignal(number) == before


def test_a_run_that_was_started_with_nohup_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


LOSES_ITS_TERMINAL = """
import os, signal, sys
os.open(os.ttyname(1), os.O_RDWR)  # The session's terminal.
from woodfisher_jax.training.resuming.preemption import stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    while not request.signal:
        signal.pause()
    print("lost", flush=True)
    sys.stderr.write("lost")
with open(sys.argv[1], "w") as file:
    file.write(signal.Signals(request.signal).name)
"""


def test_a_terminal_that_is_closed_stops_no_saving(tmp_path: Path) -> None:
    end = tmp_path / "end"
    terminal, inner = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", LOSES_ITS_TERMINAL, str(end)],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert child.wait(60) == 0
    assert end.read_text() == "SIGHUP"


def test_the_second_signal_is_that_of_a_process_that_does_not_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        sent = []
        monkeypatch.setattr(
            preemption.os, "kill", lambda *what: sent.append((*what, handler()))
        )

        def handler() -> object:
            return signal.getsignal(signal.SIGINT)

        request.receive(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]


def test_the_cursor_that_bars_have_hidden_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preemption.os, "kill", lambda *_: None)
    for terminal in (False, True):
        monkeypatch.setattr(preemption.sys.stderr, "isatty", lambda t=terminal: t)
        with stop_requests() as request:
            request.signal = signal.SIGINT
            request.receive(signal.SIGINT)
        assert ("\x1b[?25h" in capsys.readouterr().err) == terminal


def test_a_thread_that_cannot_listen_hears_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    heard = []

    def listen() -> None:
        with stop_requests() as request:
            heard.append(request.signal)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_preemption_is_no_failure_and_an_interrupt_has_its_own_code() -> None:
    assert EXIT_CODES[signal.SIGTERM] == EXIT_CODES[signal.SIGHUP] == 0
    assert EXIT_CODES[signal.SIGINT] == 130
    assert Stopped("saved", 130).exit_code == 130
