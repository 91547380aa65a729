"""Every model beside a PyTorch one of the same weights; skipped without PyTorch."""

import jax
import numpy as np
import pytest

from woodfisher_jax.models import MODELS, build_model, num_parameters
from woodfisher_jax.weights.state_dicts import to_state_dict, to_variables

torch = pytest.importorskip("torch")

import torch_models  # noqa: E402  (imports torch)

# Model name to the PyTorch model and the images' height and width. Odd sizes tell apart
# padding on both sides from padding on the right.
CASES = {
    "mlp": (torch_models.MLP, 32),
    "logistic_regression": (torch_models.LogisticRegression, 32),
    "cifarnet": (torch_models.CifarNet, 32),
    **{
        f"resnet{depth}": (lambda depth=depth: torch_models.cifar_resnet(depth), 33)
        for depth in (20, 32, 44, 56, 110)
    },
    "resnet18": (lambda: torch_models.resnet((2, 2, 2, 2), False), 65),
    "resnet34": (lambda: torch_models.resnet((3, 4, 6, 3), False), 64),
    "resnet50": (lambda: torch_models.resnet((3, 4, 6, 3), True), 65),
    "resnet101": (lambda: torch_models.resnet((3, 4, 23, 3), True), 64),
    "resnet152": (lambda: torch_models.resnet((3, 8, 36, 3), True), 96),
    "wide_resnet50_2": (lambda: torch_models.resnet((3, 4, 6, 3), True, 2), 64),
    "mobilenet_v1": (torch_models.MobileNetV1, 65),
    "mobilenet_v2": (torch_models.MobileNetV2, 65),
    "vgg11_bn": (lambda: torch_models.VGG((1, 1, 2, 2, 2)), 64),
    "vgg13_bn": (lambda: torch_models.VGG((2, 2, 2, 2, 2)), 32),
    "vgg16_bn": (lambda: torch_models.VGG((2, 2, 3, 3, 3)), 40),
    "vgg19_bn": (lambda: torch_models.VGG((2, 2, 4, 4, 4)), 224),
    "deit_tiny": (lambda: torch_models.VisionTransformer(192, 3, 48), 48),
    "deit_small": (lambda: torch_models.VisionTransformer(384, 6, 224), 224),
    "deit_base": (lambda: torch_models.VisionTransformer(768, 12, 32), 32),
    "vit_tiny": (lambda: torch_models.VisionTransformer(192, 3, 32), 32),
    "vit_small": (lambda: torch_models.VisionTransformer(384, 6, 32), 32),
    "vit_base": (lambda: torch_models.VisionTransformer(768, 12, 32), 32),
}

# One network of each form is quick; the others share its code, or take long to draw.
QUICK = {
    *["mlp", "logistic_regression", "cifarnet", "resnet20", "resnet18", "resnet50"],
    *["mobilenet_v1", "mobilenet_v2", "vgg11_bn", "deit_tiny"],
}

# The deepest networks amplify the rounding of float32 most.
TOLERANCES = {"resnet101": 1e-3, "resnet152": 1e-3}


def with_random_norms(model, images):
    """Random scales and biases; running statistics of these images, as if trained."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(layer.weight, 0.2, 0.4)
            torch.nn.init.uniform_(layer.bias, -0.2, 0.2)
            layer.momentum = 1.0
    model.train()(images)
    return model.eval()


def test_every_model_has_a_case():
    assert CASES.keys() == MODELS.keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in CASES
    ],
)
def test_logits_equal_pytorchs(name):
    make, size = CASES[name]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(4, 3, size, size)
        theirs = with_random_norms(make(), images)
        expected = theirs(images).numpy()
    state_dict = {key: array.numpy() for key, array in theirs.state_dict().items()}
    model = build_model(name)
    x = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    variables, _ = to_variables(state_dict, shapes)
    logits = jax.jit(model.apply)(variables, x)

    assert np.std(expected) > 0.01
    tolerance = TOLERANCES.get(name, 1e-4)
    np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)
    parameters = sum(p.numel() for p in theirs.parameters())
    assert num_parameters(shapes["params"]) == parameters
    state_dict = to_state_dict(variables)
    theirs.load_state_dict({k: torch.from_numpy(a) for k, a in state_dict.items()})
