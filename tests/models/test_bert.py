import jax
import numpy as np
import pytest
from numpy_layers import gelu, softmax, torch_dense
from random_weights import random_variables, shapes_of

import woodfisher_jax as wf
from woodfisher_jax.models.bert import Bert, BertConfig, mean_pooled

TINY = BertConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=1,
    intermediate_size=10,
    num_attention_heads=2,
    max_position_embeddings=5,
    layer_norm_eps=1e-3,
)
TOKENS = np.array([[1, 5, 0, 10], [3, 3, 7, 4]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
TYPES = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])


def layer_norm(x, state, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-3)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def bert_reference(state, tokens, mask, types):
    """One sequence, its padding cut off, and one head at a time."""
    real = mask.astype(bool)
    assert (np.diff(mask) <= 0).all()
    names = ("word", "position", "token_type")
    tables = [state[f"embeddings.{n}_embeddings.weight"] for n in names]
    x = tables[0][tokens] + tables[1][: len(tokens)] + tables[2][types]
    x = layer_norm(x, state, "embeddings.LayerNorm")[real]
    block = "encoder.layer.0"
    names = [f"{block}.attention.self.{n}" for n in ("query", "key", "value")]
    q, k, v = (np.split(torch_dense(x, state, name), 2, -1) for name in names)
    heads = [
        softmax(q[i] @ k[i].T / np.sqrt(TINY.hidden_size // 2)) @ v[i] for i in (0, 1)
    ]
    y = torch_dense(np.concatenate(heads, -1), state, f"{block}.attention.output.dense")
    x = layer_norm(x + y, state, f"{block}.attention.output.LayerNorm")
    y = gelu(torch_dense(x, state, f"{block}.intermediate.dense"))
    y = torch_dense(y, state, f"{block}.output.dense")
    x = layer_norm(x + y, state, f"{block}.output.LayerNorm")
    return x


def test_hidden_states_equal_an_independent_forward_pass():
    model = Bert(TINY)
    variables, state = random_variables(model, TOKENS)

    @jax.jit
    def outputs(variables):
        hidden = model.apply(variables, TOKENS, MASK, TYPES)
        return hidden, mean_pooled(hidden, MASK)

    hidden, pooled = outputs(variables)
    for i, given in enumerate(zip(TOKENS, MASK, TYPES, strict=True)):
        expected = bert_reference(state, *given)
        np.testing.assert_allclose(hidden[i, : len(expected)], expected, atol=1e-4)
        mean = expected.mean(0)
        np.testing.assert_allclose(pooled[i], mean / np.linalg.norm(mean), atol=1e-5)


def test_layers_and_heads_are_found():
    model = Bert(TINY)
    shapes = shapes_of(model, TOKENS)["params"]
    axes = wf.find_axes(lambda p, t: model.apply({"params": p}, t), shapes, TOKENS)
    assert not any(one.doubt for one in axes.values())
    block = "encoder/layer_0"
    sizes = {p.removeprefix(block): axes[p].sizes[1:3] for p in axes if block in p}
    attention = {f"/attention/self/{n}/kernel" for n in ("query", "key", "value")}
    attention |= {"/attention/output/dense/kernel"}
    assert sizes == dict.fromkeys(attention, (6, 6)) | {
        "/intermediate/dense/kernel": (10, 6),
        "/output/dense/kernel": (6, 10),
    }
    for path in attention:
        one = axes[block + path]
        assert [one.shape[i] for i in one.heads] == [2]


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="num_attention_heads=4; expected a divisor"):
        TINY.replace(num_attention_heads=4)
    with pytest.raises(ValueError, match="at most max_position_embeddings=5, got 6"):
        shapes_of(Bert(TINY), np.zeros((1, 6), int))
