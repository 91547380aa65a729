"""Entries of axes: met one to one, cut into products, taken out together."""

import itertools
import random
from collections.abc import Sequence

import numpy as np

from woodfisher_jax.tracing.entries.units import STAYS, Axis, Units


def left(units: Units, axis: Axis, gone: set[int]) -> list[int]:
    return [i for i, e in enumerate(axis) if not gone & {*units.classes(e)}]


def cut(units: Units, array: np.ndarray, axes: Sequence[Axis], gone: set[int]):
    for i, axis in enumerate(axes):
        array = array.take(left(units, axis, gone), axis=i)
    return array


def alone(units: Units, axis: Axis, entry: int) -> list[int]:
    """What goes of an axis with each unit of an entry."""
    return [
        len(axis) - len(left(units, axis, {unit}))
        for unit in units.classes(axis[entry])
    ]


def test_entries_that_meet_go_together() -> None:
    units = Units()
    a, b, c = (units.axis(3) for _ in range(3))
    units.unify(a, b)
    units.unify(b, c)
    assert [units.classes(e) for e in a] == [units.classes(e) for e in c]
    units.fix(c[1:2], "is read elsewhere")
    assert [units.reason(u) for (u,) in a] == ["", "is read elsewhere", ""]
    assert units.axis(1) == STAYS


def test_an_axis_that_is_cut_loses_rows_or_columns() -> None:
    units = Units()
    axis = units.axis(6)
    rows, columns = units.reshaped([axis], (2, 3))
    assert (len(rows), len(columns)) == (2, 3)
    assert sorted(alone(units, axis, 4)) == [2, 3]
    (joined,) = units.reshaped([rows, columns], (6,))
    assert [units.classes(e) for e in joined] == [units.classes(e) for e in axis]


def test_an_axis_that_is_joined_and_cut_otherwise_stays() -> None:
    units = Units()
    a, b = units.axis(4), units.axis(9)
    for axis in (a, b, *units.reshaped([a, b], (6, 6))):
        assert all(units.reason(u) for e in axis for u in units.classes(e))


def test_rows_of_several_axes_meet_rows_of_one() -> None:
    """Keys by their queries by what is in a head, and heads by what is in them."""
    units = Units()
    keys, queries, heads = units.axis(3), units.axis(2), units.axis(6)
    inside, other = units.axis(4), units.axis(4)
    (flat,) = units.reshaped([keys, queries, inside], (24,))
    (read,) = units.reshaped([heads, other], (24,))
    units.unify(read, flat)
    assert [units.classes(e) for e in inside] == [units.classes(e) for e in other]
    assert [{*units.classes(e)} for e in heads] == [
        {*units.classes(k), *units.classes(q)} for k in keys for q in queries
    ]
    assert not any(units.reason(c) for e in flat for c in units.classes(e))
    # Of which the rows do not fit one another.
    a, b = units.axis(4), units.axis(6)
    (cut,) = units.reshaped([units.axis(2), units.axis(4), units.axis(3)], (24,))
    (otherwise,) = units.reshaped([a, b], (24,))
    units.unify(cut, otherwise)
    assert all(units.reason(u) for e in otherwise for u in units.classes(e))


def test_products_that_meet_products_go_part_by_part() -> None:
    units = Units()
    a, b = units.axis(6), units.axis(6)
    rows, columns = units.reshaped([a], (2, 3))
    others, inner = units.reshaped([b], (2, 3))
    units.unify(a, b)
    assert [units.classes(e) for e in others] == [units.classes(e) for e in rows]
    assert [units.classes(e) for e in inner] == [units.classes(e) for e in columns]


def test_products_of_other_shapes_that_meet_stay() -> None:
    """Six as 2 x 3 and as 3 x 2: no entry but the whole axis goes alone in both."""
    units = Units()
    a, b = units.axis(6), units.axis(6)
    units.reshaped([a], (2, 3))
    units.reshaped([b], (3, 2))
    units.unify(a, b)
    for gone in range(40):
        assert left(units, a, {gone}) == left(units, b, {gone}) or units.reason(gone)


def test_marks_and_reasons_pass_to_the_parts_of_a_unit() -> None:
    units = Units()
    fixed, heads = units.axis(4, "is an input"), units.axis(4)
    units.mark_heads(heads)
    for axis in (fixed, heads):
        units.reshaped([axis], (2, 2))
    parts = [u for e in fixed for u in units.classes(e)]
    assert {units.reason(u) for u in parts} == {"is an input"}
    assert all(units.is_head(u) for e in heads for u in units.classes(e))


def factors(number: int) -> list[tuple[int, ...]]:
    """All shapes of up to three axes."""
    sizes = [n for n in range(1, number + 1) if number % n == 0]
    return [
        shape
        for rank in (1, 2, 3)
        for shape in itertools.product(sizes, repeat=rank)
        if np.prod(shape) == number
    ]


def test_what_is_left_of_reshaped_arrays_is_the_reshaped_rest() -> None:
    """Three reshapes, transposes and sums with others, any free units taken out."""
    choice = random.Random(0)
    removed = 0
    for _ in range(40):
        units = Units()
        number = choice.choice([4, 6, 8, 12])
        shape = choice.choice(factors(number))
        array, axes = np.arange(number).reshape(shape), [units.axis(n) for n in shape]
        steps = [(array, axes)]
        for _ in range(3):
            if choice.random() < 0.4:
                order = choice.sample(range(array.ndim), array.ndim)
                array, axes = array.transpose(order), [axes[i] for i in order]
                steps.append((None, order))
            shape = choice.choice(factors(number))
            axes = units.reshaped(axes, shape)
            array = array.reshape(shape)
            assert [len(axis) for axis in axes] == [*shape]
            steps.append((array, axes))
            if choice.random() < 0.3:
                # Met by another array that was put together in its own way.
                other = choice.choice(factors(number))
                own = units.reshaped([units.axis(n) for n in other], shape)
                for mine, theirs in zip(axes, own, strict=True):
                    units.unify(mine, theirs)
        classes = {
            c
            for a, x in steps
            if a is not None
            for s in x
            for e in s
            for c in units.classes(e)
            if not units.reason(c)
        }
        gone = {c for c in classes if choice.random() < 0.4}
        small = cut(units, *steps[0], gone)
        removed += 0 < small.size < number
        for array, axes in steps[1:]:
            if array is None:
                small = small.transpose(axes)
                continue
            wanted = cut(units, array, axes, gone)
            small = small.reshape(wanted.shape)
            np.testing.assert_array_equal(small, wanted)
    assert removed > 10
