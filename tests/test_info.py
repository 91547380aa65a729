"""The figures of a step as a table, and those of several steps as those of one."""

import html
import re
import threading
from html.parser import HTMLParser

import pytest

from woodfisher_jax.info import (
    MOST_TENSORS,
    SUMS,
    Clock,
    PruneInfo,
    PruneWarning,
    Trial,
    joined,
    unwarned,
    warn_of,
)


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


FULL = info(
    sparsity_by_path={"a<b": 0.25, "fc2/kernel": 1.0},
    saliency_sum=0.0123,
    predicted_loss_increase=-0.5,
    measured_loss_increase=0.0625,
    trials=(Trial(1e-4, 0.25), Trial(1e-3, 0.125)),
    macs=12.3e6,
    empty_outputs={"a<b": 3, "fc2/kernel": 10},
    saliency_histogram={"kept": [0] * 40},
    warnings=("no weight is left of 'fc2/kernel'",),
)


def test_a_printed_info_is_a_short_table() -> None:
    assert str(FULL).splitlines() == [
        "50.00 % sparse: 5 of 10 prunable weights left",
        "",
        "a<b          25.00 %",
        "fc2/kernel  100.00 %",
        "",
        "predicted  loss changes by +0.0123 (sum of saliencies)",
        "predicted  loss changes by -0.5 (the step as a whole)",
        "measured   loss changes by +0.0625 on the samples",
        "measured   0.125 on held_out (damping 0.001)",
        "MACs       12.3 M an example",
        "empty      outputs without a weight left: fc2/kernel 10, a<b 3",
        "seconds    7.00 (gradients 1.00, curvature 2.00, update 4.00)",
        "samples    3 gradients",
        "warning    no weight is left of 'fc2/kernel'",
    ]


def test_what_is_not_known_is_not_printed() -> None:
    found = str(info(num_samples=0))
    for word in (
        "predicted",
        "measured",
        "MACs",
        "empty",
        "samples",
        "warning",
        "None",
    ):
        assert word not in found


def test_what_is_predicted_of_targets_is_no_loss() -> None:
    found = str(info(saliency_sum=-0.25, objective="distance"))
    line = "predicted  squared distance from targets / 2 changes by -0.25 (sum of sa"
    assert line in found
    assert "loss" not in found
    found = str(info(saliency_sum=-0.25, outputs_error=0.125))
    assert "measured   outputs differ by 0.125 (relative square)" in found
    assert "predicted" not in found


def test_of_many_layers_with_empty_outputs_the_first_are_shown() -> None:
    empty = {f"fc{i}": i for i in range(1, 7)}
    line = "fc6 6, fc5 5, fc4 4, fc3 3 and 2 layers more: info.empty_outputs"
    assert line in str(info(empty_outputs=empty))


def test_an_info_in_a_list_is_one_line() -> None:
    assert repr([FULL]) == (
        "[PruneInfo(sparsity=0.5000, nonzero=5, prunable=10, seconds=7.00, warnings=1)]"
    )


def test_a_deep_network_does_not_fill_the_screen() -> None:
    levels = {f"conv{i}": i / 100 for i in range(60)}
    found = info(sparsity_by_path=levels)
    assert len(str(found).splitlines()) == MOST_TENSORS + 5
    more = "41 more, 19.00 to 59.00 %: info.sparsity_by_path"
    assert more in str(found)
    assert more in found._repr_html_()
    levels = {f"conv{i}": i / 100 for i in range(MOST_TENSORS)}
    assert "more" not in str(info(sparsity_by_path=levels))


def test_a_notebook_shows_the_same_in_its_own_colours() -> None:
    found = FULL._repr_html_()
    opened: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs) -> None:
            if tag != "br":
                opened.append(tag)

        def handle_endtag(self, tag) -> None:
            assert opened.pop() == tag

    Balanced().feed(found)
    assert not opened
    assert "a&lt;b" in found
    assert "width:25.0%" in found
    for line in str(FULL).splitlines()[5:]:
        name, text = re.split("  +", line)
        assert f"<b>{name}</b> {html.escape(text)}" in found
    # No colour that only one of light and dark can show.
    assert not re.search(r"#[0-9a-f]{3}\b|black|white", found.replace("&#x27;", ""))


def test_what_one_thread_keeps_silent_another_says() -> None:
    inside, done = threading.Event(), threading.Event()

    def silent() -> None:
        with unwarned():
            warn_of([info(warnings=("hidden",))], stacklevel=1)
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=silent)
    thread.start()
    inside.wait(10)
    with pytest.warns(PruneWarning, match="shown"):
        warn_of([info(warnings=("shown",))], stacklevel=1)
    done.set()
    thread.join()
