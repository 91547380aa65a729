"""The page on a checkpoint and a folder of images, done with PyTorch's own networks.

Skipped without torchvision, timm, onnx, onnxscript and onnxruntime.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_lines import run_module
from PIL import Image

from woodfisher_jax.models import build_model
from woodfisher_jax.training.resuming.saved_run import SavedRun, read_run

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# PyTorch's exporter and timm warn of their own doings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).parents[1] / "docs/finetune.md").read_text()
CLASSES = ("daisy", "iris", "lily", "rose", "tulip")
SIDE = 32
QUICK = (
    f"--config.data.image_size={SIDE}",
    "--config.dense.epochs=0",
    "--config.train.epochs=1",
    "--config.prune.end=0",
    "--config.prune.method=globalmagni",
)
"""Added to a run: what is tested is the way there and back."""

SMALL = {
    "224, 224": f"{SIDE}, {SIDE}",
    'weights="DEFAULT"': "weights=None",
    "pretrained=True": f"img_size={SIDE}",
}


def section(title: str) -> tuple[list[list[str]], str]:
    """The package's commands and the Python of a section of the page."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    commands = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    python = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    for given, small in SMALL.items():
        python = python.replace(given, small)
    return commands, python


def execute(title: str) -> dict[str, Any]:
    """Runs a section in this process: its Python, then its commands."""
    commands, python = section(title)
    for program, *arguments in commands:
        if program == "woodfisher":
            assert run_module("main", *arguments, *QUICK) == 0
        elif program == "python":
            _, module, *rest = arguments
            assert run_module(module.removeprefix("woodfisher_jax."), *rest) == 0
    names: dict[str, Any] = {}
    exec(python, names)
    return names


def logits(run: SavedRun, images: np.ndarray) -> np.ndarray:
    model = build_model(run.config.model.name, **run.config.model.settings)
    return np.asarray(jax.jit(model.apply)(run.variables, images))


def agree(found: Any, expected: Any) -> None:
    scale = np.abs(expected).max()
    assert np.std(expected) > 0.01 * scale
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With photos/, of five classes, and a file that is no image."""
    root = tmp_path_factory.mktemp("engineer")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in CLASSES:
            place = root / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                shape = (*rng.integers(20, 60, 2), 3)[: 2 if number == 1 else 3]
                pixels = rng.integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    (root / "photos/train/rose/0.png").write_bytes(b"\x89PNG")
    return root


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, SIDE, SIDE, 3), np.float32)


def test_a_residual_network_there_and_back(
    folder: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    (source,) = re.findall(r"```python\n(import torch, torchvision.*?)```", PAGE, re.S)
    exec(source.replace('weights="DEFAULT"', "weights=None"), {})
    execute("Train, prune, retrain")
    run = read_run("runs/photos")
    assert run.config.model.settings["num_classes"] == len(CLASSES)
    expected = logits(run, images)
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    model = execute("Back to PyTorch")["model"]
    with torch.no_grad():
        agree(model(channels_first).numpy(), expected)
    assert float((model.layer4[0].conv1.weight == 0).float().mean()) > 0.5

    _, python = section("To ONNX")
    exec(python, {"model": model})
    session = onnxruntime.InferenceSession("pruned.onnx")
    (name,) = (one.name for one in session.get_inputs())
    (found,) = session.run(None, {name: channels_first.numpy()})
    agree(found, expected)

    names = execute("A file of the size of the kept weights")
    assert names["masks"].keys() == {f"params/{path}" for path in run.masks}
    for ours, read in zip(
        jax.tree.leaves(run.variables), jax.tree.leaves(names["variables"]), strict=True
    ):
        np.testing.assert_array_equal(ours, read)


def test_a_transformer_there_and_back(
    folder: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    title = "A vision transformer of timm"
    exec(section(title)[1], {})
    commands, _ = section(title)
    assert run_module("main", *commands[0][1:], *QUICK) == 0
    run = read_run("runs/vit")
    assert run.config.data.mean == (0.5, 0.5, 0.5)
    out = "vit.safetensors"
    assert run_module("torch_weights", "runs/vit", f"--out={out}") == 0
    from safetensors.torch import load_file

    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=5)
    model.load_state_dict(load_file(out), strict=True)
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    agree(found.numpy(), logits(run, images))
