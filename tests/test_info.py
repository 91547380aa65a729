"""The figures of several steps as those of one."""

import pytest

from woodfisher_jax.info import SUMS, Clock, PruneInfo, joined


def info(**changed) -> PruneInfo:
    return PruneInfo(0.5, 5, 10, {"w": 0.5}, 3, 1.0, 2.0, 4.0)._replace(**changed)


@pytest.mark.parametrize("name", SUMS)
def test_times_and_increases_add_up_unless_one_is_missing(name) -> None:
    steps = [info(**{name: 0.25}), info(**{name: 0.5})]
    assert getattr(joined(steps), name) == 0.75
    assert getattr(joined([*steps, info(**{name: None})]), name) is None


def test_the_rest_is_the_last() -> None:
    found = joined([info(macs=9.0), info(sparsity=0.9, macs=4.0)])
    assert (found.sparsity, found.macs, found.gradient_term) == (0.9, 4.0, None)
    assert joined([info()]) == info()


def test_a_phase_that_is_marked_again_ended_later() -> None:
    clock = Clock()
    for phase in ("gradients", "curvature", "curvature", "update"):
        clock.mark(phase)
    seconds = clock.seconds()
    assert list(seconds) == ["gradients", "curvature", "update"]
    assert all(value >= 0 for value in seconds.values())
