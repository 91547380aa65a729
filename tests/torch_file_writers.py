"""Writes files as ``torch.save`` does, without PyTorch, hostile ones included."""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

STORAGE_TYPES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to; calling it is left to the reader."""

    module: str
    name: str

    def __call__(self, *args):
        raise AssertionError("only the reader may call")


@dataclass
class Call:
    """A call that the pickle asks for, with state to set on the result."""

    function: Global
    args: tuple
    state: object = None


@dataclass(eq=False)
class Storage:
    """The elements behind tensors; ``numel`` is what the pickle claims."""

    elements: np.ndarray
    numel: int | None = None
    key: str = field(default="", init=False)

    def reference(self):
        numel = self.elements.size if self.numel is None else self.numel
        kind = Global("torch", STORAGE_TYPES[self.elements.dtype.name])
        return ("storage", kind, self.key, "cuda:0", numel)


def tensor(storage, offset, shape, strides):
    """A tensor as PyTorch pickles it, strides in elements."""
    args = (storage, offset, shape, strides, False, OrderedDict())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def tensor_of(array):
    """A tensor that shares the strides of an array."""
    base = array if array.base is None else array.base
    strides = tuple(s // array.itemsize for s in array.strides)
    start = array.__array_interface__["data"][0]
    offset = (start - base.__array_interface__["data"][0]) // array.itemsize
    return tensor(Storage(base.ravel(order="K")), offset, array.shape, strides)


class _Pickler(pickle._Pickler):
    """The pickler in Python, whose dispatch table can be extended."""

    dispatch = pickle._Pickler.dispatch.copy()

    def __init__(self, stream, storages, protocol, is_zip):
        super().__init__(stream, protocol)
        self.storages, self.is_zip = storages, is_zip

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
            obj.key = str(len(self.storages))
        return obj.reference() if self.is_zip else (*obj.reference(), None)

    def reducer_override(self, obj):
        if isinstance(obj, Call):
            return obj.function, obj.args, obj.state
        return NotImplemented

    def save_name(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    dispatch[Global] = save_name


def pickled(obj, storages, protocol=2, is_zip=True):
    stream = io.BytesIO()
    _Pickler(stream, storages, protocol, is_zip).dump(obj)
    return stream.getvalue()


def zip_file(obj, protocol=2, byte_order=b"little", **overrides):
    """The bytes of a file of PyTorch 1.6 or later; overrides replace members."""
    storages = []
    members = {"data.pkl": pickled(obj, storages, protocol)}
    members |= {"byteorder": byte_order, "version": b"3\n"}
    members |= {f"data/{s.key}": s.elements.tobytes() for s in storages}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (members | overrides).items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def legacy_file(obj, protocol=2, little_endian=True):
    """The bytes of a file of before PyTorch 1.6."""
    storages = []
    body = pickled(obj, storages, protocol, is_zip=False)
    machine = {"protocol_version": 1001, "little_endian": little_endian}
    head = [pickle.dumps(part, protocol) for part in (LEGACY_MAGIC, 1001, machine)]
    keys = pickle.dumps([s.key for s in storages], protocol)
    raw = [struct.pack("<q", s.elements.size) + s.elements.tobytes() for s in storages]
    return b"".join([*head, body, keys, *raw])


assert sys.byteorder == "little"
