"""The table of methods, and options that contradict one another, without any step."""

import re

import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax import METHODS, OptionError, WoodFisher
from woodfisher_jax.curvature.fisher import Surgeon
from woodfisher_jax.methods import (
    applicable,
    check_together,
    having,
    method_named,
    options_of,
    resolve,
    scope_of,
)
from woodfisher_jax.options import fields_of
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import SCOPES, Goal

OWN = {f.name: f for row in METHODS.values() for f in fields_of(type(row)).values()}


def check(method="woodfisherblock", mean_samples=None, targets=None, **options):
    """What ``prune`` checks before it looks at arrays."""
    given = {"sparsity": 0.5, **options}
    row, goal, compute = resolve(method, Compute(), given)
    check_together(method, row, goal, mean_samples, targets)
    return row, goal, compute


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete(name) -> None:
    row = METHODS[name]
    assert method_named(name) is method_named(row) is row
    assert row.summary
    assert set(row.scopes) <= set(SCOPES)
    assert row.moves == isinstance(row, Surgeon)
    assert not row.first_order or isinstance(row, WoodFisher)


@pytest.mark.parametrize("name", METHODS)
def test_an_option_is_taken_by_the_methods_that_have_it(name) -> None:
    mine = fields_of(type(METHODS[name]))
    for option, field in OWN.items():
        values = {option: field.default}
        if option in mine:
            assert getattr(check(name, **values)[0], option) == field.default
            assert applicable(name, values) == values
            continue
        assert applicable(name, values) == {}
        message = f"{option} is no option of method='{name}'; expected a method that "
        with pytest.raises(OptionError, match=re.escape(message)) as caught:
            check(name, **values)
        assert str(having(option)) in str(caught.value)
        assert name not in having(option)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_every_word_that_its_options_list(name) -> None:
    kind = type(METHODS[name])
    for option, field in fields_of(kind).items():
        for word in field.words:
            assert getattr(kind(**{option: word}), option) == word


def test_options_replace_fields_of_the_named_method() -> None:
    row, goal, compute = check("woodtaylor", damping=1, recompute=2, solver="dense")
    assert row == METHODS["woodtaylor"].replace(damping=1.0)
    assert goal == Goal(sparsity=0.5, scope="global", recompute=2)
    assert compute == Compute(solver="dense")
    assert check(WoodFisher(block_size=5), damping=1)[0] == WoodFisher(
        damping=1.0, block_size=5
    )
    assert options_of("kfac") == (type(METHODS["kfac"]), Goal, Compute)


