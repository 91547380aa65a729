"""PyTorch's files of weights, read with NumPy alone.

Four formats, recognised by their first bytes: the zip that ``torch.save`` writes, the
stream of pickles it wrote before version 1.6, ``.npz`` and ``.safetensors``. No pickle
is executed (see `torch_pickle`).
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from woodfisher_jax.weights import torch_pickle
from woodfisher_jax.weights.files import load_safetensors
from woodfisher_jax.weights.torch_pickle import TensorRef, UnsafePickleError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_EXPANSION = 100
_LEAST_EXPANDED = 1 << 26
"""Bytes that compressed arrays of any file may take, and how many times its own."""

_MOST_SHARING = 4
"""How many times the bytes of their storages tensors may take together."""

_LONGEST_KEY = 500
_STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
    # Averages, where a file has nothing else.
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
)


class TorchFileError(ValueError):
    """A file without readable weights: corrupt, cut short or of another format."""


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a model from a file.

    Of a checkpoint with an optimizer and the like the weights are those under
    ``state_dict``, ``model_state_dict``, ``model``, ``net`` or ``module``, else the
    averages under ``state_dict_ema``, ``model_ema`` or ``ema_state_dict``, else those
    of the file itself, else those under its only key that has any.

    Args:
        path: A ``.pth``, ``.pt``, ``.ckpt``, ``.npz`` or ``.safetensors`` file. Its
            content decides the format, not its name.

    Returns:
        Key to array, in the file's order, layout and dtype (bfloat16 as
        ``ml_dtypes.bfloat16``). Tied weights are one array.

    Raises:
        FileNotFoundError: If there is no such file.
        TorchFileError: If the file is cut short, corrupt, of another format, or without
            tensors; or takes much more memory than its own size.
        UnsafePickleError: If the file's pickle refers to more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file of PyTorch weights, found none"
        )
    with path.open("rb") as file:
        head = file.read(32)
    name, read = _format_of(path, head)
    try:
        state_dict = read(path)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None
    # On broken bytes the parsers raise anything.
    except Exception as error:
        raise TorchFileError(
            f"{path}: looks like {name}, but cannot be read: {type(error).__name__}: "
            f"{error!s:.300}. If it is cut short or corrupt, fetch or save it again"
        ) from error
    _check_entries(path, state_dict)
    if not state_dict:
        raise TorchFileError(
            f"{path}: holds no tensors, neither by itself nor under "
            f"{', '.join(_STATE_DICT_KEYS)}. Save the model's state_dict() to it"
        )
    return state_dict


def _format_of(
    path: Path, head: bytes
) -> tuple[str, Callable[[Path], dict[str, np.ndarray]]]:
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (.pth or .npz)", _read_zip
    if _LEGACY_MAGIC.to_bytes(10, "little") in head:
        return "a PyTorch file of before version 1.6", _read_legacy
    # Eight bytes of length, then a header in JSON.
    if head[8:9] == b"{":
        return "a .safetensors file", lambda path: load_safetensors(path)[0]
    raise TorchFileError(
        f"{path}: expected a file by torch.save, .npz or .safetensors; "
        + (f"it begins with {head[:8]!r}" if head else "it is empty")
    )


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if not pickles:
            return _read_npz(path)
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in names:
            _check_byte_order(_read_member(archive, folder + "byteorder") == b"little")
        pickled = io.BytesIO(_read_member(archive, pickles[0]))
        root, _ = torch_pickle.load(pickled)
        tensors = _tensors_of(root)
        buffers = {
            key: _read_member(archive, f"{folder}data/{key}")
            for key in {tensor.storage.key for tensor in tensors.values()}
        }
    return _arrays(tensors, buffers)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    # PyTorch does not compress; so no member can be larger than its file.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as members:
        expanded = sum(member.file_size for member in members.infolist())
    most = max(_LEAST_EXPANDED, _MOST_EXPANSION * path.stat().st_size)
    if expanded > most:
        raise ValueError(
            f"its arrays take {expanded:,} bytes, more than {_MOST_EXPANSION} times "
            "its size; if they are right, write them with np.savez, not compressed"
        )
    with np.load(path, allow_pickle=False) as archive:
        entries = {key: archive[key] for key in archive}
    # Members that are no .npy files come as bytes.
    return {key: a for key, a in entries.items() if isinstance(a, np.ndarray)}


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Reads magic, protocol, machine, object and storage keys, then the storages."""
    stream = io.BytesIO(path.read_bytes())
    magic, _ = torch_pickle.load(stream)
    if magic != _LEGACY_MAGIC:
        raise ValueError(f"expected the magic number {_LEGACY_MAGIC:#x}")
    torch_pickle.load(stream)
    machine, _ = torch_pickle.load(stream)
    _check_byte_order(machine["little_endian"])
    root, storages = torch_pickle.load(stream)
    keys, _ = torch_pickle.load(stream)

    data, begin = stream.getbuffer(), stream.tell()
    buffers = {}
    for key in keys:
        (numel,) = struct.unpack_from("<q", data, begin)
        begin, end = begin + 8, begin + 8 + numel * storages[key].dtype.itemsize
        if numel != storages[key].numel or end > len(data):
            raise ValueError(f"storage {key!r:.80} is shorter than the pickle says")
        buffers[key] = data[begin:end]
        begin = end
    return _arrays(_tensors_of(root), buffers)


