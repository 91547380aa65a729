"""Numbers with their units, as pages and figures show them; a dash where unknown."""

import math

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
PREFIXES = ("", " k", " M", " G", " T", " P")
"""Of powers of a thousand."""
RAISED = str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·")


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, in powers of ten where far from one."""
    if value is None or math.isnan(value):
        return NONE
    text = f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", MINUS)


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in percent, unit included."""
    return NONE if fraction is None else f"{fixed(100 * fraction, digits)} %"


def scaled(value: float | None) -> str:
    """A count with a prefix for its power of a thousand, such as 4.09 G."""
    if value is None or math.isnan(value):
        return NONE
    power = 0
    while abs(value) >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{PREFIXES[power]}".replace("-", MINUS)


def storage(value: float | None) -> str:
    """Bytes with a unit of powers of a thousand."""
    if value is None:
        return NONE
    text = scaled(value)
    return text + ("B" if " " in text else " B")


def number(value: float) -> str:
    """A number as an axis shows it."""
    return scaled(value) if abs(value) >= 1e4 else significant(value, 4)


def power_of_ten(exponent: float) -> str:
    """10 to that power, such as 10⁻³."""
    return "10" + f"{exponent:.3g}".translate(RAISED)


def counted(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, else minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