def test_an_unknown_method_lists_the_known_and_the_closest() -> None:
    with pytest.raises(OptionError, match="method='woodfischer'") as caught:
        check("woodfischer")
    assert all(repr(name) in str(caught.value) for name in METHODS)
    assert "Did you mean 'woodfisher'?" in str(caught.value)
    with pytest.raises(OptionError, match=r"wf.prune_layerwise\(net_fn"):
        method_named("layerwise")
    with pytest.raises(OptionError, match="choose from") as caught:
        method_named("xyz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_scope_the_method_has_is_taken_and_any_other_refused(name) -> None:
    scopes = METHODS[name].scopes
    assert scope_of(name, None) == check(name)[1].scope == scopes[0]
    for scope in SCOPES:
        if scope in scopes:
            assert check(name, scope=scope)[1].scope == scope
            continue
        message = f"scope='{scope}' with method='{name}'; expected one of {[*scopes]}"
        with pytest.raises(OptionError, match=re.escape(message)):
            check(name, scope=scope)


def test_a_scope_that_another_method_has_is_said_with_its_name() -> None:
    with pytest.raises(OptionError, match=r"expected one of .*, or method='magni'"):
        check("globalmagni", scope="layer")


NUMBERS = np.ones(3)
FIRST_ORDER = {"method": "woodtaylorblock"}
JOINT = {"update": "joint"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": None}, "sparsity=None and flops_target=None; expected exactly"),
        ({"flops_target": 1.0}, "sparsity=0.5 and flops_target=1.0; expected exactly"),
        ({"flops_power": 1.0, "scope": "layer"}, "scope='layer'.*expected .*global"),
        (
            {"method": "magni", "flops_power": 1.0},
            "flops_power=1.0.*threshold for each layer",
        ),
        ({"method": "naivehess", "flops_power": 1.0}, "flops_power=1.0.*negative"),
        (
            {"recompute_degree": 2.0},
            "recompute_degree=2.0.*expected None, or recompute",
        ),
        ({"damping": "automatic"}, "damping='automatic'; expected a number.*'auto'"),
        ({"damping": "auto", "weight_decay": 0.1}, "expected weight_decay=0, or a num"),
        (
            {"damping": "auto", "method": "kfac"},
            "damping='auto'; expected a number from 1e-30 to 1e.30, such as 1e-05$",
        ),
        ({"method": "naivehess", "num_probes": 8}, "num_probes=8.*'hutchinson'"),
        ({**FIRST_ORDER, **JOINT, "centered": True}, "expected centered=False"),
        ({"mean_samples": NUMBERS}, "mean_samples has no meaning.*'woodtaylor'"),
        ({"targets": NUMBERS}, "targets has no meaning.*'woodtaylor'"),
        (
            {**FIRST_ORDER, "targets": NUMBERS, "mean_samples": NUMBERS},
            "targets are values for the rows of one Fisher",
        ),
        ({**FIRST_ORDER, "targets": NUMBERS, "recompute": 1}, "targets are values for"),
        ({**FIRST_ORDER, **JOINT, "mean_samples": NUMBERS}, "mean_samples with update"),
        ({"swaps": 3}, "swaps=3 with update='sum'; expected update='joint'"),
        ({"swaps": 3, **JOINT, "scope": "layer"}, "swaps=3 with scope='layer'"),
        ({"swaps": 3, **JOINT, "pattern": "4x1"}, "swaps=3.*pattern="),
        ({"swaps": 3, **JOINT, "flops_power": 1.0}, "swaps=3.*flops_power=1.0"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity=0.6.*'2:4', which has 0.5"),
        ({"pattern": "2:4", "flops_power": 1.0}, "flops_power=1.0; expected 0"),
        ({"pattern": "4x1", "flops_target": 0.001}, "flops_target=0.001; expected a"),
        ({"pattern": "heads:2", "scope": "layer"}, "scope='layer'.*cross tensors"),
        ({"pattern": "rows"}, "pattern='rows'; expected one of"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        check(**options)


def test_a_pattern_has_the_sparsity_of_its_own() -> None:
    _, goal, _ = check(pattern="1:4", sparsity=None)
    assert goal.sparsity == 0.75
    assert goal.completes_pattern
    assert not check(pattern="1:4", sparsity=0.7)[1].completes_pattern


@pytest.mark.parametrize(
    ("given", "degree"),
    [
        ({"recompute_schedule": "linear"}, 1.0),
        ({"recompute_schedule": "poly"}, 3.0),
        ({"recompute_schedule": "poly", "recompute_degree": 2}, 2.0),
        ({"recompute_schedule": "exponential"}, None),
    ],
)
def test_the_degree_of_the_way_to_the_target(given, degree) -> None:
    assert Goal(**given).degree == degree


@pytest.mark.parametrize(
    ("function", "name", "nearest"),
    [
        (wf.prune, "prunables", "prunable"),
        (wf.prune, "patern", "pattern"),
        (wf.plan_pruning, "diagnostic", "diagnostics"),
        (wf.prune_searched, "factr", "factor"),
        (wf.prune_matched, "repair", "repairs"),
    ],
)
def test_a_misspelt_argument_has_a_suggestion(function, name, nearest) -> None:
    given = [None] * (4 if function is wf.prune_searched else 2)
    message = f"wf.{function.__name__} with method='.*' has no option '{name}'; did "
    with pytest.raises(OptionError, match=f"{message}you mean '{nearest}'"):
        function(*given, sparsity=0.5, **{name: 1})
