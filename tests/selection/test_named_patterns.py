"""Patterns by their names: what there is, and what is refused."""

import numpy as np
import pytest

from woodfisher_jax.selection.named_patterns import parse
from woodfisher_jax.selection.patterns import groups_of
from woodfisher_jax.trees.blocks import flat_order


def test_a_name_says_what_stays_and_whether_groups_cross_tensors():
    several, blocks, heads, kinds = map(parse, ("2:4", "4x1", "heads:3", "neurons"))
    assert (several.kept, several.size, several.sparsity) == (2, 4, 0.5)
    assert (blocks.kept, blocks.sparsity, blocks.in_tensors) == (None, None, True)
    assert not heads.in_tensors
    assert (heads.kinds, kinds.kinds) == ((), ("neurons",))
    assert parse(None) is None
    assert parse(several) is several


@pytest.mark.parametrize(
    "pattern",
    ["4:2", "0:4", "4:4", "8:16", "0x3", "2:4:8", "head", "2:4 ", "rows", 24, ""],
)
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern="):
        parse(pattern)


@pytest.mark.parametrize(
    ("pattern", "tensors", "message"),
    [
        ("2:4", {"stem/kernel": (3, 3, 3, 8)}, "'stem/kernel'.*3 inputs.*prunable"),
        ("2:4", {"norm/scale": (8,)}, "'norm/scale'.*no inputs"),
        ("4x1", {"norm/scale": (8,)}, "'norm/scale'.*no inputs"),
        ("filters", {"bias": (8,)}, "'bias'.*no inputs"),
        ("heads:4", {"attn/qkv/kernel": (6, 18)}, "'attn/qkv/kernel'.*no heads"),
        ("heads:3", {"mlp/fc1/kernel": (6, 18)}, "'mlp/fc1/kernel'.*prunable"),
        (lambda path, shape: np.zeros(3, int), {"a": (2, 4)}, r"'a'.*shape \(3,\)"),
        (lambda path, shape: np.zeros(4), {"a": (2, 4)}, "float64; expected integers"),
        (lambda path, shape: np.zeros((3, 2, 4), int), {"a": (2, 4)}, "broadcast"),
    ],
)
def test_tensors_that_a_pattern_does_not_fit_are_named(pattern, tensors, message):
    order = flat_order({path: np.ones(shape) for path, shape in tensors.items()})
    with pytest.raises(ValueError, match=message):
        groups_of(parse(pattern), order)


def test_structures_need_a_network():
    with pytest.raises(ValueError, match="not known without a network"):
        groups_of(parse("structures"), flat_order({"a": np.ones((3, 4))}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("structure", "structures"), ("Neurons", "neurons"), ("head", "heads")],
)
def test_a_name_that_is_nearly_one_is_told(name, meant):
    with pytest.raises(ValueError, match=f"did you mean {meant!r}\\?"):
        parse(name)


def test_a_name_like_no_other_has_no_hint():
    with pytest.raises(ValueError, match=r"a function or None$"):
        parse("2-4")
