"""The command that writes a run or a file as a PyTorch state dict.

    python -m woodfisher_jax.torch_weights runs/resnet50 --out=resnet50.safetensors
    python -m woodfisher_jax.torch_weights d.pth --model=vgg16_bn --out=v.safetensors

In PyTorch: ``model.load_state_dict(safetensors.torch.load_file(...))``.
"""

import argparse
import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from woodfisher_jax import models
from woodfisher_jax.exit_codes import USAGE, exits
from woodfisher_jax.progress import live
from woodfisher_jax.training.resuming.saved_run import WHICH, read_run, read_weights
from woodfisher_jax.weights.files import check_output, save_safetensors
from woodfisher_jax.weights.state_dicts import (
    narrowed_to,
    to_state_dict,
    to_variables,
)

IMAGE_SHAPE = (224, 224, 3)
"""Of ImageNet."""

TORCH_METADATA = {"format": "pt"}
"""What other libraries expect in a ``.safetensors`` file of PyTorch."""


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    image_shape: Sequence[int] = IMAGE_SHAPE,
    which: str = "latest",
    masks: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, np.ndarray]:
    """Writes the weights of a run or a file as a PyTorch state dict.

    Args:
        source: A file for `read_state_dict`, the folder of a run or of one of its
            saves.
        out: A ``.safetensors`` file.
        model: The model that the weights are of, which may have fewer outputs of some
            layers; optional for a run.
        settings: The model's settings; default none.
        image_shape: [h, w, c] of the model's input; default that of ImageNet.
        which: "latest" or "best" save of a run.
        masks: A second ``.safetensors`` file, for the masks; default none is written.
        overwrite: Whether existing files are replaced.

    Returns:
        What was written to ``out``.

    Raises:
        ValueError: If the source cannot be read, is of another model or has no masks,
            or a file for the output has another suffix.
        OSError: If a file is missing, or one exists already.
    """
    for path in [out] if masks is None else [out, masks]:
        check_output(path, overwrite=overwrite)
    if model is None and settings:
        raise ValueError(f"settings={dict(settings)}: give the model that they are of")
    if model is None and Path(source).is_file():
        raise ValueError(
            f"model: {source} is a file, so name the model its weights are of, one of "
            f"{', '.join(models.MODELS)}"
        )
    kept: Mapping[str, Any]
    if model is None:
        run = read_run(source, which)
        variables, kept = run.variables, run.masks
    else:
        image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
        network = models.build_model(model, **settings or {})
        weights = read_weights(source, which)
        _, shapes = narrowed_to(weights, network, image)
        variables, kept = to_variables(weights, shapes)
    if masks is not None and not kept:
        raise ValueError(f"masks: {source} has none; leave the argument out")
    state_dict = to_state_dict(variables)
    save_safetensors(out, state_dict, TORCH_METADATA)
    if masks is not None:
        save_safetensors(masks, to_state_dict({"params": kept}), TORCH_METADATA)
    return state_dict


def image_shape(text: str) -> tuple[int, ...]:
    """Reads an argument such as 32,32,3."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected height,width,channels such as 32,32,3, got {text!r}"
        )
    return tuple(int(size) for size in sizes)


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def cli(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m woodfisher_jax.torch_weights``."""
    parser = argparse.ArgumentParser(
        prog="python -m woodfisher_jax.torch_weights",
        description="Writes the weights of a run or a file as a PyTorch state dict.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""in PyTorch: model.load_state_dict(safetensors.torch.load_file(OUT))
examples:
  python -m woodfisher_jax.torch_weights runs/digits --out=digits.safetensors
  python -m woodfisher_jax.torch_weights resnet50.pth --model=resnet50 \\
      --out=resnet50.safetensors
exit codes: 0 done, 1 the disk is full, 2 the command has to be changed""",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="folder of a run (or one of its checkpoints/NUMBER), or a .pth, .pt, "
        ".ckpt, .npz or .safetensors file",
    )
    add("--out", type=Path, required=True, help="the .safetensors file to write")
    add("--model", help="what the weights are of, such as resnet50; needed for a file")
    add(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the model, such as num_classes=10; may be repeated",
    )
    add(
        "--image_shape",
        type=image_shape,
        default=IMAGE_SHAPE,
        metavar="H,W,C",
        help="of the model's input; only mlp, logistic_regression, cifarnet and the "
        "transformers have weights that depend on it (default: 224,224,3)",
    )
    add(
        "--which",
        choices=list(WHICH),
        default="latest",
        help="which save of a run; best is chosen on the test split (default: latest)",
    )
    add("--masks", type=Path, help="a second .safetensors file, for the masks")
    add("--overwrite", action="store_true", help="replace files that are there")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    given["settings"] = dict(given["settings"])
    source = given.pop("source")
    with exits({ValueError: USAGE, OSError: USAGE}), live(f"reading {source}"):
        state_dict = convert(source, out, **given)
    print(f"{out}: {len(state_dict)} tensors, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli()
