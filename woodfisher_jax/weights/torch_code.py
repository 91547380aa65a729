"""Lines of PyTorch that build a network from the shapes of its weights in a file."""

from string import Template
from typing import Any, NamedTuple

import flax.linen as nn

from woodfisher_jax.models.cifarnet import CifarNet
from woodfisher_jax.models.llama import Llama
from woodfisher_jax.models.mlp import MLP, LogisticRegression
from woodfisher_jax.models.mobilenet import MobileNetV1, MobileNetV2
from woodfisher_jax.models.resnet import CifarResNet, ResNet
from woodfisher_jax.models.vgg import VGG
from woodfisher_jax.models.vit import VisionTransformer

_FILE = Template('''"""$name in PyTorch, its layers as wide as their weights.

model = load("$file")
"""

${imports}import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


def layer(weights, name):
    """The layer of a name, by the shape of its weight."""
    weight, bias = weights[f"{name}.weight"], f"{name}.bias" in weights
    if weight.ndim == 4:
        outputs, inputs, size, _ = weight.shape
        stride = $stride
        groups = $groups
        place = (stride, $padding, 1, groups, bias)
        return nn.Conv2d(inputs * groups, outputs, size, *place)
    if weight.ndim == 2:
        if name.endswith("embed_tokens"):
            return nn.Embedding(*weight.shape)
        return nn.Linear(weight.shape[1], weight.shape[0], bias)
    if f"{name}.running_mean" in weights:
        return nn.BatchNorm2d(len(weight))
    return (nn.LayerNorm if bias else nn.RMSNorm)(len(weight), eps=$eps)


class Network(nn.Module):
    """Layers by their names, each within those that its name begins with."""

    def __init__(self, weights):
        super().__init__()
        names = {key.rpartition(".")[0] for key in weights}
        for name in sorted(names, key=lambda n: [p.zfill(4) for p in n.split(".")]):
            if not name:
                for key in weights.keys() & {"cls_token", "pos_embed"}:
                    setattr(self, key, nn.Parameter(weights[key]))
                continue
            inside, (*folders, last) = self, name.split(".")
            for folder in folders:
                if not hasattr(inside, folder):
                    inside.add_module(folder, nn.Sequential())
                inside = getattr(inside, folder)
            inside.add_module(last, layer(weights, name))

    def forward(self, x):
$forward

def load(path="$file"):
    weights = load_file(path)
    model = Network(weights)
    model.load_state_dict(weights)
    return model.eval()
''')


class _Form(NamedTuple):
    """What differs between kinds of networks.

    Attributes:
        forward: Body of ``forward``; a name such as ``$head`` is that of a setting.
        stride: Of a convolution by its ``name`` and ``size``.
        padding: The same.
        groups: The same, and by its ``outputs``.
        eps: Of layer norms and RMS norms.
    """

    forward: str
    stride: str = "1"
    padding: str = "size // 2"
    groups: str = "1"
    eps: str = "1e-6"


def _strided(names: str) -> str:
    """Stride 2 of the convolutions whose names match an expression, else 1."""
    return f'2 if re.fullmatch(r"{names}", name) else 1'


_RESNET = """
x = $stem
for block in [b for n in $stages for b in getattr(self, f"layer{n}")]:
    y = x
    for n in $convs:
        y = getattr(block, f"bn{n}")(getattr(block, f"conv{n}")(y))
        y = y.relu() if n < $last else y
    x = (y + (block.downsample(x) if hasattr(block, "downsample") else x)).relu()
return self.fc(x.mean((2, 3)))
"""

_VGG = """
for name, m in self.features.named_children():
    x = m(x)
    if isinstance(m, nn.BatchNorm2d):
        x = x.relu()
        if not hasattr(self.features, str(int(name) + 2)):
            x = F.max_pool2d(x, 2)
first, second, last = self.classifier
x = F.adaptive_avg_pool2d(x, 7).flatten(1)
return last(second(first(x).relu()).relu())
"""

_MOBILENET_V1 = """
for m in [m for block in self.model for m in block]:
    x = m(x).relu() if isinstance(m, nn.BatchNorm2d) else m(x)
return self.fc(x.mean((2, 3)))
"""

_MOBILENET_V2 = """
for number, block in enumerate(self.features):
    y, layers = x, [m for m in block.modules() if not isinstance(m, nn.Sequential)]
    for m in layers:
        linear = m is layers[-1] and hasattr(block, "conv")
        y = F.relu6(m(y)) if isinstance(m, nn.BatchNorm2d) and not linear else m(y)
    x = x + y if number in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16) else y
return self.classifier(x.mean((2, 3)))
"""

