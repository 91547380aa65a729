"""Lines of PyTorch build networks of any widths; run where PyTorch is installed."""

import dataclasses
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import random_variables

from woodfisher_jax.models import build_model
from woodfisher_jax.models.bert import Bert
from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.models.vit import VisionTransformer
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.state_dicts import to_state_dict
from woodfisher_jax.weights.torch_code import torch_code

VIT = {"width": 8, "num_heads": 2, "depth": 2, "patch_size": 8, "num_classes": 3}
ATTENTION = "model/layers_0/self_attn"
LLAMA = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    intermediate_size=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)

# By name: the network, and height and width of the images.
CASES = {
    "mlp": (build_model("mlp", widths={"fc1": 7}), 8),
    "cifarnet": (build_model("cifarnet", widths={"conv2": 7, "fc1": 5}), 32),
    "resnet20": (
        build_model("resnet20", widths={"conv1": 7, "layer2/block0/conv2": 7}),
        33,
    ),
    "resnet18": (
        build_model("resnet18", widths={"conv1": 7, "layer2/block0/conv2": 7}),
        65,
    ),
    "resnet50": (
        build_model("resnet50", widths={"layer1/block0/conv3": 64}),
        65,
    ),
    "mobilenet_v1": (build_model("mobilenet_v1", widths={"model0/conv_0": 1}), 65),
    # As many channels come into features4 as go out, but nothing is added there.
    "mobilenet_v2": (
        build_model(
            "mobilenet_v2",
            widths={
                "features4/conv/project_2": 24,
                "features5/conv/expand_0/conv_0": 7,
            },
        ),
        65,
    ),
    "vgg": (build_model("vgg11_bn", widths={"features0": 3, "classifier3": 11}), 40),
    "vit": (
        VisionTransformer(**VIT, widths={"blocks0/attn/qkv": 12, "blocks1/mlp/fc1": 5}),
        16,
    ),
    "llama": (
        Llama(LLAMA, widths={f"{ATTENTION}/q_proj": 4, f"{ATTENTION}/k_proj": 2}),
        None,
    ),
    "llama_tied": (Llama(dataclasses.replace(LLAMA, tie_word_embeddings=True)), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_here(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    model, side = CASES[name]
    rng = np.random.default_rng(0)
    inputs = np.arange(14).reshape(2, 7) % 11
    if side is not None:
        inputs = np.float32(rng.standard_normal((2, side, side, 3)))
    variables, _ = random_variables(model, inputs)
    file = tmp_path / "net.safetensors"
    save_safetensors(file, to_state_dict(variables), {"format": "pt"})
    code = file.with_suffix(".py")
    code.write_text(torch_code(model, file.name))
    theirs = runpy.run_path(str(code))["load"](file)
    given = torch.from_numpy(inputs)
    with torch.no_grad():
        found = theirs(given if side is None else given.permute(0, 3, 1, 2)).numpy()
    expected = jax.jit(model.apply)(variables, inputs)
    largest = np.abs(expected).max()
    assert np.std(expected) > 0.05 * largest
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_lines_are_python(name: str) -> None:
    code = torch_code(CASES[name][0], "net.safetensors")
    compile(code, "net.py", "exec")
    assert 'load(path="net.safetensors")' in code
    assert "$" not in code
    assert all(len(line) <= 100 for line in code.splitlines())


def test_a_network_without_lines_is_named() -> None:
    with pytest.raises(ValueError, match="no lines of PyTorch for Bert"):
        torch_code(Bert(), "net.safetensors")
