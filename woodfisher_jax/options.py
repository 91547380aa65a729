"""Options: fields of frozen dataclasses with a default, a range and a line each.

An option is written once, as a field of the dataclass that it belongs to. The check of
its value, the config's fields, ``--helpfull``, the suggestions for a misspelt name and
the tables of the documentation read that field:

    @dataclasses.dataclass(frozen=True)
    class Damped(Options):
        damping: float | Literal["auto"] = option(1e-5, "λ, added to ...", least=1e-30)
"""

import dataclasses
import difflib
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

LARGEST = 1e30
"""Of any number: within float32, with room for its inverse."""


class OptionError(ValueError):
    """An option with a value that it cannot have, or that does not exist.

    Attributes:
        name: The option's.
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclasses.dataclass(frozen=True)
class Range:
    """Which values an option may take, beyond what its type says.

    Attributes:
        least: Smallest number.
        above: Number that it must exceed.
        most: Largest number.
        below: Number that it must stay under.
        choices: Words that it may be.
        in_config: Whether a config file may set it.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    in_config: bool = True

    def holds(self, value: float) -> bool:
        """Whether a number is finite and within the range."""
        # First, since a whole number may be too large for a float.
        return (
            abs(value) <= LARGEST
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range in words, such as ``from 0 and below 1``."""
        bounds = [
            f"{word} {bound}" if isinstance(bound, int) else f"{word} {bound:g}"
            for word, bound in (
                ("from", self.least),
                ("above", self.above),
                ("to", self.most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(bounds).replace(" and to", " to")


def option(default: Any, doc: str, **limits: Any) -> Any:
    """A field of an :class:`Options` dataclass.

    Args:
        default: Its value unless given.
        doc: One line: what it is, with its unit.
        **limits: Fields of :class:`Range`.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class Snip(wf.Sampled):
        ...     power: float = wf.option(1.0, "Exponent of the gradient.", above=0)
        >>> Snip(power=0.5).power
        0.5
    """
    metadata = {"doc": doc, "range": Range(**limits)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all dataclasses of options: values are checked when one is made."""

    def __post_init__(self) -> None:
        """Checks every field by itself; numbers become Python's own.

        Raises:
            OptionError: Naming the field, what was expected and what came.
        """
        for name, field in fields_of(type(self)).items():
            value = checked(field, getattr(self, name))
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Self:
        """The same with other values.

        Raises:
            OptionError: If there is no such option, with the nearest that there is, or
                a value is out of range.
        """
        known = fields_of(type(self))
        for name in changes:
            check_known(name, known, type(self).__name__)
        return dataclasses.replace(self, **changes)

    def given(self) -> dict[str, Any]:
        """The options whose values are not their defaults."""
        return {
            name: value
            for name, field in fields_of(type(self)).items()
            if (value := getattr(self, name)) is not field.default
            and value != field.default
        }


class Field(typing.NamedTuple):
    """An option as it is documented and checked.

    Attributes:
        name: Its name.
        kinds: The types and words that a value may be of, without None.
        optional: Whether None is allowed.
        default: Its default.
        doc: One line.
        range: Its limits.
    """

    name: str
    kinds: tuple[Any, ...]
    optional: bool
    default: Any
    doc: str
    range: Range

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a value may be."""
        literal = [k for k in self.kinds if typing.get_origin(k) is Literal]
        words = [word for kind in literal for word in typing.get_args(kind)]
        return (*words, *(self.range.choices or ()))

    @property
    def plain(self) -> type | None:
        """The type of a value in a config file; None if it has no such type."""
        plain = [kind for kind in self.kinds if kind in (bool, int, float, str)]
        if plain:
            return plain[0]
        return str if self.words else None

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        names = {bool: "True or False", int: "a whole number", float: "a number"}
        found = []
        for kind in self.kinds:
            if typing.get_origin(kind) is tuple:
                examples = {int: (30, 60), float: (0.5, 0.5), str: ("a", "b")}
                example = examples[typing.get_args(kind)[0]]
                found.append(f"values in brackets, such as {example}")
            elif kind in names:
                bounds = str(self.range) if kind is not bool else ""
                found.append(f"{names[kind]} {bounds}".strip())
            elif kind in (str, Path):
                if not self.words and "a string" not in found:
                    found.append("a string")
            elif isinstance(kind, type):
                found.append(f"a {kind.__name__}")
            elif typing.get_origin(kind) is not Literal:
                found.append("a function")
        if self.words:
            found.append(" or ".join(repr(word) for word in self.words))
        if self.optional:
            found.append("None")
        if isinstance(self.default, float) and self.default:
            found[0] += f", such as {self.default:g}"
        return " or ".join(found)


def fields_of(section: type) -> dict[str, Field]:
    """The options of a dataclass by name, in order."""
    return _fields_of(section)


@functools.cache
def _fields_of(section: type) -> dict[str, Field]:
    hints = typing.get_type_hints(section)
    found = {}
    for field in dataclasses.fields(section):
        if "doc" not in field.metadata:
            continue  # Not an option but a part of what the class is.
        hint = hints[field.name]
        union = isinstance(hint, types.UnionType) or (
            typing.get_origin(hint) is typing.Union
        )
        kinds = typing.get_args(hint) if union else (hint,)
        found[field.name] = Field(
            field.name,
            tuple(kind for kind in kinds if kind is not type(None)),
            type(None) in kinds,
            field.default,
            field.metadata["doc"],
            field.metadata["range"],
        )
    return found


def plain(value: Any) -> Any:
    """The Python number of a NumPy or JAX scalar; anything else as it is.

    Example:
        >>> from woodfisher_jax.options import plain
        >>> plain(jnp.float32(0.5)), plain(np.int64(3)), plain("auto")
        (0.5, 3, 'auto')
    """
    # What jit traces has no value yet; a check of the option then says what came.
    is_scalar = isinstance(value, (np.generic, np.ndarray, jax.Array))
    if not is_scalar or value.shape or isinstance(value, jax.core.Tracer):
        return value
    return value.item()


def checked(field: Field, value: Any) -> Any:
    """The value of an option as a plain Python value.

    Raises:
        OptionError: If it is not what the field allows.
    """
    value = plain(value)
    if value is None and field.optional:
        return None
    if field.words:
        if isinstance(value, str) and value in field.words:
            return value
        kinds = [kind for kind in field.kinds if kind in (bool, int, float)]
    else:
        kinds = list(field.kinds)
    # True is a whole number to Python, but never meant as one.
    is_bool = isinstance(value, bool)
    for kind in kinds:
        if kind is bool and is_bool:
            return bool(value)
        if kind in (int, float):
            abstract = numbers.Integral if kind is int else numbers.Real
            is_number = isinstance(value, abstract) and not is_bool
            if is_number and field.range.holds(value):
                return kind(value)
        elif kind in (str, Path):
            if isinstance(value, kind):
                return value
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            if isinstance(value, (list, tuple)):
                items = tuple(map(plain, value))
                if all(
                    type(one) is item and (item is str or field.range.holds(one))
                    for one in items
                ):
                    return items
        elif kind is not bool:
            fits = (
                isinstance(value, kind) if isinstance(kind, type) else callable(value)
            )
            if fits:
                return value
    word = value if isinstance(value, str) else ""
    close = difflib.get_close_matches(word[:LONGEST_SHOWN], field.words, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    for kind in kinds:
        if kind in (int, float):
            hint = hint or meant(value, field.range, kind)
    message = f"{field.name}={shown(value)}; expected {field.expected}{hint}"
    raise OptionError(field.name, message)


def meant(value: Any, limits: Range, kind: type = float) -> str:
    """The number that a string, or one in per cent, may be meant as, for a message.

    Args:
        value: What came in place of a number.
        limits: Of the number.
        kind: ``int`` or ``float``.

    Returns:
        The end of the message; "" where nothing is plain.

    Example:
        >>> from woodfisher_jax.options import Range, meant
        >>> share = Range(least=0, below=1)
        >>> meant(90, share), meant("0.9", share), meant(-1, share)
        ('; did you mean 0.9?', '; did you mean 0.9?', '')
    """
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        return ""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return ""
    lowest = limits.least if limits.above is None else limits.above
    highest = limits.most if limits.below is None else limits.below
    is_share = kind is float and (lowest, highest) == (0, 1)
    # A number that is only a little above 1 is no per cent.
    if is_share and (number >= 5 or text.endswith("%")):
        number /= 100
    if not limits.holds(number) or (kind is int and number % 1):
        return ""
    return f"; did you mean {int(number) if kind is int else f'{number:g}'}?"


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises unless an argument that is no field is a whole number.

    Raises:
        OptionError: Naming the argument, what was expected and what came.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise OptionError(
            name, f"{name}={shown(value)}; expected a whole number from {least}"
        )


def check_fraction(name: str, value: Any, otherwise: str = "") -> float:
    """An argument that is no field as a fraction, such as a sparsity.

    Args:
        name: Of the argument.
        value: What was given.
        otherwise: What else it may be, for the message.

    Raises:
        OptionError: Naming the argument, what was expected and what came.
    """
    number, limits = plain(value), Range(least=0, below=1)
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not limits.holds(number):
        raise OptionError(
            name,
            f"{name}={shown(number)}; expected a fraction {limits}{otherwise}"
            f"{meant(number, limits)}",
        )
    return float(number)


LONGEST_SHOWN = 100
"""Characters of a value in a message."""


def shown(value: Any) -> str:
    """A value for a message: one line, not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # Any, of any class; of an integer with thousands of digits too.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


OTHER_WORDS = {
    "amount": "sparsity",
    "flops": "flops_target",
    "macs": "flops_target",
    "parameters": "size",
}
"""Names that other calls and libraries have for an option."""


def check_known(name: str, known: Iterable[str], where: str) -> None:
    """Raises unless a name is known; the message has the nearest one.

    Raises:
        OptionError: Naming what there is.
    """
    names = list(known)
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=1)
    if OTHER_WORDS.get(name) in names:
        close = [OTHER_WORDS[name]]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        name, f"{where} has no option {shown(name)}{hint} (it has {', '.join(names)})"
    )


def keywords(*functions: Callable[..., Any]) -> list[str]:
    """The names of arguments that functions take by name alone."""
    every = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return [p.name for p in every if p.kind is p.KEYWORD_ONLY]


def table(section: type) -> list[tuple[str, str, str, str]]:
    """Name, values, default and line of every option, for documentation."""
    return [
        (name, field.expected, repr(field.default), field.doc)
        for name, field in fields_of(section).items()
    ]


def split(
    given: Mapping[str, Any], *sections: Options, where: str
) -> tuple[Options, ...]:
    """Dataclasses of options with the given values, each where it belongs.

    Args:
        given: Values by name.
        *sections: What the values replace fields of; the first that has a field takes
            its value.
        where: Whose options these are, for the message.

    Raises:
        OptionError: If none has such an option, or a value is out of range.
    """
    owners = [fields_of(type(section)) for section in sections]
    known = [name for owner in owners for name in owner]
    changes: list[dict[str, Any]] = [{} for _ in sections]
    for name, value in given.items():
        check_known(name, known, where)
        owner = next(i for i, fields in enumerate(owners) if name in fields)
        changes[owner][name] = value
    return tuple(
        section.replace(**change)
        for section, change in zip(sections, changes, strict=True)
    )
