import jax
import numpy as np
import pytest
from numpy_layers import gelu, softmax, torch_dense, torch_layer_norm
from random_weights import random_variables, shapes_of

from woodfisher_jax.models.vit import VisionTransformer


def attention_reference(state, x, name, num_heads):
    """One head at a time."""
    query, key, value = np.split(torch_dense(x, state, f"{name}.qkv"), 3, axis=-1)
    size = x.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        q, k, v = (a[..., head * size :][..., :size] for a in (query, key, value))
        heads.append(softmax(q @ k.swapaxes(1, 2) / np.sqrt(size)) @ v)
    return torch_dense(np.concatenate(heads, -1), state, f"{name}.proj")


def vit_reference(state, x, patch, depth, num_heads):
    batch, height, width, _ = x.shape
    kernel = state["patch_embed.proj.weight"]
    tokens = [np.repeat(state["cls_token"][0], batch, axis=0)]
    for i, j in np.ndindex(height // patch, width // patch):
        pixels = x[:, i * patch :, j * patch :][:, :patch, :patch]
        tokens.append(np.einsum("byxi,oiyx->bo", pixels, kernel))
        tokens[-1] += state["patch_embed.proj.bias"]
    x = np.stack(tokens, axis=1) + state["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        y = torch_layer_norm(x, state, f"{block}.norm1")
        x = x + attention_reference(state, y, f"{block}.attn", num_heads)
        y = torch_layer_norm(x, state, f"{block}.norm2")
        y = gelu(torch_dense(y, state, f"{block}.mlp.fc1"))
        x = x + torch_dense(y, state, f"{block}.mlp.fc2")
    return torch_dense(torch_layer_norm(x, state, "norm")[:, 0], state, "head")


def test_logits_equal_an_independent_forward_pass():
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    model = VisionTransformer(
        width=6, num_heads=2, depth=2, patch_size=2, num_classes=3
    )
    variables, state = random_variables(model, x)
    expected = vit_reference(state, np.float64(x), patch=2, depth=2, num_heads=2)
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "pixels", "message"),
    [
        ({"width": 10, "num_heads": 3}, 32, "num_heads: .* divisor .* 10, got 3"),
        ({}, 40, "multiples of patch_size=16, got 40 x 40"),
    ],
)
def test_shapes_that_do_not_divide(settings, pixels, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(VisionTransformer(**settings), np.zeros((1, pixels, pixels, 3)))
