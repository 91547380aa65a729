"""Dimensions: unified, split, and split together."""

from woodfisher_jax.tracing.dimensions.dims import Dims


def test_a_reshape_splits_and_joins() -> None:
    dims = Dims()
    a, b = dims.axis(6), dims.axis(4)
    first, second, third = dims.reshaped([a, b], (2, 12, 1))
    assert third == ()
    assert first == dims.leaves(a[0])[:1]
    assert second == (dims.leaves(a[0])[1], b[0])


def test_unified_dimensions_are_split_together() -> None:
    dims = Dims()
    a, b = dims.axis(6), dims.axis(6)
    dims.unify(a, b)
    heads, _ = dims.reshaped([a], (2, 3))
    own = dims.leaves(b[0])
    assert [dims.sizes[leaf] for leaf in own] == [2, 3]
    assert own[0] != heads[0]
    assert dims.class_of(own[0]) == dims.class_of(heads[0])
    assert dims.class_of(own[1]) != dims.class_of(heads[0])


def test_dimensions_split_apart_are_unified_part_by_part() -> None:
    dims = Dims()
    a, b = dims.axis(12), dims.axis(12)
    (slow, _), (outer, _) = (
        dims.reshaped([a], (2, 6)),
        dims.reshaped([b], (4, 3)),
    )
    dims.unify(a, b)
    assert [dims.sizes[leaf] for leaf in dims.leaves(a[0])] == [2, 2, 3]
    assert [dims.sizes[leaf] for leaf in dims.leaves(b[0])] == [2, 2, 3]
    assert dims.class_of(dims.leaves(outer[0])[0]) == dims.class_of(slow[0])


def test_sizes_that_do_not_factor_give_new_dimensions() -> None:
    dims = Dims()
    a, b = dims.axis(4), dims.axis(9)
    found = dims.reshaped([a, b], (6, 6))
    assert not {d for axis in found for d in axis} & {*a, *b}
    dims.unify(dims.axis(4), dims.axis(6))  # of other lengths: nothing happens
    assert dims.leaves(a[0])
