"""Layers in NumPy, in the dtype given: an independent forward pass, channels last.

Those that take ``state`` and ``name`` read a PyTorch state dict.
"""

from math import erf

import numpy as np


def windows(x, size, stride, padding=0, fill=0.0):
    """Windows of [B, H, W, C] as [B, h, w, C, size, size]."""
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = np.pad(x, margins, constant_values=fill)
    patches = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return patches[:, ::stride, ::stride]


def convolve(x, kernel, stride, padding):
    """Cross-correlates [B, H, W, I] with [h, w, I, O], or [h, w, 1, I] by channel."""
    patches = windows(x, kernel.shape[0], stride, padding)
    if kernel.shape[2] == x.shape[-1]:
        return np.einsum("bhwiyx,yxio->bhwo", patches, kernel)
    assert kernel.shape[2:] == (1, x.shape[-1])
    return np.einsum("bhwiyx,yxi->bhwi", patches, kernel[:, :, 0])


def max_pool(x, size, stride, padding=0):
    return windows(x, size, stride, padding, -np.inf).max((-1, -2))


def average_pool(x, size, stride):
    return windows(x, size, stride).mean((-1, -2))


def torch_convolution(x, state, name, stride, padding):
    y = convolve(x, state[f"{name}.weight"].transpose(2, 3, 1, 0), stride, padding)
    return y + state.get(f"{name}.bias", 0)


def torch_conv_norm(x, state, conv, norm, stride=1, padding=0):
    """A convolution and a batch norm on its running statistics."""
    x = torch_convolution(x, state, conv, stride, padding)
    mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    scale, bias = state[f"{norm}.weight"], state[f"{norm}.bias"]
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def torch_residual(x, state, prefix, sizes, strides):
    """Convolutions with batch norms; the shortcut has its own when the state has."""
    y = x
    for i, (size, stride) in enumerate(zip(sizes, strides, strict=True), start=1):
        names = f"{prefix}conv{i}", f"{prefix}bn{i}"
        y = torch_conv_norm(y, state, *names, stride, size // 2)
        y = relu(y) if i < len(sizes) else y
    names = f"{prefix}downsample.0", f"{prefix}downsample.1"
    if f"{names[0]}.weight" in state:
        x = torch_conv_norm(x, state, *names, max(strides))
    return relu(x + y)


def torch_layer_norm(x, state, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scale, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return (x - mean) / np.sqrt(var + 1e-6) * scale + bias


def torch_dense(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
