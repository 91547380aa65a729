"""A network as one StableHLO program, weights inside, through ``jax.export``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from woodfisher_jax.written_files import replace_file

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where the program runs."""


def save_stablehlo(
    path: str | os.PathLike[str],
    predict: Callable[[jax.Array], Any],
    image_shape: tuple[int, ...],
) -> None:
    """Writes a function of a batch of any size as a program for all platforms.

    Args:
        path: The file; an existing one is replaced.
        predict: Images [batch, h, w, c], float32, to logits [batch, classes]; arrays
            that it closes over, such as the weights, become constants of the program.
        image_shape: [h, w, c].
    """
    # Imported here, since it needs flatbuffers.
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    program = export.export(jax.jit(predict), platforms=PLATFORMS)(images)
    replace_file(path, program.serialize())


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
    """Reads a program; it needs JAX, and neither this model nor its weights.

    Args:
        path: A file of `save_stablehlo`.

    Returns:
        Images [batch, h, w, c] to logits [batch, classes].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no program.
    """
    from jax import export

    content = bytearray(Path(path).read_bytes())
    try:
        return jax.jit(export.deserialize(content).call)
    # What its parsers raise depends on where the bytes are wrong.
    except Exception as error:
        raise ValueError(
            f"{path}: expected a program by jax.export ({type(error).__name__}: "
            f"{error}); export it again"
        ) from error
