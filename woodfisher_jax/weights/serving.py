"""A network as one StableHLO program, weights inside, through ``jax.export``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export

from woodfisher_jax.training.objective import Variables, predict

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where the program runs."""


def save_stablehlo(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Variables,
    image_shape: tuple[int, ...],
) -> None:
    """Writes the logits of a batch of any size as a program for all platforms.

    Args:
        path: The file; one that is there is replaced.
        model: A Linen classifier.
        variables: Its parameters, and running statistics where it has them.
        image_shape: [h, w, c]; images are float32, normalised as in training.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    logits = jax.jit(lambda images: predict(model, variables, images))
    program = export.export(logits, platforms=PLATFORMS)(images)
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(program.serialize())
    unfinished.replace(path)


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
    content = bytearray(Path(path).read_bytes())
    try:
        return jax.jit(export.deserialize(content).call)
    # What its parsers raise depends on where the bytes are wrong.
    except Exception as error:
        raise ValueError(
            f"{path}: expected a program by jax.export ({type(error).__name__}: "
            f"{error}); export it again"
        ) from error
