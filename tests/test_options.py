"""Every option is written once, checked once, and refuses what is out of its range."""

import dataclasses
import inspect
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax import METHODS, OptionError, option, prune
from woodfisher_jax.options import (
    Field,
    Options,
    Range,
    check_fraction,
    check_known,
    checked,
    fields_of,
    split,
    table,
)
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal

SECTIONS = [*dict.fromkeys(map(type, METHODS.values())), Goal, Compute]
EVERY = {
    f"{section.__name__}.{field.name}": field
    for section in SECTIONS
    for field in fields_of(section).values()
}
NUMBERS = [name for name, field in EVERY.items() if {int, float} & {*field.kinds}]
WORDS = [name for name, field in EVERY.items() if field.words or bool in field.kinds]


def refuses(field, value) -> None:
    with pytest.raises(OptionError) as caught:
        checked(field, value)
    assert caught.value.name == field.name
    assert str(caught.value).startswith(f"{field.name}={value!r}; expected ")
    assert field.expected in str(caught.value)


# ------------------------------------------------------------- the options there are


@pytest.mark.parametrize("name", EVERY)
def test_a_default_is_allowed_and_documented(name) -> None:
    field = EVERY[name]
    assert checked(field, field.default) == field.default
    assert field.doc.endswith(".")
    assert field.optional == (field.default is None)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_stays_within_its_range(name) -> None:
    field = EVERY[name]
    kind = int if int in field.kinds else float
    limits, step = field.range, 1 if kind is int else 0.5
    for bound, outside in ((limits.least, -step), (limits.most, step)):
        if bound is not None:
            assert checked(field, kind(bound)) == bound
            assert type(checked(field, np.asarray(bound, kind)[()])) is kind
            refuses(field, kind(bound + outside * max(1, abs(bound))))
    for bound in (limits.above, limits.below):
        if bound is not None:
            refuses(field, kind(bound))
    for value in (math.nan, math.inf, -math.inf, True, "many", [1], None):
        if not (value is None and field.optional):
            refuses(field, value)
    if kind is int:
        refuses(field, 2.5)


@pytest.mark.parametrize("name", WORDS)
def test_a_word_is_one_of_those_there_are(name) -> None:
    field = EVERY[name]
    for word in field.words:
        assert checked(field, word) == word
        assert repr(word) in field.expected
    if bool in field.kinds:
        assert checked(field, np.True_) is True
        refuses(field, 1)
    refuses(field, "no such word")


def test_an_option_has_one_default_wherever_it_is_seen() -> None:
    """In every dataclass, method of the table and argument of ``prune``."""
    seen: dict[str, Field] = {}
    for section in SECTIONS:
        for name, field in fields_of(section).items():
            # Kronecker factors take no damping="auto".
            known = seen.setdefault(name, field)
            assert (known.default, known.range) == (field.default, field.range)
            assert known == field or name == "damping"
    for row in METHODS.values():
        assert row.given() == {}
    signature = inspect.signature(prune).parameters
    shared = set(signature) & set(seen)
    assert shared
    for name in shared:
        assert signature[name].default == seen[name].default


# ------------------------------------------------------------ dataclasses of options


@dataclasses.dataclass(frozen=True)
class Some(Options):
    label: str = ""
    width: int | None = option(None, "How wide.", least=1)
    share: float | Literal["auto"] = option(0.5, "Of it.", least=0, below=1)
    kind: str = option("round", "Of what.", choices=("round", "flat"))
    name: str | None = option(None, "Of whom.")


@dataclasses.dataclass(frozen=True)
class Other(Options):
    height: float = option(2.0, "How high.", above=0, most=3)


def test_values_become_python_s_own() -> None:
    found = Some(width=np.int64(3), share=np.float32(0.25))
    assert (type(found.width), type(found.share)) == (int, float)
    assert Some(share=0).share == 0.0
    assert found.given() == {"width": 3, "share": 0.25}


def test_scalars_of_numpy_and_jax_are_numbers() -> None:
    for array in (np.asarray, jnp.asarray):
        found = wf.WoodFisher(damping=array(0.5), num_samples=array(3))
        assert (found.damping, found.num_samples) == (0.5, 3)
        assert (type(found.damping), type(found.num_samples)) == (float, int)
        field = EVERY["WoodFisher.num_samples"]
        for value in (array([3]), array(2.5), array(True)):
            with pytest.raises(OptionError, match="num_samples="):
                checked(field, value)
    assert wf.WoodFisher(damping=jnp.bfloat16(0.5)).damping == 0.5


