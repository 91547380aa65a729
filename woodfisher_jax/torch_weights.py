"""Weights from PyTorch and back: files, state dicts, saved runs; also a command.

    python -m woodfisher_jax.torch_weights runs/resnet50 --out=resnet50.safetensors
    python -m woodfisher_jax.torch_weights d.pth --model=vgg16_bn --out=v.safetensors

The file is a state dict: ``model.load_state_dict(safetensors.torch.load_file(...))``.
"""

import argparse
import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from woodfisher_jax import models
from woodfisher_jax.exit_codes import USAGE, exits
from woodfisher_jax.training.saved_run import WHICH, read_run
from woodfisher_jax.weights.state_dicts import (
    StateDictMismatchError,
    mask_name,
    to_state_dict,
    to_variables,
    torch_name,
)
from woodfisher_jax.weights.torch_files import TorchFileError, read_state_dict
from woodfisher_jax.weights.torch_pickle import UnsafePickleError

__all__ = [
    "StateDictMismatchError",
    "TorchFileError",
    "UnsafePickleError",
    "read_state_dict",
    "read_weights",
    "to_state_dict",
    "to_variables",
    "torch_name",
    "write_state_dict",
]

IMAGE_SHAPE = (224, 224, 3)
"""Of ImageNet."""


def read_weights(
    path: str | os.PathLike[str], which: str = "latest"
) -> dict[str, np.ndarray]:
    """Reads a state dict from a file or from a run of this project.

    Args:
        path: A file for :func:`read_state_dict`, the folder of a run or that of one of
            its saves.
        which: "latest" or "best" save of a run.

    Returns:
        Key to array; the masks of a run under the names of the original's wrapped
        modules, as `to_variables` reads them.

    Raises:
        ValueError: If the file or the run cannot be read.
        FileNotFoundError: If there is neither.
    """
    if not Path(path).is_dir():
        return read_state_dict(path)
    run = read_run(path, which)
    masks = to_state_dict({"params": run.masks})
    return {
        **to_state_dict(run.variables),
        **{mask_name(name): mask for name, mask in masks.items()},
    }


def write_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, np.ndarray],
    *,
    overwrite: bool = False,
) -> None:
    """Writes arrays to a ``.safetensors`` file, whole or not at all.

    Args:
        path: Where to.
        state_dict: Key to array.
        overwrite: Whether an existing file is replaced; default False.

    Raises:
        ValueError: If the suffix is another.
        FileExistsError: If there is such a file.
        FileNotFoundError: If its folder is missing.
    """
    path = check_output(path, overwrite=overwrite)
    unfinished = path.with_name(path.name + ".tmp")
    # Not save_file: its files are for the owner alone, whatever the umask.
    unfinished.write_bytes(safetensors.numpy.save(dict(state_dict), {"format": "pt"}))
    unfinished.replace(path)


def check_output(
    path: str | os.PathLike[str],
    *,
    suffix: str = ".safetensors",
    overwrite: bool = False,
) -> Path:
    """Raises unless a file of that name may be written.

    Raises:
        ValueError: If the suffix is another.
        FileExistsError: If there is such a file.
        FileNotFoundError: If its folder is missing.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(
            f"out={path}: expected a name that ends in {suffix}, got "
            f"{path.suffix or 'no suffix'}"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path}: there is such a file; choose another name or --overwrite"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out={path}: there is no folder {path.parent}")
    return path


def model_shapes(
    name: str,
    settings: Mapping[str, Any],
    image_shape: Sequence[int] = IMAGE_SHAPE,
) -> Any:
    """The shapes of a model's variables; nothing is computed.

    Args:
        name: A row of ``models.MODELS``.
        settings: Its keyword arguments.
        image_shape: [h, w, c].

    Raises:
        ValueError: If there is no such model or it lacks one of the settings.
    """
    model = models.build_model(name, **settings)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


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
        source: As for `read_weights`.
        out: A ``.safetensors`` file.
        model: The model that the weights must be of; for a run, by default not asked.
        settings: The model's settings; default none.
        image_shape: [h, w, c] that the model is made for; default that of ImageNet.
        which: "latest" or "best" save of a run.
        masks: A second ``.safetensors`` file, for the masks; default none is written.
        overwrite: Whether existing files are replaced.

    Returns:
        What was written to ``out``.

    Raises:
        ValueError: If the source cannot be read, is of another model or has no masks,
            or a file for the output has another suffix.
        OSError: If a file is missing, or one is there already.
    """
    outputs = [out] if masks is None else [out, masks]
    for path in outputs:
        check_output(path, overwrite=overwrite)
    if model is None and settings:
        raise ValueError(f"settings={dict(settings)}: give the model that they are of")
    if model is None and not Path(source).is_dir():
        raise ValueError(
            f"model: {source} is no folder of a run, so name the model its weights are "
            f"of, one of {', '.join(models.MODELS)}"
        )
    kept: Mapping[str, Any]
    if model is None:
        run = read_run(source, which)
        variables, kept = run.variables, run.masks
    else:
        shapes = model_shapes(model, settings or {}, image_shape)
        variables, kept = to_variables(read_weights(source, which), shapes)
    if masks is not None and not kept:
        raise ValueError(f"masks: {source} has none; leave the argument out")
    state_dict = to_state_dict(variables)
    write_state_dict(out, state_dict, overwrite=overwrite)
    if masks is not None:
        beside = to_state_dict({"params": kept})
        write_state_dict(masks, beside, overwrite=overwrite)
    return state_dict


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def image_shape(text: str) -> tuple[int, ...]:
    """Reads an argument such as 32,32,3."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected height,width,channels such as 32,32,3, got {text!r}"
        )
    return tuple(int(size) for size in sizes)


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
exit codes: 0 done, 2 the command has to be changed""",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="folder of a run (or one of its checkpoints/NUMBER), or a .pth, .pt, "
        ".ckpt, .npz or .safetensors file",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the .safetensors file to write"
    )
    parser.add_argument(
        "--model", help="what the weights are of, such as resnet50; needed for a file"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the model, such as num_classes=10; may be repeated",
    )
    parser.add_argument(
        "--image_shape",
        type=image_shape,
        default=IMAGE_SHAPE,
        metavar="H,W,C",
        help="of the model's input; only mlp, logistic_regression, cifarnet and the "
        "transformers have weights that depend on it (default: 224,224,3)",
    )
    parser.add_argument(
        "--which",
        choices=list(WHICH),
        default="latest",
        help="which save of a run; best is chosen on the test split (default: latest)",
    )
    parser.add_argument(
        "--masks", type=Path, help="a second .safetensors file, for the masks"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are there"
    )
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    with exits({ValueError: USAGE, OSError: USAGE}):
        given["settings"] = dict(given["settings"])
        state_dict = convert(given.pop("source"), out, **given)
    print(f"{out}: {len(state_dict)} tensors, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli()
