"""The models again, in PyTorch: what the Flax ones are compared with.

Written from the papers and the names in published checkpoints. Imports torch, which the
project does not depend on; so only tests that skip without it import this.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    return nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias
    )


def conv_norm(inputs, outputs, size, stride=1, groups=1, bias=False):
    return [
        conv(inputs, outputs, size, stride, groups, bias),
        nn.BatchNorm2d(outputs),
    ]


class Residual(nn.Module):
    """``conv1``, ``bn1``, ... of the given (channels, size, stride), and a shortcut."""

    def __init__(self, inputs, layers):
        super().__init__()
        before = inputs
        for number, (channels, size, stride) in enumerate(layers, start=1):
            self.add_module(f"conv{number}", conv(before, channels, size, stride))
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels))
            before = channels
        self.depth = len(layers)
        stride = max(stride for _, _, stride in layers)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != before:
            self.downsample = nn.Sequential(*conv_norm(inputs, before, 1, stride))

    def forward(self, x):
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = y.relu() if number < self.depth else y
        return (self.downsample(x) + y).relu()


class ResNet(nn.Module):
    def __init__(self, stem, stages, outputs, num_classes):
        super().__init__()
        channels, size, stride = stem
        self.conv1 = conv(3, channels, size, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if stride == 2 else nn.Identity()
        for number, stage in enumerate(stages, start=1):
            self.add_module(f"layer{number}", stage)
        self.num_stages = len(stages)
        self.fc = nn.Linear(outputs, num_classes)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        for number in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def cifar_resnet(depth, num_classes=10):
    stages, before = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        blocks = []
        for i in range((depth - 2) // 6):
            first = (channels, 3, stride if i == 0 else 1)
            blocks.append(Residual(before, [first, (channels, 3, 1)]))
            before = channels
        stages.append(nn.Sequential(*blocks))
    return ResNet((16, 3, 1), stages, 64, num_classes)


def resnet(num_blocks, bottleneck, widening=1, num_classes=1000):
    stages, before = [], 64
    for number, length in enumerate(num_blocks):
        width, blocks = 64 * 2**number, []
        for i in range(length):
            stride = 2 if number > 0 and i == 0 else 1
            inside = width * widening
            layers = [(width, 3, stride), (width, 3, 1)]
            if bottleneck:
                layers = [(inside, 1, 1), (inside, 3, stride), (4 * width, 1, 1)]
            blocks.append(Residual(before, layers))
            before = layers[-1][0]
        stages.append(nn.Sequential(*blocks))
    return ResNet((64, 7, 2), stages, before, num_classes)


class MobileNetV1(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        blocks = [nn.Sequential(*conv_norm(3, 32, 3, 2), nn.ReLU())]
        widths = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
        for number, (before, channels) in enumerate(pairwise(widths), start=1):
            stride = 2 if number in (2, 4, 6, 12) else 1
            depthwise = conv_norm(before, before, 3, stride, groups=before)
            pointwise = conv_norm(before, channels, 1)
            layers = [*depthwise, nn.ReLU(), *pointwise, nn.ReLU()]
            blocks.append(nn.Sequential(*layers))
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x):
        return self.fc(self.model(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        inside = inputs * expansion
        expand = nn.Sequential(*conv_norm(inputs, inside, 1), nn.ReLU6())
        depthwise = conv_norm(inside, inside, 3, stride, groups=inside)
        self.conv = nn.Sequential(
            *([expand] if expansion > 1 else []),
            nn.Sequential(*depthwise, nn.ReLU6()),
            *conv_norm(inside, outputs, 1),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        features = [nn.Sequential(*conv_norm(3, 32, 3, 2), nn.ReLU6())]
        before = 32
        channels_of_stage = (16, 24, 32, 64, 96, 160, 320)
        for stage, channels in enumerate(channels_of_stage):
            for i in range((1, 2, 3, 4, 3, 3, 1)[stage]):
                stride = 2 if i == 0 and channels in (24, 32, 64, 160) else 1
                expansion = 1 if stage == 0 else 6
                features.append(InvertedResidual(before, channels, expansion, stride))
                before = channels
        features.append(nn.Sequential(*conv_norm(320, 1280, 1), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(1280, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, convs_per_stage, num_classes=1000):
        super().__init__()
        features, before = [], 3
        for channels, length in zip(
            (64, 128, 256, 512, 512), convs_per_stage, strict=True
        ):
            for _ in range(length):
                features += [*conv_norm(before, channels, 3, bias=True), nn.ReLU()]
                before = channels
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features, nn.AdaptiveAvgPool2d(7))
        self.classifier = nn.Sequential(
            *[nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Identity()],
            *[nn.Linear(4096, 4096), nn.ReLU(), nn.Identity()],
            nn.Linear(4096, num_classes),
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class CifarNet(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = conv(3, 32, 5, bias=True)
        self.conv2 = conv(32, 32, 5, bias=True)
        self.conv3 = conv(32, 64, 5, bias=True)
        self.fc1 = nn.Linear(576, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(self.conv1(x), 3, 2).relu()
        x = functional.avg_pool2d(self.conv2(x).relu(), 3, 2)
        x = functional.avg_pool2d(self.conv3(x).relu(), 3, 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class LogisticRegression(nn.Module):
    def __init__(self, inputs=32 * 32 * 3, num_classes=10):
        super().__init__()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x):
        # Dense layers on images: the Flax models flatten channels last.
        return self.fc(x.permute(0, 2, 3, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, inputs=32 * 32 * 3, num_classes=10):
        super().__init__()
        self.fc1 = nn.Linear(inputs, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, num_classes, bias=False)

    def forward(self, x):
        x = self.fc1(x.permute(0, 2, 3, 1).flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        y = scores.softmax(-1) @ value
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, 4 * width)
        self.mlp.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self, width, num_heads, image_size, num_classes=1000):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        places = 1 + (image_size // 16) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, places, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*[Block(width, num_heads) for _ in range(12)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])
