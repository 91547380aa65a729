import jax
import numpy as np
import pytest
from numpy_layers import softmax
from random_weights import random_variables

import woodfisher_jax as wf
from woodfisher_jax.models.llama import Llama, LlamaConfig

TINY = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    intermediate_size=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=50.0,
)
TOKENS = np.array([[1, 5, 0, 10, 2], [3, 3, 7, 4, 9]])


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def turned(x, theta):
    """Rotary positions of one head [T, d], as complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    speed = theta ** (-np.arange(half) / half)
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * speed)
    return np.concatenate([pairs.real, pairs.imag], -1)


def attention_reference(state, x, name, c):
    """One sequence and one head at a time."""
    q, k, v = (x @ state[f"{name}.{n}_proj.weight"].T for n in "qkv")
    heads = []
    for head in range(c.num_attention_heads):
        shared = head * c.key_value_heads // c.num_attention_heads
        own = slice(head * c.head_width, (head + 1) * c.head_width)
        kept = slice(shared * c.head_width, (shared + 1) * c.head_width)
        scores = turned(q[:, own], c.rope_theta) @ turned(k[:, kept], c.rope_theta).T
        later = np.triu(np.ones(scores.shape, bool), 1)
        scores = np.where(later, -np.inf, scores / np.sqrt(c.head_width))
        heads.append(softmax(scores) @ v[:, kept])
    return np.concatenate(heads, -1) @ state[f"{name}.o_proj.weight"].T


def llama_reference(state, tokens, c):
    x = state["model.embed_tokens.weight"][tokens]
    for block in (f"model.layers.{i}" for i in range(c.num_hidden_layers)):
        y = rms_norm(x, state[f"{block}.input_layernorm.weight"])
        x = x + attention_reference(state, y, f"{block}.self_attn", c)
        y = rms_norm(x, state[f"{block}.post_attention_layernorm.weight"])
        gate, up = (y @ state[f"{block}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        hidden = gate / (1 + np.exp(-gate)) * up
        x = x + hidden @ state[f"{block}.mlp.down_proj.weight"].T
    x = rms_norm(x, state["model.norm.weight"])
    head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
    return x, x @ state[f"{head}.weight"].T


@pytest.mark.parametrize(("depth", "tied"), [(2, False), (1, True)])
def test_logits_equal_an_independent_forward_pass(depth, tied):
    config = TINY.replace(num_hidden_layers=depth, tie_word_embeddings=tied)
    model = Llama(config)
    variables, state = random_variables(model, TOKENS)

    @jax.jit
    def outputs(variables):
        hidden = model.apply(variables, TOKENS, method="hidden")
        return hidden, model.apply(variables, TOKENS)

    hidden, logits = outputs(variables)
    for i, tokens in enumerate(TOKENS):
        expected = llama_reference(state, tokens, config)
        np.testing.assert_allclose(hidden[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(logits[i], expected[1], atol=1e-4)


def test_layers_and_heads_are_found():
    model = Llama(TINY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    axes = wf.find_axes(lambda p, t: model.apply({"params": p}, t), shapes, TOKENS)
    sizes = {path: one.sizes[1:3] for path, one in axes.items() if "layers_1" in path}
    assert not any(one.doubt for one in axes.values())
    attention, mlp = "model/layers_1/self_attn", "model/layers_1/mlp"
    assert sizes == {
        f"{attention}/q_proj/kernel": (24, 8),
        f"{attention}/k_proj/kernel": (12, 8),
        f"{attention}/v_proj/kernel": (12, 8),
        f"{attention}/o_proj/kernel": (8, 24),
        f"{mlp}/gate_proj/kernel": (12, 8),
        f"{mlp}/up_proj/kernel": (12, 8),
        f"{mlp}/down_proj/kernel": (8, 12),
    }
    heads = {p: [one.shape[i] for i in one.heads] for p, one in axes.items()}
    assert all(heads[f"{attention}/{n}_proj/kernel"] == [2] for n in "qkvo")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3; expected a divisor of"),
        ({"num_attention_heads": 6, "head_dim": None}, "divisor of hidden_size=8"),
        ({"head_dim": 5}, "head_dim=5; expected an even number"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**sizes)
