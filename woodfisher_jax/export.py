"""A pruned network to take away: one file from a saved run.

python -m woodfisher_jax.export runs/digits --format=bitmask --out=digits.safetensors
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from woodfisher_jax import data, extras, models
from woodfisher_jax.exit_codes import USAGE, exits
from woodfisher_jax.torch_weights import check_output, image_shape, write_state_dict
from woodfisher_jax.training.objective import predict
from woodfisher_jax.training.saved_run import WHICH, SavedRun, read_run
from woodfisher_jax.weights.latency import latency, latency_line
from woodfisher_jax.weights.serving import load_stablehlo, save_stablehlo
from woodfisher_jax.weights.sparse_files import save_sparse
from woodfisher_jax.weights.state_dicts import to_state_dict

ImageShape = tuple[int, ...]

BATCH_SIZES = (1, 64)
"""For which products are timed: what is fast for one row may be slow for many."""


class Format(NamedTuple):
    """What a run can be exported as.

    Attributes:
        suffix: Of the file's name.
        write: (file, run, images' shape) -> a remark, or "".
        needs_images: Whether it has to know the shape of an image.
    """

    suffix: str
    write: Callable[[Path, SavedRun, ImageShape], str]
    needs_images: bool = False


def _write_torch(out: Path, run: SavedRun, _: ImageShape) -> str:
    write_state_dict(out, to_state_dict(run.variables), overwrite=True)
    return "a state dict of PyTorch"


def _write_sparse(format: str) -> Callable[[Path, SavedRun, ImageShape], str]:
    def write(out: Path, run: SavedRun, _: ImageShape) -> str:
        masks = {f"params/{path}": mask for path, mask in run.masks.items()}
        save_sparse(out, run.variables, masks, format)
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(run.variables))
        return f"{100 * out.stat().st_size / dense:.1f} % of its {dense:,} dense bytes"

    return write


def _write_stablehlo(out: Path, run: SavedRun, image_shape: ImageShape) -> str:
    model = models.build_model(run.config.model.name, **run.config.model.settings)
    save_stablehlo(out, model, run.variables, image_shape)
    images = np.random.default_rng(0).standard_normal((2, *image_shape), np.float32)
    expected = jax.jit(predict, static_argnums=0)(model, run.variables, images)
    difference = np.abs(load_stablehlo(out)(images) - expected).max()
    return f"read back, its logits differ from the model's by {difference:.0e} at most"


FORMATS = {
    "torch": Format(".safetensors", _write_torch),
    **{
        name: Format(".safetensors", _write_sparse(name))
        for name in ("masked", "bitmask", "csr")
    },
    "stablehlo": Format(".stablehlo", _write_stablehlo, needs_images=True),
}
"""What a run is exported as: see docs/formats.md."""


def export(
    run: Path,
    format: str,
    out: Path,
    *,
    which: str = "latest",
    image_shape: ImageShape | None = None,
    data_dir: str | None = None,
    time_products: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes the network of a run to one file.

    Args:
        run: Folder of the run, or of one of its saves.
        format: A key of :data:`FORMATS`.
        out: The file.
        which: "latest" or "best" save.
        image_shape: [h, w, c]; default that of the run's data set, which is then read.
        data_dir: Where the data set is, if no longer where the config says.
        time_products: Whether to time the pruned arrays' products, dense and sparse.
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
    row = FORMATS[format]
    out = check_output(out, suffix=row.suffix, overwrite=overwrite)
    saved = read_run(run, which)
    if image_shape is None and row.needs_images:
        image_shape = _image_shape(saved, data_dir)
    remark = row.write(out, saved, image_shape or ())
    lines = [f"{out}: {out.stat().st_size:,} bytes, {remark}"]
    if time_products:
        for rows in BATCH_SIZES:
            found = latency(saved.variables["params"], saved.masks, rows)
            lines.append(latency_line(found))
    return lines


def _image_shape(run: SavedRun, data_dir: str | None) -> ImageShape:
    settings = run.config.data
    try:
        dataset = data.load(
            settings.name,
            data_dir=data_dir or settings.dir,
            options=settings.image_options,
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
  torch       a state dict, for load_state_dict
  masked      dense arrays, with their masks
  bitmask     the weights left, and a bit for each weight that says where
  csr         the weights left, as compressed sparse rows
  stablehlo   a program, for jax.export
examples:
  python -m woodfisher_jax.export runs/digits --format=bitmask --out=d.safetensors
  python -m woodfisher_jax.export runs/digits --format=stablehlo --out=d.stablehlo
exit codes: 0 done, 2 the command has to be changed""",
    )
    parser.add_argument(
        "run", type=Path, help="folder of a run, or one of its checkpoints/NUMBER"
    )
    parser.add_argument("--format", required=True, choices=list(FORMATS))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the file to write: .safetensors, or .stablehlo for that format",
    )
    parser.add_argument(
        "--which",
        choices=list(WHICH),
        default="latest",
        help="which save; best is chosen on the test split (default: latest)",
    )
    parser.add_argument(
        "--image_shape",
        type=image_shape,
        metavar="H,W,C",
        help="of the program's input (default: that of the run's data set)",
    )
    parser.add_argument("--data_dir", help="where the data set is, if it has moved")
    parser.add_argument(
        "--latency",
        dest="time_products",
        action="store_true",
        help="also time the products of the pruned arrays, dense and sparse",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there"
    )
    given = vars(parser.parse_args(arguments))
    with exits({ValueError: USAGE, OSError: USAGE}):
        lines = export(given.pop("run"), given.pop("format"), given.pop("out"), **given)
    print("\n".join(lines))


if __name__ == "__main__":
    cli()