def _arrays(
    tensors: Mapping[str, TensorRef], buffers: Mapping[str, bytes | memoryview]
) -> dict[str, np.ndarray]:
    """Reads tensors out of the bytes of their storages."""
    refs = set(tensors.values())
    total = sum(math.prod(ref.shape) * ref.storage.dtype.itemsize for ref in refs)
    stored = sum(len(buffer) for buffer in buffers.values())
    if total > _MOST_SHARING * stored:
        raise ValueError(
            f"its tensors take {total:,} bytes, the storages that they share "
            f"{stored:,}; save tensor.clone() of each"
        )
    arrays = {ref: ref.read(buffers[ref.storage.key]) for ref in refs}
    return {key: arrays[ref] for key, ref in tensors.items()}


def _check_byte_order(is_little_endian: bool) -> None:
    if not is_little_endian:
        raise ValueError("written on a big-endian machine, which is not supported")


def _tensors_of(root: Any) -> dict[str, TensorRef]:
    """The tensors of the first dictionary that has any."""
    if not isinstance(root, Mapping):
        return {}
    for candidate in (*(root.get(key) for key in _STATE_DICT_KEYS), root):
        if tensors := _own_tensors(candidate):
            return tensors
    others = {key: _own_tensors(value) for key, value in root.items()}
    others = {key: tensors for key, tensors in others.items() if tensors}
    if len(others) > 1:
        raise ValueError(
            f"it has tensors under each of {sorted(map(repr, others))[:10]}; save the "
            "one that you mean to a file of its own"
        )
    return next(iter(others.values()), {})


def _own_tensors(candidate: Any) -> dict[str, TensorRef]:
    if not isinstance(candidate, Mapping):
        return {}
    return {
        key: value
        for key, value in candidate.items()
        if isinstance(key, str) and isinstance(value, TensorRef)
    }


def _check_entries(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    for key, array in state_dict.items():
        if len(key) > _LONGEST_KEY or not key.isprintable():
            raise TorchFileError(
                f"{path}: an array has the name {key!r:.80}; expected at most "
                f"{_LONGEST_KEY} printable characters"
            )
        if array.dtype.kind not in "biuf" and array.dtype != ml_dtypes.bfloat16:
            raise TorchFileError(
                f"{path}: {key!r} has dtype {array.dtype}, expected floats, integers "
                "or booleans. (An .npz file forgets that an array was bfloat16; a "
                ".safetensors file does not)"
            )
