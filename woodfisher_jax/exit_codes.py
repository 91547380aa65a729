"""How a command ends: with an exit code, and a line where something is wrong."""

import contextlib
import sys
from collections.abc import Iterator, Mapping

from woodfisher_jax.extras import MissingExtraError

FAILED = 1
"""What was begun could not be finished; also of an error that nobody foresaw."""

USAGE = 2
"""Nothing was begun: the command has to be changed, or what it names provided."""

INTERRUPTED = 130
"""Ended by Ctrl-C, as shells have it (128 and the number of the signal)."""


@contextlib.contextmanager
def exits(codes: Mapping[type[Exception], int]) -> Iterator[None]:
    """Ends the process with a line on the standard error where an error comes by.

    Args:
        codes: From a kind of error to the exit code; the first that fits is taken. All
            others pass, for what nobody has foreseen needs its traceback.
    """
    codes = {MissingExtraError: USAGE, **codes}
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except tuple(codes) as error:
        print(f"error: {error}", file=sys.stderr)
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        raise SystemExit(code) from None
