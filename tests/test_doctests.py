"""The examples in docstrings are true."""

import doctest
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import optax
import pytest

import woodfisher_jax as wf

MODULES = [
    *("prune", "step", "masked", "batch_norm", "schedules", "selection.findings"),
    *("equations.fisher", "equations.joint", "equations.obs", "equations.products"),
    *("trees.masks", "trees.blocks", "trees.paths"),
    *("rows.gradients", "rows.projections", "curvature.checked"),
    *("stages.matching", "stages.damping_search", "stages.distillation"),
    *("models.resizing", "weights.latency", "weights.sparse_files"),
]
COMPILE = ("stages.", "curvature.", "equations.fisher")
NAMES = {"jax": jax, "jnp": jnp, "optax": optax, "wf": wf}
"""What an example need not import."""


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=NAMES)
    # jit wraps a function, and the finder passes over what it wraps.
    known = {test.name for test in found}
    for name, value in vars(module).items():
        wrapped = getattr(value, "__wrapped__", None)
        own = getattr(value, "__module__", None) == module.__name__
        if wrapped and own and f"{module.__name__}.{name}" not in known:
            found += doctest.DocTestFinder().find(wrapped, name, extraglobs=NAMES)
    return [test for test in found if test.examples]


@pytest.mark.parametrize(
    "name",
    [
        # They compile what the tests of these modules do as well.
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith(COMPILE))
        for name in MODULES
    ],
)
def test_examples_are_true(name: str) -> None:
    module = importlib.import_module(f"woodfisher_jax.{name}")
    examples = examples_of(module)
    assert examples
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for test in examples:
        said: list[str] = []
        runner.run(test, out=said.append)
        assert not said, "".join(said)


def test_a_false_example_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "false", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


def test_every_public_function_has_an_example() -> None:
    for name in wf.__all__:
        value = getattr(wf, name)
        if callable(value) and not isinstance(value, type):
            assert ">>>" in (value.__doc__ or ""), name
