import jax
import numpy as np
from numpy_layers import average_pool, max_pool, relu, torch_convolution, torch_dense
from random_weights import random_variables

from woodfisher_jax.models import build_model


def test_logits_equal_an_independent_forward_pass():
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = build_model("cifarnet")
    variables, state = random_variables(model, images)

    x = torch_convolution(np.float64(images), state, "conv1", 1, 2)
    x = relu(max_pool(x, 3, 2))
    x = average_pool(relu(torch_convolution(x, state, "conv2", 1, 2)), 3, 2)
    x = average_pool(relu(torch_convolution(x, state, "conv3", 1, 2)), 3, 2)
    x = x.transpose(0, 3, 1, 2).reshape(2, 576)
    expected = torch_dense(relu(torch_dense(x, state, "fc1")), state, "fc2")

    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images), expected, atol=1e-3
    )
