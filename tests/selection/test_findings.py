"""What a step is looked at for."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.selection import findings
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.blocks import flat_order

TENSORS = {"fc/kernel": jnp.ones((2, 3)), "stack": jnp.ones((2, 2, 2))}
ORDER = flat_order(TENSORS, {"stack": WeightAxes((2, 2, 2), "iso")})


def test_the_share_of_each_tensor_that_no_sample_touched() -> None:
    touched, active = np.ones(14, bool), np.ones(14, bool)
    touched[:3], active[0] = False, False
    found = findings.untouched(touched, active, ORDER)
    assert found == {"fc/kernel": pytest.approx(2 / 5), "stack": 0}


def test_no_information_at_all_is_refused() -> None:
    active = np.arange(14) < 4
    with pytest.raises(ValueError, match=r"no weight has a gradient.*running averages"):
        findings.untouched(np.arange(14) > 8, active, ORDER)


def test_a_tensor_without_weights_lacks_no_gradient() -> None:
    none = np.zeros(14, bool)
    assert findings.untouched(none, none, ORDER) == {"fc/kernel": 0.0, "stack": 0.0}


def test_a_layer_without_weights_is_named_also_in_a_stack() -> None:
    before, after = np.ones(14, bool), np.ones(14, bool)
    after[10:] = False  # the second layer of the stack
    assert findings.emptied(before, after, ORDER) == {"stack[1]": 4}
    before[10:] = False
    after[:6] = False
    assert findings.emptied(before, after, ORDER) == {"fc/kernel": 6}


def test_outputs_without_inputs_are_counted_along_their_axis() -> None:
    mask = np.ones(14, bool)
    mask[2:6] = False  # inputs of two outputs of the kernel
    mask[6:8] = False  # the first output of the first layer
    assert findings.outputs_without_inputs(mask, ORDER) == {"fc/kernel": 2, "stack": 1}
    plain = flat_order({"w": jnp.ones((7, 2))})
    assert findings.outputs_without_inputs(np.zeros(14, bool), plain) == {}


def test_messages_name_tensors() -> None:
    many = {f"w{i}": 1.0 for i in range(10)} | {"seen": 0.5}
    texts = findings.messages(many, {"a": 15, "c": 25}, ["b"])
    assert "does not use 'b'" in texts[0]
    assert "'w7' and 2 more" in texts[1]
    assert "seen" not in texts[1]
    assert "no weight is left of 'a', 'c'; lower sparsity, leave" in texts[2]
    assert findings.messages({"a": 0.0}, {}, []) == []
    (text,) = findings.messages({}, {"a": 15, "c": 25}, [], in_each=True)
    assert "lower sparsity to 0.933, which leaves one in each" in text
