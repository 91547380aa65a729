"""The table of methods is complete, and its errors help."""

import pytest

from woodfisher_jax.pruning.methods import METHODS, method_named, scope_of


def test_the_table_holds_the_methods_of_the_original_that_are_here() -> None:
    assert set(METHODS) == {
        "woodfisher",
        "woodfisherblock",
        "diagfisher",
        "globalmagni",
        "magni",
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_consistent(name) -> None:
    row = METHODS[name]
    assert row.summary
    assert row.scopes
    assert set(row.scopes) <= {"global", "layer"}
    assert row.curvature in (None, "diagonal", "inverse")
    inverse = row.curvature == "inverse"
    assert (row.layout is not None) == inverse
    assert (row.direction is not None) == inverse


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_name(name) -> None:
    assert method_named(name) is METHODS[name]


def test_an_unknown_method_lists_the_known_and_the_closest() -> None:
    with pytest.raises(ValueError, match="method='woodfischer'") as caught:
        method_named("woodfischer")
    message = str(caught.value)
    assert all(repr(name) in message for name in METHODS)
    assert "Did you mean 'woodfisher'?" in message


def test_nothing_is_suggested_when_nothing_is_close() -> None:
    with pytest.raises(ValueError, match="choose from") as caught:
        method_named("xyz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("woodfisher", "global"),
        ("woodfisherblock", "global"),
        ("diagfisher", "global"),
        ("globalmagni", "global"),
        ("magni", "layer"),
    ],
)
def test_the_scope_defaults_to_the_method_s_own(name, default) -> None:
    assert scope_of(name, None) == default


@pytest.mark.parametrize("name", METHODS)
def test_a_scope_the_method_has_is_taken_and_any_other_refused(name) -> None:
    for scope in ("global", "layer", "tensor"):
        if scope in METHODS[name].scopes:
            assert scope_of(name, scope) == scope
        else:
            with pytest.raises(ValueError, match=f"scope='{scope}'") as caught:
                scope_of(name, scope)
            assert f"method='{name}'" in str(caught.value)
            assert str(list(METHODS[name].scopes)) in str(caught.value)
