"""What a step may take of the machine."""

import contextlib

import pytest

from woodfisher_jax import progress
from woodfisher_jax.equations.fisher import SOLVERS, choose_solver
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows import compute
from woodfisher_jax.rows.compute import STORES, Compute, watched
from woodfisher_jax.selection.goal import Goal


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_a_block_has_the_solver_given_or_the_cheaper_one(solver) -> None:
    for num_samples, width in ((10, 100), (100, 10)):
        expected = choose_solver(num_samples, width) if solver == "auto" else solver
        assert Compute(solver=solver).solver_for(num_samples, width) == expected


def test_progress_is_passed_on_where_it_is_wanted() -> None:
    seen = []
    Compute().report("gradients", 1, 2)
    Compute(progress=False).report("gradients", 1, 2)
    Compute(progress=lambda *args: seen.append(args)).report("gradients", 1, 2)
    assert seen == [("gradients", 1, 2)]


def test_lapack_has_one_thread_for_a_while() -> None:
    def threads() -> list[int]:
        return [lib.num_threads for lib in compute._lapack().lib_controllers]

    assert len(threads()) == 1
    with compute._lapack().limit(limits=2):
        before = threads()
        with compute.one_lapack_thread():
            assert threads() == [1]
        assert threads() == before


@watched
def step(**options):
    """What a function makes of its options."""
    return options["progress"]


def test_a_display_is_that_of_the_outermost_call(monkeypatch) -> None:
    shown = []

    @contextlib.contextmanager
    def live(title, quiet):
        shown.append(quiet)
        yield progress.lines()

    monkeypatch.setattr(compute, "live", live)
    outer = watched(lambda **options: (step(**options), options["progress"]))
    inner, own = outer()
    assert inner is own
    assert shown == [False]


@pytest.mark.parametrize(
    "options", [{"progress": False}, {"compute": Compute(progress=False)}]
)
def test_progress_is_off(monkeypatch, options) -> None:
    monkeypatch.setattr(progress, "_view", lambda: pytest.fail("looked for a view"))
    assert step(**options) is progress.silent


def test_only_the_first_process_speaks(monkeypatch) -> None:
    monkeypatch.setattr(progress, "_view", lambda: pytest.fail("looked for a view"))
    monkeypatch.setattr(compute.jax, "process_index", lambda: 1)
    assert step() is progress.silent


def test_a_function_of_ones_own_is_called() -> None:
    def own(label: str, done: int, total: int) -> None: ...

    assert step(progress=own) is own
    assert step(compute=Compute(progress=own)) is own
    with pytest.raises(OptionError, match=r"progress=3; expected .*a function"):
        step(progress=3)


def test_nothing_of_it_is_part_of_the_goal() -> None:
    assert not set(vars(Compute())) & set(vars(Goal()))
    assert [Compute(store=store).store for store in STORES] == list(STORES)
