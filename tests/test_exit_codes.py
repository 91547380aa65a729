"""A command ends with a line and a code; an unexpected error has its traceback."""

import pytest

from woodfisher_jax.exit_codes import FAILED, INTERRUPTED, USAGE, exits
from woodfisher_jax.extras import MissingExtraError

CODES: dict[type[Exception], int] = {FileNotFoundError: USAGE, OSError: FAILED}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError("no x; give y"), 2, "error: no x; give y\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (MissingExtraError("y needs x: pip"), 2, "error: y needs x: pip\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_a_line_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as ended, exits(CODES):
        raise error
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", message)


def test_other_errors_propagate() -> None:
    with pytest.raises(ZeroDivisionError), exits(CODES):
        raise ZeroDivisionError
    with exits(CODES):
        pass


def test_the_codes_are_those_of_shells() -> None:
    assert (FAILED, USAGE, INTERRUPTED) == (1, 2, 130)
