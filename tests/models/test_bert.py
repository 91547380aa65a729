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
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=10,
    max_position_embeddings=7,
    layer_norm_eps=1e-3,
)
TOKENS = np.array([[1, 5, 0, 10, 2], [3, 3, 7, 4, 9]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
SEGMENTS = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])


def layer_norm(x, state, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + TINY.layer_norm_eps)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention_reference(state, x, name):
    """One head at a time."""
    q, k, v = (torch_dense(x, state, f"{name}.{n}") for n in ("query", "key", "value"))
    heads = []
    for head in np.split(np.arange(TINY.hidden_size), TINY.num_attention_heads):
        scores = q[:, head] @ k[:, head].T / np.sqrt(len(head))
        heads.append(softmax(scores) @ v[:, head])
    return np.concatenate(heads, -1)


def bert_reference(state, tokens, segments):
    """One text without padding, and one block."""
    x = sum(
        state[f"embeddings.{name}_embeddings.weight"][rows]
        for name, rows in (
            ("word", tokens),
            ("token_type", segments),
            ("position", range(len(tokens))),
        )
    )
    x = layer_norm(x, state, "embeddings.LayerNorm")
    block = "encoder.layer.0"
    y = attention_reference(state, x, f"{block}.attention.self")
    y = torch_dense(y, state, f"{block}.attention.output.dense")
    x = layer_norm(x + y, state, f"{block}.attention.output.LayerNorm")
    y = gelu(torch_dense(x, state, f"{block}.intermediate.dense"))
    y = torch_dense(y, state, f"{block}.output.dense")
    return layer_norm(x + y, state, f"{block}.output.LayerNorm")


def test_hidden_states_equal_an_independent_forward_pass():
    model = Bert(TINY.replace(num_hidden_layers=1))
    variables, state = random_variables(model, TOKENS)

    @jax.jit
    def outputs(variables):
        hidden = model.apply(variables, TOKENS, MASK, SEGMENTS)
        return hidden, mean_pooled(hidden, MASK)

    hidden, pooled = outputs(variables)
    for i, real in enumerate(MASK.astype(bool)):
        expected = bert_reference(state, TOKENS[i][real], SEGMENTS[i][real])
        np.testing.assert_allclose(hidden[i][real], expected, atol=1e-4)
        np.testing.assert_allclose(pooled[i], expected.mean(0), atol=1e-4)


def test_layers_and_heads_are_found():
    model = Bert(TINY)
    shapes = shapes_of(model, TOKENS)["params"]
    axes = wf.find_axes(lambda p, t: model.apply({"params": p}, t), shapes, TOKENS)
    sizes = {
        path.removeprefix("encoder/layer_1/").removesuffix("/kernel"): one.sizes[1:3]
        for path, one in axes.items()
        if "layer_1" in path
    }
    assert not any(one.doubt for one in axes.values())
    assert sizes == {
        "attention/self/query": (6, 6),
        "attention/self/key": (6, 6),
        "attention/self/value": (6, 6),
        "attention/output/dense": (6, 6),
        "intermediate/dense": (10, 6),
        "output/dense": (6, 10),
    }
    heads = {p: [one.shape[i] for i in one.heads] for p, one in axes.items()}
    for name in ("self/query", "self/key", "self/value", "output/dense"):
        assert heads[f"encoder/layer_1/attention/{name}/kernel"] == [2]


def test_heads_and_texts_that_do_not_fit():
    with pytest.raises(ValueError, match="num_attention_heads=4; expected a divisor"):
        TINY.replace(num_attention_heads=4)
    with pytest.raises(ValueError, match="max_position_embeddings=7 a text, got 8"):
        shapes_of(Bert(TINY), np.zeros((1, 8), np.int32))
