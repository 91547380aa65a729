"""The multilayer perceptron of the MNIST experiments, and logistic regression."""

import flax.linen as nn
import jax

from woodfisher_jax.models.layers import Resizable, width


class MLP(Resizable):
    """Dense layers ``fc1``, ``fc2``, ... with ReLU between; the last gives the logits.

    With the default widths and 28 x 28 inputs it is the paper's MLPNet of 32,360
    weights. The original ends in a log-softmax, which is part of the loss here.

    Attributes:
        hidden: Width of each hidden layer.
        num_classes: Number of logits.
        use_bias: Whether the layers have biases.
    """

    hidden: tuple[int, ...] = (40, 20)
    num_classes: int = 10
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs [B, ...], flattened in C order, to logits [B, num_classes]."""
        x = x.reshape(x.shape[0], -1)
        for number, usual in enumerate(self.hidden, start=1):
            name = f"fc{number}"
            outputs = width(self, name, usual)
            x = nn.relu(nn.Dense(outputs, self.use_bias, name=name)(x))
        last = f"fc{len(self.hidden) + 1}"
        return nn.Dense(self.num_classes, self.use_bias, name=last)(x)


class LogisticRegression(nn.Module):
    """One dense layer, ``fc``.

    Attributes:
        num_classes: Number of logits.
        use_bias: Whether the layer has a bias.
    """

    num_classes: int = 10
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs [B, ...], flattened in C order, to logits [B, num_classes]."""
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, self.use_bias, name="fc")(x)
