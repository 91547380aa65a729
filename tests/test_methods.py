"""The table of methods is complete, and its errors help."""

import dataclasses
import inspect

import numpy as np
import pytest
from woodfisher_jax.curvature.operators import BUILDERS, PLANNERS

from woodfisher_jax import prune
from woodfisher_jax.methods import (
    CURVATURES,
    METHODS,
    OPTIONS,
    check_options,
    method_named,
    scope_of,
)
from woodfisher_jax.training.sections import PruneConfig


def test_the_table_holds_every_method_of_the_original() -> None:
    assert set(METHODS) == {
        "woodfisher",
        "woodfisherblock",
        "woodfisherblockdynamic",
        "woodfisherblockgroup",
        "woodfisherblock_flops",
        "woodtaylor",
        "woodtaylorblock",
        "kfac",
        "diagfisher",
        "naivehess",
        "globalmagni",
        "magni",
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_consistent(name) -> None:
    row = METHODS[name]
    assert row.summary
    assert row.scopes
    assert set(row.scopes) <= {"global", "layer"}
    assert row.curvature in (None, *CURVATURES)
    assert (row.layout is not None) == (row.curvature == "inverse")
    damped = row.curvature in ("inverse", "kronecker")
    assert (row.direction is not None) == damped
    assert not row.first_order or damped


def test_each_kind_of_curvature_has_a_builder_and_a_plan() -> None:
    assert tuple(BUILDERS) == tuple(PLANNERS) == CURVATURES


def all_options() -> dict:
    """A value of each option that is not its default."""
    return {
        "damping": 1e-3,
        "block_size": 7,
        "solver": "dense",
        "store": "host",
        "store_dtype": "bfloat16",
        "scale_update": 0.5,
        "weight_decay": 1e-4,
        "centered": True,
        "mean_samples": np.ones((3, 2)),
        "targets": np.ones(3),
        "auto_damping": True,
        "damping_search_samples": 9,
        "match": "outputs",
        "normalize_update": 1.0,
        "swaps": 20,
        "update": "joint",
        "pi": True,
        "hessian": "hutchinson",
        "num_probes": 8,
        "probe_seed": 3,
        "flops_power": 0.5,
        "flops_per_parameter": True,
        "flops_normalize": "log",
        "flops_target": 1.0,
        "recompute": 2,
    }


def test_the_options_are_those_of_prune_with_its_defaults() -> None:
    signature = inspect.signature(prune).parameters
    assert set(all_options()) == set(OPTIONS)
    run = {field.name: field.default for field in dataclasses.fields(PruneConfig)}
    of_runs = {"auto_damping", "damping_search_samples", "match"}
    for name, option in OPTIONS.items():
        default = run[name] if name in of_runs else signature[name].default
        assert default == option.default


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", METHODS)
def test_an_option_is_taken_where_it_makes_sense_and_else_refused(name, option) -> None:
    check_options(name, {option: OPTIONS[option].default})
    given = {option: all_options()[option]}
    if OPTIONS[option].applies(METHODS[name]):
        check_options(name, given)
        return
    with pytest.raises(ValueError, match=rf"{option}.*makes no sense") as caught:
        check_options(name, given)
    assert f"method={name!r}" in str(caught.value)
    assert all(
        repr(other) in str(caught.value)
        for other, row in METHODS.items()
        if OPTIONS[option].applies(row)
    )


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
        ("woodtaylorblock", "global"),
        ("kfac", "global"),
        ("naivehess", "global"),
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
