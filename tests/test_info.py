"""Several steps told as one."""

import pytest

from woodfisher_jax.info import SUMS, PruneInfo, joined


def info(**changed) -> PruneInfo:
    return PruneInfo(0.5, 5, 10, {"w": 0.5}, 3, 1.0, 2.0, 4.0)._replace(**changed)


def test_one_step_is_itself() -> None:
    assert joined([info()]) == info()


def test_times_and_increases_add_up_and_the_rest_is_the_last() -> None:
    first = info(saliency_sum=0.25, predicted_loss_increase=1.0, macs=9.0)
    last = info(sparsity=0.9, saliency_sum=0.5, predicted_loss_increase=2.0, macs=4.0)
    found = joined([first, last])
    assert (found.sparsity, found.macs) == (0.9, 4.0)
    assert (found.saliency_sum, found.predicted_loss_increase) == (0.75, 3.0)
    assert (found.seconds_gradients, found.seconds_update) == (2.0, 8.0)
    assert found.gradient_term is None


@pytest.mark.parametrize("name", SUMS)
def test_a_figure_that_one_step_lacks_has_no_sum(name) -> None:
    assert getattr(joined([info(**{name: 1.0}), info(**{name: None})]), name) is None
