"""Stopping a run by a signal: of a scheduler, a user (Ctrl-C) or a lost terminal."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_CODES: dict[int, int] = {
    signal.SIGTERM: 0,
    signal.SIGHUP: 0,
    signal.SIGINT: 130,
}
"""From signals to the exit code of a run that has saved itself.

A scheduler that takes a machine away sends SIGTERM, a terminal that is closed SIGHUP,
and neither is a failure.
"""


class Stopped(Exception):  # noqa: N818 (nothing has gone wrong)
    """A run has saved itself after a signal; started again, it resumes.

    Attributes:
        exit_code: What the process should end with.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """The signal to stop that this process has received.

    Attributes:
        signal: Its number, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        # Asked now: of a terminal that is lost, the system says that it is none.
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Records a signal; the second one has its usual effect."""
        if self.signal:
            if sys.stderr.isatty():
                # Live bars hide the cursor; this shows it.
                print("\x1b[?25h", end="", file=sys.stderr, flush=True)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal = number
        if number == signal.SIGHUP:
            self._leave_terminals()
        logger.info(
            "%s: the step is finished and saved, then the run stops; once more stops "
            "it at once",
            signal.Signals(number).name,
        )

    def _leave_terminals(self) -> None:
        """Sends output nowhere that would fail, before the run has saved itself."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handles signals to stop while the context is open.

    Only the main thread of a program can; in others signals keep their handlers.

    Yields:
        The request, to look at after every step.
    """
    request = StopRequest()
    before = {}
    try:
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # Started with nohup.
            # None is a handler that was not set from Python, such as that of
            # jax.distributed for SIGTERM.
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, request.receive)
    except ValueError:
        before.clear()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
