"""What a step may take of the machine."""

import pytest

from woodfisher_jax.equations.fisher import SOLVERS, choose_solver
from woodfisher_jax.rows.compute import STORES, Compute
from woodfisher_jax.selection.goal import Goal


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_a_block_has_the_solver_given_or_the_cheaper_one(solver) -> None:
    for num_samples, width in ((10, 100), (100, 10)):
        expected = choose_solver(num_samples, width) if solver == "auto" else solver
        assert Compute(solver=solver).solver_for(num_samples, width) == expected


def test_progress_is_passed_on_where_it_is_wanted() -> None:
    seen = []
    Compute().report("gradients", 1, 2)
    Compute(progress=lambda *args: seen.append(args)).report("gradients", 1, 2)
    assert seen == [("gradients", 1, 2)]


def test_nothing_of_it_is_part_of_the_goal() -> None:
    assert not set(vars(Compute())) & set(vars(Goal()))
    assert [Compute(store=store).store for store in STORES] == list(STORES)
