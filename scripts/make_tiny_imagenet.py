"""Writes a small set of JPEG files laid out like ImageNet, in both forms it is read in.

    python scripts/make_tiny_imagenet.py --out=DIR --classes=10 --per_class=20

DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG are what ``imagenet_folder`` reads,
DIR/imagenet2012 what ``imagenet`` reads; both with ``--config.data.dir=DIR``. What is
drawn, see ``woodfisher_jax/data/generated.py``.
"""

import argparse
from pathlib import Path

from woodfisher_jax.data import generated


def main() -> None:
    """Reads the flags and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write in")
    parser.add_argument("--classes", type=int, default=10, help="default 10")
    parser.add_argument(
        "--per_class", type=int, default=20, help="training images (default 20)"
    )
    parser.add_argument(
        "--test_per_class",
        type=int,
        default=5,
        help="images to evaluate on (default 5)",
    )
    parser.add_argument(
        "--side", type=int, default=96, help="mean width and height (default 96)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    flags = parser.parse_args()
    shape = generated.Shape(
        flags.classes, flags.per_class, flags.test_per_class, flags.side
    )
    for name, number in shape._asdict().items():
        if number < 1:
            parser.error(f"--{name}: expected 1 or more; got {number}")
    generated.write_folder(flags.out, shape, flags.seed)
    generated.write_records(flags.out, shape, flags.seed)
    print(
        f"{shape.classes} classes of {shape.per_class} training and "
        f"{shape.test_per_class} test images in {flags.out}"
    )


if __name__ == "__main__":
    main()