def test_a_replaced_value_is_checked_and_an_unknown_name_gets_the_nearest() -> None:
    assert Some().replace(share="auto").share == "auto"
    with pytest.raises(OptionError, match="share=1; expected a number from 0"):
        Some().replace(share=1)
    with pytest.raises(OptionError, match=r"Some has no option 'widht'; did you mean"):
        Some().replace(widht=1)
    with pytest.raises(OptionError, match="it has width, share"):
        check_known("xyz", fields_of(Some), "Some")


def test_words_of_other_calls_and_libraries_are_understood() -> None:
    names = ["sparsity", "flops_target", "masks"]
    for name, other in (("macs", "flops_target"), ("amount", "sparsity")):
        with pytest.raises(OptionError, match=f"did you mean {other!r}"):
            check_known(name, names, "Some")
    # Where that is no option, the nearest is.
    with pytest.raises(OptionError, match="did you mean 'masks'"):
        check_known("macs", ["masks"], "Some")


def test_what_is_expected_is_said_in_words() -> None:
    fields = fields_of(Some)
    assert {name: field.expected for name, field in fields.items()} == {
        "width": "a whole number from 1 or None",
        "share": "a number from 0 and below 1, such as 0.5 or 'auto'",
        "kind": "'round' or 'flat'",
        "name": "a string or None",
    }
    assert [field.plain for field in fields.values()] == [int, float, str, str]
    assert str(Range(above=0, most=3)) == "above 0 to 3"
    assert str(Range()) == ""


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("Goal.sparsity", 90, "; did you mean 0.9?"),
        ("Goal.sparsity", np.float32(37.5), "; did you mean 0.375?"),
        ("Goal.sparsity", "0.9", "; did you mean 0.9?"),
        ("Goal.sparsity", "90 %", "; did you mean 0.9?"),
        ("Goal.sparsity", "1 %", "; did you mean 0.01?"),
        ("WoodFisher.damping", "1e-4", "; did you mean 0.0001?"),
        ("WoodFisher.num_samples", "2000000", "; did you mean 2000000?"),
        ("WoodFisher.num_samples", 30.0, "; did you mean 30?"),
        ("WoodFisher.num_samples", "2.5", ""),
        ("Goal.sparsity", 1.0, ""),
        ("Goal.sparsity", 1.5, ""),
        ("Goal.sparsity", 5000, ""),
        ("Goal.sparsity", math.nan, ""),
        ("Goal.sparsity", "most", ""),
        ("Goal.sparsity", True, ""),
        ("Goal.sparsity", [0.9], ""),
    ],
)
def test_what_a_number_may_be_meant_as_is_asked(name, value, hint) -> None:
    field = EVERY[name]
    with pytest.raises(OptionError) as caught:
        checked(field, value)
    assert str(caught.value).endswith(f"expected {field.expected}{hint}")


def test_a_fraction_that_is_no_field() -> None:
    assert check_fraction("share", np.float32(0.5)) == 0.5
    for value, hint in ((90, "; did you mean 0.9?"), (1, ""), (None, ""), (True, "")):
        with pytest.raises(OptionError) as caught:
            check_fraction("share", value, " or nothing")
        expected = f"share={value}; expected a fraction from 0 and below 1 or nothing"
        assert str(caught.value) == expected + hint


def test_the_table_has_a_line_for_each_option() -> None:
    lines = table(Some)
    assert [line[0] for line in lines] == ["width", "share", "kind", "name"]
    assert lines[2] == ("kind", "'round' or 'flat'", "'round'", "Of what.")


def test_values_by_name_go_where_they_belong() -> None:
    given = {"height": 1, "kind": "flat"}
    assert split(given, Some(), Other(), where="both") == (
        Some(kind="flat"),
        Other(height=1.0),
    )
    with pytest.raises(OptionError, match=r"both has no option 'hight'.*'height'"):
        split({"hight": 1}, Some(), Other(), where="both")
