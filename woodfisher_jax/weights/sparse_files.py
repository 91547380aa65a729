"""Pruned networks in ``.safetensors`` files that are as small as the weights left.

The layouts, and loaders in ten lines of NumPy, are in ``docs/formats.md``. Every array
comes back bit for bit, and so do the masks.
"""

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import sparse

from woodfisher_jax.trees.masks import check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path

Arrays = dict[str, np.ndarray]


class SparseFileError(ValueError):
    """A file that this module has not written, or that is damaged."""


class Format(NamedTuple):
    """A way to store one array under a mask.

    Attributes:
        parts: The names after the colon.
        encode: (array, mask) -> part to array; the part "" is the array's own name.
        decode: Undoes it.
    """

    parts: tuple[str, ...]
    encode: Callable[[np.ndarray, np.ndarray], Arrays]
    decode: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def save_sparse(
    path: str | os.PathLike[str],
    params: Params,
    masks: Mapping[str, jax.Array],
    format: str = "bitmask",
) -> None:
    """Writes a pruned network.

    Args:
        path: The ``.safetensors`` file; one that is there is replaced.
        params: Any pytree of arrays; its paths become the names.
        masks: From path to bool, True = kept. Other arrays are stored as they are.
        format: A key of :data:`FORMATS`; default "bitmask", the smallest.

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
    check_masks(params, masks)
    stored: Arrays = {}
    for name, leaf in leaves_by_path(params).items():
        array: np.ndarray = np.array(leaf, order="C")
        if ":" in name:
            raise ValueError(f"params: rename {name!r}; a colon parts name and part")
        if name not in masks:
            stored[name] = array
            continue
        mask = np.asarray(masks[name])
        if array[~mask].tobytes().strip(b"\0"):
            raise ValueError(
                f"params[{name!r}] is not zero where its mask is False; expected "
                "wf.apply_masks(params, masks)"
            )
        for part, value in FORMATS[format].encode(array, mask).items():
            stored[f"{name}:{part}" if part else name] = value
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    metadata = {"format": f"woodfisher_jax {format}", "version": "1"}
    # Not save_file: its files are for the owner alone, whatever the umask.
    unfinished.write_bytes(safetensors.numpy.save(stored, metadata))
    unfinished.replace(path)


def load_sparse(path: str | os.PathLike[str]) -> tuple[Arrays, Arrays]:
    """Reads what `save_sparse` has written, in any format.

    Args:
        path: The file.

    Returns:
        ``(arrays, masks)`` by path, arrays dense; for a pytree:
        ``paths.replace_leaves(params, arrays)``.

    Raises:
        SparseFileError: If the file is another, or damaged.
        FileNotFoundError: If there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safetensors.safe_open(path, "np") as file:
            written_by = (file.metadata() or {}).get("format", "")
        stored = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise SparseFileError(f"{path}: cannot be read ({error})") from error
    name = written_by.removeprefix("woodfisher_jax ")
    if name not in FORMATS:
        raise SparseFileError(
            f"{path}: expected the format woodfisher_jax with one of {list(FORMATS)}, "
            f"got {written_by!r}"
        )
    parts, decode = FORMATS[name].parts, FORMATS[name].decode
    masked = {key.rpartition(":")[0] for key in stored if ":" in key}
    arrays: Arrays = {}
    masks: Arrays = {}
    for key in dict.fromkeys(key.partition(":")[0] for key in stored):
        if key not in masked:
            arrays[key] = stored[key]
            continue
        try:
            found = {p: stored[f"{key}:{p}" if p else key] for p in parts}
            arrays[key], masks[key] = decode(found)
        except (KeyError, ValueError, IndexError, zlib.error) as error:
            raise SparseFileError(f"{path}: {key} is damaged ({error!r})") from error
    return arrays, masks


def to_bcoo(array: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> sparse.BCOO:
    """The weights that stay as a sparse array of JAX.

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
    mask = np.asarray(mask)
    return sparse.BCOO(
        (jnp.asarray(np.asarray(array)[mask]), jnp.asarray(np.argwhere(mask))),
        shape=array.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def _pack(mask: np.ndarray) -> np.ndarray:
    bits = np.packbits(mask.ravel(), bitorder="little").tobytes()
    # Random bits, but few ones: Huffman coding of bytes is within 3 % of their entropy.
    return np.frombuffer(zlib.compress(bits, 9), np.uint8)


def _unpack(packed: np.ndarray, shape: Any) -> np.ndarray:
    number = int(np.prod(shape))
    expected = -(-number // 8)
    bits = zlib.decompressobj().decompress(packed.tobytes(), expected + 1)
    if len(bits) != expected:
        raise ValueError(f"not {expected} bytes of mask, for {number} weights")
    kept = np.unpackbits(np.frombuffer(bits, np.uint8), count=number, bitorder="little")
    return kept.astype(bool).reshape(shape)


def _to_masked(array: np.ndarray, mask: np.ndarray) -> Arrays:
    return {"": array, "bits": _pack(mask)}


def _from_masked(parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return parts[""], _unpack(parts["bits"], parts[""].shape)


def _to_bitmask(array: np.ndarray, mask: np.ndarray) -> Arrays:
    shape = np.asarray(array.shape, np.int64)
    return {"bits": _pack(mask), "values": array[mask], "shape": shape}


def _from_bitmask(parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    mask = _unpack(parts["bits"], parts["shape"])
    array = np.zeros(mask.shape, parts["values"].dtype)
    array[mask] = parts["values"]
    return array, mask


def _to_csr(array: np.ndarray, mask: np.ndarray) -> Arrays:
    rows, columns = np.nonzero(_as_matrix(mask))
    pointers = np.zeros(_as_matrix(mask).shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(pointers) - 1), out=pointers[1:])
    return {
        "values": array[mask],
        "columns": columns.astype(np.min_scalar_type(array.shape[-1] - 1)),
        "rows": pointers.astype(np.min_scalar_type(pointers[-1])),
        "shape": np.asarray(array.shape, np.int64),
    }


def _from_csr(parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(parts["shape"], bool)
    matrix, ends = _as_matrix(mask), parts["rows"].astype(np.int64)
    rows = np.repeat(np.arange(len(matrix)), ends[1:] - ends[:-1])
    matrix[rows, parts["columns"]] = True
    array = np.zeros(parts["shape"], parts["values"].dtype)
    array[mask] = parts["values"]
    return array, mask


def _as_matrix(array: np.ndarray) -> np.ndarray:
    """[..., outputs] as [inputs, outputs]; a view."""
    return array.reshape(-1, array.shape[-1])


FORMATS = {
    "masked": Format(("", "bits"), _to_masked, _from_masked),
    "bitmask": Format(("bits", "values", "shape"), _to_bitmask, _from_bitmask),
    "csr": Format(("values", "columns", "rows", "shape"), _to_csr, _from_csr),
}
"""Dense with the mask beside; a bit for each weight and the values left; compressed
sparse rows."""
