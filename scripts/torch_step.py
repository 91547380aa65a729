"""The MLP's pruning step in plain PyTorch, as one would write it by hand.

Gradients of single samples by ``torch.func.vmap``, the inverse Fisher of whole layers
in sample space, a global mask, the update: float32, nothing checked.
"""

import numpy as np
import torch
from torch.func import functional_call, grad, vmap


class Mlp(torch.nn.Module):
    """784 - 40 - 20 - 10 with ReLU, without biases."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.fc1 = torch.nn.Linear(784, 40, bias=False)
        self.fc2 = torch.nn.Linear(40, 20, bias=False)
        self.fc3 = torch.nn.Linear(20, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class TorchStep:
    """The step on a network whose weights are given.

    Args:
        kernels: Of the three layers, [outputs, inputs].
    """

    def __init__(self, kernels: list[np.ndarray]) -> None:
        """Makes the network."""
        self.model = Mlp()
        layers = (self.model.fc1, self.model.fc2, self.model.fc3)
        with torch.no_grad():
            for layer, kernel in zip(layers, kernels, strict=True):
                layer.weight.copy_(torch.tensor(kernel))

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        damping: float,
        sparsity: float,
    ) -> list[torch.Tensor]:
        """Pruned and updated kernels."""
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        kernels = {k: p.detach() for k, p in self.model.named_parameters()}

        def loss(some, image, label):  # type: ignore[no-untyped-def]
            logits = functional_call(self.model, some, (image[None],))
            return torch.nn.functional.cross_entropy(logits, label[None])

        rows = vmap(grad(loss), in_dims=(None, 0, 0))(kernels, x, y)
        number, scores, found = len(x), [], []
        for name, kernel in kernels.items():
            g, w = rows[name].flatten(1), kernel.flatten()
            inner = g @ g.T + number * damping * torch.eye(number)
            factor = torch.linalg.cholesky(inner)
            white = torch.linalg.solve_triangular(factor, g, upper=False)
            diagonal = (1 - (white * white).sum(0)) / damping
            scores.append(w * w / (2 * diagonal))
            found.append((white, w, diagonal, kernel.shape))
        every = torch.cat(scores)
        left = int(len(every) * (1 - sparsity))
        threshold = torch.topk(every, left).values[-1]
        updated = []
        for score, (white, w, diagonal, shape) in zip(scores, found, strict=True):
            kept = score >= threshold
            b = torch.where(kept, 0.0, -w / diagonal)
            step = (b - (white @ b) @ white) / damping
            updated.append(torch.where(kept, w + step, 0.0).reshape(shape))
        return updated
