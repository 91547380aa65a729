"""Pruned networks in ``.safetensors`` files of the size of the kept weights.

``docs/formats.md`` has the layouts, with loaders in ten lines of NumPy. Arrays and
masks are restored bit for bit, but for the sign of zeros that are pruned.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.masks import MasksLike, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.weights.files import load_safetensors, save_safetensors

if TYPE_CHECKING:
    from jax.experimental import sparse

Arrays = dict[str, np.ndarray]

FORMATS = ("masked", "bitmask", "csr")
"""Dense with the mask beside; kept weights with one bit for each weight; kept weights
as compressed sparse rows."""


class SparseFileError(ValueError):
    """A file that was not written by `save_sparse`, or that is damaged."""


def save_sparse(
    path: str | os.PathLike[str],
    params: Params,
    masks: MasksLike,
    format: str = "bitmask",
) -> None:
    """Writes a pruned network.

    Args:
        path: The ``.safetensors`` file; an existing one is replaced.
        params: Any pytree of arrays; its paths become the names.
        masks: From path to bool, True = kept, or a pytree of the structure of
            ``params``. Other arrays are stored dense.
        format: One of :data:`FORMATS`; default "bitmask", the smallest.

    Raises:
        ValueError: If there is no such format, a path has a colon, a mask does not fit
            its array, or a weight outside its mask is not zero.
        TypeError: If a mask is not boolean.

    Example:
        >>> import tempfile
        >>> from woodfisher_jax.weights import sparse_files
        >>> params = {"w": jnp.array([1.0, 0.0])}
        >>> masks = {"w": jnp.array([True, False])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sparse_files.save_sparse(f"{folder}/net.safetensors", params, masks)
        ...     arrays, masks = sparse_files.load_sparse(f"{folder}/net.safetensors")
        >>> arrays["w"].tolist(), masks["w"].tolist()
        ([1.0, 0.0], [True, False])
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; expected one of {list(FORMATS)}")
    masks = check_masks(params, masks)
    stored: Arrays = {}
    for name, leaf in leaves_by_path(params).items():
        array: np.ndarray = np.array(leaf, order="C")
        if ":" in name:
            raise ValueError(f"params: rename {name!r}; a colon parts name and part")
        if name not in masks:
            stored[name] = array
            continue
        mask = np.asarray(masks[name])
        if np.any(array[~mask] != 0):
            raise ValueError(
                f"params[{name!r}] is not zero where its mask is False; expected "
                "wf.apply_masks(params, masks)"
            )
        array[~mask] = 0  # a product with a mask leaves negative zeros
        for part, value in _encode(format, array, mask).items():
            stored[f"{name}:{part}" if part else name] = value
    save_safetensors(
        path, stored, {"format": f"woodfisher_jax {format}", "version": "1"}
    )


def load_sparse(
    path: str | os.PathLike[str], tree: Params | None = None
) -> tuple[Any, Arrays]:
    """Reads a file of `save_sparse`, in any format.

    Args:
        path: The file.
        tree: A pytree of the structure that was saved, of arrays or of shapes
            (``jax.eval_shape(model.init, ...)``). Default None: a dict by path.

    Returns:
        ``(arrays, masks)``: the arrays dense, in the structure of ``tree``, or by path
        without one; the masks by path.

    Raises:
        SparseFileError: If the file has another origin or is damaged.
        ValueError: If ``tree`` has other paths or shapes than the file.
        FileNotFoundError: If there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        stored, metadata = load_safetensors(path)
    except ValueError as error:
        raise SparseFileError(f"{path}: cannot be read ({error})") from error
    written_by = metadata.get("format", "")
    format = written_by.removeprefix("woodfisher_jax ")
    if format not in FORMATS:
        raise SparseFileError(
            f"{path}: expected the format woodfisher_jax with one of {list(FORMATS)}, "
            f"got {written_by!r}"
        )
    parts_of: dict[str, Arrays] = {}
    for key, value in stored.items():
        name, _, part = key.partition(":")
        parts_of.setdefault(name, {})[part] = value
    arrays: Arrays = {}
    masks: Arrays = {}
    for name, parts in parts_of.items():
        if parts.keys() == {""}:
            arrays[name] = parts[""]
            continue
        try:
            arrays[name], masks[name] = _decode(format, parts)
        except (KeyError, ValueError, IndexError, zlib.error) as error:
            raise SparseFileError(f"{path}: {name} is damaged ({error!r})") from error
    if tree is None:
        return arrays, masks
    found = {name: array.shape for name, array in arrays.items()}
    expected = {name: np.shape(leaf) for name, leaf in leaves_by_path(tree).items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"tree: {name!r} has shape {expected.get(name)} there and "
                f"{found.get(name)} in {path}; expected the structure that was saved"
            )
    return replace_leaves(tree, arrays), masks


def to_bcoo(
    array: jax.Array | np.ndarray, mask: jax.Array | np.ndarray
) -> "sparse.BCOO":
    """The kept weights as a sparse array of JAX.

    Args:
        array: Weights of any shape.
        mask: Of the same shape, bool.

    Returns:
        A BCOO with as many entries as the mask keeps; ``todense`` gives the array.

    Example:
        >>> from woodfisher_jax.weights import sparse_files
        >>> w = sparse_files.to_bcoo(jnp.eye(3), jnp.eye(3, dtype=bool))
        >>> w.nse, (jnp.arange(3.0) @ w).tolist()
        (3, [0.0, 1.0, 2.0])
    """
    # It imports SciPy, which `import woodfisher_jax` does without.
    from jax.experimental import sparse

    mask = np.asarray(mask)
    return sparse.BCOO(
        (jnp.asarray(np.asarray(array)[mask]), jnp.asarray(np.argwhere(mask))),
        shape=array.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def _encode(format: str, array: np.ndarray, mask: np.ndarray) -> Arrays:
    """The stored parts of an array; the part "" has the array's own name."""
    if format == "masked":
        return {"": array, "bits": _pack(mask)}
    parts = {"values": array[mask], "shape": np.asarray(array.shape, np.int64)}
    if format == "bitmask":
        return parts | {"bits": _pack(mask)}
    matrix = mask.reshape(-1, mask.shape[-1])
    rows = np.append(0, np.cumsum(matrix.sum(1)))
    return parts | {
        "columns": np.nonzero(matrix)[1].astype(np.min_scalar_type(mask.shape[-1] - 1)),
        "rows": rows.astype(np.min_scalar_type(rows[-1])),
    }


def _decode(
    format: str, parts: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The array and its mask."""
    if format == "masked":
        return parts[""], _unpack(parts["bits"], parts[""].shape)
    if format == "bitmask":
        mask = _unpack(parts["bits"], parts["shape"])
    else:
        mask = np.zeros(parts["shape"], bool)
        # Signed, since their differences are taken.
        ends = parts["rows"].astype(np.int64)
        rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        mask.reshape(-1, mask.shape[-1])[rows, parts["columns"]] = True
    array = np.zeros(mask.shape, parts["values"].dtype)
    array[mask] = parts["values"]
    return array, mask


def _pack(mask: np.ndarray) -> np.ndarray:
    bits = np.packbits(mask.ravel(), bitorder="little").tobytes()
    # Random bits, but few ones: Huffman coding of bytes is within 3 % of their entropy.
    return np.frombuffer(zlib.compress(bits, 9), np.uint8)


def _unpack(packed: np.ndarray, shape: Any) -> np.ndarray:
    number = int(np.prod(shape))
    expected = -(-number // 8)
    # The limit keeps a hostile file from filling the memory.
    bits = zlib.decompressobj().decompress(packed.tobytes(), expected + 1)
    if len(bits) != expected:
        raise ValueError(f"expected {expected} bytes of mask for {number} weights")
    kept = np.unpackbits(np.frombuffer(bits, np.uint8), count=number, bitorder="little")
    return kept.astype(bool).reshape(shape)
