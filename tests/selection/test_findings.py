"""No gradient before a step, nothing left after it: named, counted, refused."""

import numpy as np
import pytest

from woodfisher_jax.selection import findings
from woodfisher_jax.trees.blocks import flat_order

ORDER = flat_order({"a": np.ones((2, 2), bool), "b": np.ones(3, bool)})
ACTIVE = np.array([1, 1, 0, 1, 1, 1, 1], bool)


def test_shares_are_of_the_weights_that_are_left() -> None:
    touched = np.array([1, 0, 0, 0, 0, 0, 0], bool)
    found = findings.untouched(touched, ACTIVE, ORDER)
    assert found == {"a": pytest.approx(2 / 3), "b": 1.0}
    (text,) = findings.messages(found, [])
    assert "'b'" in text
    assert "'a'" not in text


def test_a_tensor_without_weights_lacks_no_gradient() -> None:
    none = np.zeros(7, bool)
    assert findings.untouched(none, none, ORDER) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("touched", [[0] * 7, [0, 0, 1, 0, 0, 0, 0]])
def test_no_gradient_of_a_weight_that_is_left_is_refused(touched) -> None:
    with pytest.raises(ValueError, match=r"batch norm.*batch_size above 1"):
        findings.untouched(np.array(touched, bool), ACTIVE, ORDER)


def test_tensors_are_named_when_their_last_weight_goes() -> None:
    some, none = np.array([True, False]), np.zeros(2, bool)
    gone = findings.emptied({"a": some, "b": none}, {"a": none, "b": none})
    assert gone == ["a"]
    (text,) = findings.messages({}, gone)
    assert text.startswith("no weight is left of 'a'; lower sparsity")


def test_a_long_list_of_names_is_cut() -> None:
    (text,) = findings.messages({}, [f"layer{i}" for i in range(30)])
    assert "'layer7' and 22 more" in text


@pytest.mark.parametrize(("axes", "expected"), [(None, {"k": 1}), ({"k": 0}, {"k": 2})])
def test_outputs_are_counted_along_their_axis(axes, expected) -> None:
    kernel = np.zeros((3, 2), bool)
    kernel[0, 1] = True
    assert findings.outputs_without_inputs({"k": kernel}, axes) == expected
    masks = {"k": kernel, "bias": np.zeros(2, bool)}
    assert findings.outputs_without_inputs(masks, axes) == expected
