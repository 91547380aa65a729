"""Exit codes of the commands, and errors as one line."""

import contextlib
import sys
from collections.abc import Iterator, Mapping

from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.written_files import WriteError

FAILED = 1
"""The work was started and could not be finished; also of an unexpected error."""

USAGE = 2
"""Nothing was started: the command has to be changed, or what it names provided."""

INTERRUPTED = 130
"""Ended by Ctrl-C, by the convention of shells: 128 plus the signal's number."""


@contextlib.contextmanager
def exits(codes: Mapping[type[Exception], int]) -> Iterator[None]:
    """Ends the process with one line on the standard error if the body raises.

    Args:
        codes: From error class to exit code; the first that fits applies. Other errors
            are unexpected and propagate with their traceback.
    """
    codes = {MissingExtraError: USAGE, WriteError: FAILED, **codes}
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except tuple(codes) as error:
        print(f"error: {error}", file=sys.stderr)
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        raise SystemExit(code) from None
