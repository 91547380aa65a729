"""The command that writes the pruned network of a saved run to one file.

python -m woodfisher_jax.export runs/digits --format=bitmask --out=digits.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from woodfisher_jax import data, extras, models
from woodfisher_jax.exit_codes import USAGE, exits
from woodfisher_jax.progress import live
from woodfisher_jax.torch_weights import TORCH_METADATA, image_shape
from woodfisher_jax.training.forward_passes import forward_passes
from woodfisher_jax.training.resuming.saved_run import WHICH, SavedRun, read_run
from woodfisher_jax.training.small_network import without_structures
from woodfisher_jax.weights import sparse_files
from woodfisher_jax.weights.files import check_output, save_safetensors
from woodfisher_jax.weights.latency import (
    BATCH_SIZES,
    forward_line,
    latency,
    latency_line,
)
from woodfisher_jax.weights.serving import load_stablehlo, save_stablehlo
from woodfisher_jax.weights.state_dicts import to_state_dict
from woodfisher_jax.weights.torch_code import torch_code
from woodfisher_jax.written_files import replace_file

FORMATS = ("torch", *sparse_files.FORMATS, "stablehlo")
"""What a run is exported as: see docs/formats.md."""


def export(
    run: Path,
    format: str,
    out: Path,
    *,
    which: str = "latest",
    image_shape: tuple[int, ...] | None = None,
    data_dir: str | None = None,
    shrink: bool = False,
    time_products: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes the network of a run to one file.

    Args:
        run: Folder of the run, or of one of its saves.
        format: One of :data:`FORMATS`. "torch" also writes lines of PyTorch that build
            a network from which structure was taken out, beside the file, as ``.py``.
        out: The file: ``.stablehlo`` for that format, else ``.safetensors``.
        which: "latest" or "best" save.
        image_shape: [h, w, c] of a program's input; default that of the run's data set,
            which is then read.
        data_dir: Where the data set is, if no longer where the config says.
        shrink: Whether channels, neurons and heads that the masks have emptied are
            taken out first.
        time_products: Whether to time the pruned arrays' products, dense and sparse;
            of a network from which structure was taken out whole forward passes too.
        overwrite: Whether an existing file is replaced.

    Returns:
        Lines to print.

    Raises:
        ValueError: If there is no such format, run or save, or the suffix is another.
        OSError: If the file exists, or its folder or the data set does not.
    """
    if format == "stablehlo":
        extras.require("flatbuffers", f"format={format!r}")
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; expected one of {list(FORMATS)}")
    suffix = ".stablehlo" if format == "stablehlo" else ".safetensors"
    out = check_output(out, suffix=suffix, overwrite=overwrite)
    saved = read_run(run, which)
    lines = []
    if shrink:
        whole = models.num_parameters(saved.variables["params"])
        saved = without_structures(saved, image_shape or _image_shape(saved, data_dir))
        left = models.num_parameters(saved.variables["params"])
        lines.append(
            f"taken out: {whole - left:,} of {whole:,} parameters, {left:,} are left"
        )
    if format == "torch":
        if saved.config.model.settings.get("widths"):
            lines.append(_write_code(out, saved, overwrite))
        save_safetensors(out, to_state_dict(saved.variables), TORCH_METADATA)
        remark = "a state dict of PyTorch"
    elif format == "stablehlo":
        remark = _write_program(
            out, saved, image_shape or _image_shape(saved, data_dir)
        )
    else:
        masks = {f"params/{path}": mask for path, mask in saved.masks.items()}
        sparse_files.save_sparse(out, saved.variables, masks, format)
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(saved.variables))
        remark = (
            f"{100 * out.stat().st_size / dense:.1f} % of its {dense:,} dense bytes"
        )
    lines.insert(0, f"{out}: {out.stat().st_size:,} bytes, {remark}")
    if time_products:
        for rows in BATCH_SIZES:
            found = latency(saved.variables["params"], saved.masks, rows)
            lines.append(latency_line(found))
        lines += map(forward_line, forward_passes(saved, image_shape))
    return lines


def _model(run: SavedRun) -> nn.Module:
    return models.build_model(run.config.model.name, **run.config.model.settings)


def _write_code(weights: Path, run: SavedRun, overwrite: bool) -> str:
    file = weights.with_suffix(".py")
    check_output(file, suffix=".py", overwrite=overwrite)
    replace_file(file, torch_code(_model(run), weights.name))
    return f"{file}: load() builds the network in PyTorch with these weights"


def _write_program(out: Path, run: SavedRun, image_shape: tuple[int, ...]) -> str:
    model = _model(run)
    save_stablehlo(out, lambda images: model.apply(run.variables, images), image_shape)
    images = np.random.default_rng(0).standard_normal((2, *image_shape), np.float32)
    expected = jax.jit(model.apply)(run.variables, images)
    difference = np.abs(load_stablehlo(out)(images) - expected)
    return (
        f"read back, its logits differ from the model's by {difference.max():.0e} at "
        "most"
    )


def _image_shape(run: SavedRun, data_dir: str | None) -> tuple[int, ...]:
    settings = run.config.data
    try:
        dataset = data.load(
            settings.name,
            data_dir=data_dir or settings.dir,
            options=settings,
        )
    except data.DataMissingError as error:
        raise FileNotFoundError(
            f"{error}. Or give --image_shape, for which alone it was needed"
        ) from error
    return dataset.image_shape


def cli(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m woodfisher_jax.export``."""
    parser = argparse.ArgumentParser(
        prog="python -m woodfisher_jax.export",
        description="Writes the network of a saved run to one file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""formats (layouts and loaders: docs/formats.md):
  torch       a state dict, for load_state_dict; of a network of other widths than
              its model's also a .py that builds it
  masked      dense arrays, with their masks
  bitmask     the weights left, and a bit for each weight that says where
  csr         the weights left, as compressed sparse rows
  stablehlo   a program, for jax.export
examples:
  python -m woodfisher_jax.export runs/digits --format=bitmask --out=d.safetensors
  python -m woodfisher_jax.export runs/digits --format=stablehlo --out=d.stablehlo
exit codes: 0 done, 1 the disk is full, 2 the command has to be changed""",
    )
    add = parser.add_argument
    add("run", type=Path, help="folder of a run, or one of its checkpoints/NUMBER")
    add("--format", required=True, choices=list(FORMATS))
    add(
        "--out",
        type=Path,
        required=True,
        help="the file to write: .safetensors, or .stablehlo for that format",
    )
    add(
        "--which",
        choices=list(WHICH),
        default="latest",
        help="which save; best is chosen on the test split (default: latest)",
    )
    add(
        "--image_shape",
        type=image_shape,
        metavar="H,W,C",
        help="of the program's input (default: that of the run's data set)",
    )
    add("--data_dir", help="where the data set is, if it has moved")
    add(
        "--latency",
        dest="time_products",
        action="store_true",
        help="also time the products of the pruned arrays, dense and sparse; of a "
        "small network whole forward passes too",
    )
    add(
        "--shrink",
        action="store_true",
        help="take out channels, neurons and heads that the masks have emptied",
    )
    add("--overwrite", action="store_true", help="replace a file that is there")
    given = vars(parser.parse_args(arguments))
    run = given.pop("run")
    with exits({ValueError: USAGE, OSError: USAGE}), live(f"exporting {run}"):
        lines = export(run, given.pop("format"), given.pop("out"), **given)
    print("\n".join(lines))


if __name__ == "__main__":
    cli()