_VIT = """
x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
for block in self.blocks:
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, -1, $head))
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
return self.head(self.norm(x)[:, 0])
"""

_CIFARNET = """
x = F.max_pool2d(self.conv1(x), 3, 2).relu()
x = F.avg_pool2d(self.conv2(x).relu(), 3, 2)
x = F.avg_pool2d(self.conv3(x).relu(), 3, 2)
return self.fc2(self.fc1(x.flatten(1)).relu())
"""

# Images are flattened with their channels last.
_DENSE = """
*hidden, last = self.children()
x = x.permute(0, 2, 3, 1).flatten(1)
for m in hidden:
    x = m(x).relu()
return last(x)
"""

_LLAMA = """
half = $head // 2
rates = $theta ** (-torch.arange(half, dtype=torch.float64) / half)
angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), rates)
cos, sin = angles.cos().float(), angles.sin().float()

def turned(t):
    a, b = t[..., :half], t[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

x = self.model.embed_tokens(x)
for block in self.model.layers:
    a, m, y = block.self_attn, block.mlp, block.input_layernorm(x)
    q, k, v = [
        p(y).unflatten(-1, (-1, $head)).transpose(1, 2)
        for p in (a.q_proj, a.k_proj, a.v_proj)
    ]
    k, v = [t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (turned(k), v)]
    y = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
    x = x + a.o_proj(y.transpose(1, 2).flatten(2))
    y = block.post_attention_layernorm(x)
    x = x + m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))
y = self.model.norm(x)
return $logits
"""


def torch_code(model: nn.Module, file: str) -> str:
    """A Python file that builds a network from the shapes of its weights.

    It defines ``load(path)``, which needs torch and safetensors and gives the network
    of NCHW images (of tokens for a Llama) that the weights are of.

    Args:
        model: A network of this package, of any widths.
        file: Name of the file with its state dict.

    Returns:
        The text of the file.

    Raises:
        ValueError: If there is none for a network of that kind.
    """
    form, settings = _form(model)
    body = [
        f"        {line}" if line else ""
        for line in Template(form.forward).substitute(settings).strip().splitlines()
    ]
    return _FILE.substitute(
        form._asdict(),
        name=type(model).__name__,
        file=file,
        forward="\n".join(body) + "\n",
        imports="import re\n\n" if "re." in form.stride else "",
    )


def _form(model: nn.Module) -> tuple[_Form, dict[str, Any]]:
    """The form of a network, and the settings in its ``forward``."""
    # Of the kernels that are not 1 x 1 the first alone is not depthwise.
    stems = ("model.0.0", "features.0.0")
    mobile = {"groups": f"outputs if size > 1 and name not in {stems} else 1"}
    stem = "self.bn1(self.conv1(x)).relu()"
    if isinstance(model, CifarResNet):
        stride = _strided(r"layer[23]\.0\.(conv1|downsample\.0)")
        return _Form(_RESNET, stride), {
            "stem": stem,
            "stages": (1, 2, 3),
            "convs": (1, 2),
            "last": 2,
        }
    if isinstance(model, ResNet):
        last = 3 if model.depth >= 50 else 2
        stride = _strided(rf"conv1|layer[234]\.0\.(conv{last - 1}|downsample\.0)")
        return _Form(_RESNET, stride), {
            "stem": f"F.max_pool2d({stem}, 3, 2, 1)",
            "stages": (1, 2, 3, 4),
            "convs": (1, 2, 3)[:last],
            "last": last,
        }
    if isinstance(model, MobileNetV1):
        stride = _strided(r"model\.(0|2|4|6|12)\.0")
        return _Form(_MOBILENET_V1, stride, **mobile), {}
    if isinstance(model, MobileNetV2):
        stride = _strided(r"features\.(0|(2|4|7|14)\.conv\.1)\.0")
        return _Form(_MOBILENET_V2, stride, **mobile), {}
    if isinstance(model, VisionTransformer):
        head = model.width // model.num_heads
        return _Form(_VIT, "size", "0"), {"head": head}
    if isinstance(model, Llama):
        c, logits = model.config, "self.lm_head(y)"
        if c.tie_word_embeddings:
            logits = "F.linear(y, self.model.embed_tokens.weight)"
        return _Form(_LLAMA, eps=str(c.rms_norm_eps)), {
            "head": c.head_width,
            "theta": c.rope_theta,
            "logits": logits,
        }
    simple = {
        VGG: _VGG,
        CifarNet: _CIFARNET,
        MLP: _DENSE,
        LogisticRegression: _DENSE,
    }
    if type(model) not in simple:
        raise ValueError(
            f"model: there are no lines of PyTorch for {type(model).__name__}; "
            "build it by the shapes in its file"
        )
    return _Form(simple[type(model)]), {}
