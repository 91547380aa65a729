"""The pickles inside PyTorch files, read without executing them.

A pickle is a program: it names functions and calls them. Here the names are looked up
in a small table only. Tensors become references to bytes that are read later and
dictionaries stay dictionaries. Objects without weights (optimizers, devices, dtypes,
NumPy scalars) become a stand-in that ignores its arguments; other names are refused.
"""

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class UnsafePickleError(ValueError):
    """A pickle refers to a function or class that no file of weights needs."""


class StorageRef(NamedTuple):
    """The bytes of one or more tensors, not yet read.

    Attributes:
        key: Its name in the file.
        dtype: Its elements' type.
        numel: Its number of elements, as the pickle says.
    """

    key: str
    dtype: np.dtype
    numel: int


class TensorRef(NamedTuple):
    """A strided view into a storage, checked to lie inside it.

    Attributes:
        storage: The storage.
        offset: Of the first element, in elements.
        shape: The tensor's shape.
        strides: In elements, one for each dimension.
    """

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, buffer: bytes | memoryview) -> np.ndarray:
        """Copies the tensor out of its storage's bytes, into row-major order."""
        dtype = self.storage.dtype
        if len(buffer) != self.storage.numel * dtype.itemsize:
            raise ValueError(
                f"storage {self.storage.key!r}: expected {self.storage.numel} elements "
                f"of {dtype}, got {len(buffer)} bytes"
            )
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        view: np.ndarray = np.ndarray(
            self.shape,
            dtype,
            buffer=buffer,
            offset=self.offset * dtype.itemsize,
            strides=[stride * dtype.itemsize for stride in self.strides],
        )
        return np.array(view, order="C")


def load(stream: io.BytesIO) -> tuple[Any, dict[str, StorageRef]]:
    """Loads the next pickle of a PyTorch file.

    Args:
        stream: Where the pickle begins; left where it ends.

    Returns:
        The object, its tensors as `TensorRef`; and every storage it mentions, by key.

    Raises:
        UnsafePickleError: If the pickle has a name that is not in the table.
        Exception: Of any kind, if the pickle is malformed.
    """
    begin = stream.tell()
    # The C unpickler allocates a memo as long as the largest index it meets, so that
    # one flipped byte could ask for all memory.
    limit = stream.getbuffer().nbytes
    sizes = _TupleSizes()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name.endswith("PUT") and argument is not None and argument > limit:
            raise ValueError(f"the pickle's memo index {argument} is too large")
        sizes.follow(opcode, argument)
    end = stream.tell()
    pickled = stream.getvalue()[begin:end]
    unpickler = _Unpickler(io.BytesIO(pickled))
    return unpickler.load(), unpickler.storages


class _TupleSizes:
    """The number of items in each tuple of a pickle, nested ones unfolded.

    A tuple that holds another one twice, and so on forty times, is a hundred bytes of a
    pickle, and takes hours to hash or to print. Nothing else that is built here has a
    hash of its contents.
    """

    MOST = 1000
    BUILT = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # None is a mark.
        self._memo: dict[Any, int | None] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Does what an opcode does, with sizes in place of objects."""
        name, stack = opcode.name, self._stack
        if name == "MARK":
            stack.append(None)
            return
        if name.endswith("PUT") or name == "MEMOIZE":
            index = len(self._memo) if argument is None else argument
            self._memo[index] = stack[-1]
            return
        if name.endswith("GET"):
            stack.append(self._memo[argument])
            return
        if name == "DUP":
            stack.append(stack[-1])
            return
        taken = []
        before = opcode.stack_before
        if pickletools.markobject in before:
            while (top := stack.pop()) is not None:
                taken.append(top)
            before = before[: before.index(pickletools.markobject)]
        # POP takes a mark, where it meets one.
        taken += [stack.pop() or 0 for _ in before]
        size = 1 + sum(taken) if name in self.BUILT else 1
        if size > self.MOST:
            raise ValueError(f"the pickle has a tuple of more than {self.MOST} items")
        stack += [size for _ in opcode.stack_after]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        if (module, name) in _BUILDERS:
            build = _BUILDERS[module, name]
            # A new function each time, since a pickle can set a function's attributes.
            return lambda *arguments: build(*arguments)
        inert = _WITHOUT_WEIGHTS.get(module, ())
        if name in inert or module.startswith("torch.optim."):
            return _StandIn
        raise UnsafePickleError(
            f"the pickle refers to {module:.80}.{name:.80}, which a file of weights "
            "does not need; it was not executed. If you trust the file, load it with "
            "PyTorch and save only its state_dict(), or convert it to .npz or "
            ".safetensors"
        )

    def persistent_load(self, pid: Any) -> StorageRef:
        kind, storage_type, key, _, numel, *view = pid
        if kind != "storage" or storage_type not in tuple(_STORAGE_DTYPES):
            raise ValueError(
                f"expected the reference of a typed storage, got {pid!r:.80}"
            )
        if any(part is not None for part in view):
            raise ValueError("views of storages were written before PyTorch 0.4 only")
        if not isinstance(key, str) or not _are_sizes((numel,)):
            raise ValueError(
                f"expected a storage's key and size, got {key!r:.80}, {numel!r:.80}"
            )
        ref = StorageRef(key, np.dtype(_STORAGE_DTYPES[storage_type]), numel)
        if self.storages.setdefault(key, ref) != ref:
            raise ValueError(f"storage {key!r} is described in two ways")
        return ref


class _StandIn:
    """Accepts all that a pickle does to an object, and stores nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    """Replaces ``_rebuild_tensor_v2``, without gradients and hooks."""
    if not isinstance(storage, StorageRef):
        raise ValueError(f"expected a tensor's storage, got {storage!r:.80}")
    shape, strides = tuple(shape), tuple(strides)
    if not _are_sizes((offset, *shape, *strides)) or len(shape) != len(strides):
        raise ValueError(
            "expected a tensor's offset, shape and strides, got "
            f"{offset!r:.80}, {shape!r:.80} and {strides!r:.80}"
        )
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise ValueError(
            f"a tensor of shape {shape!s:.80}, strides {strides!s:.80} and offset "
            f"{offset} leaves its storage of {storage.numel} elements"
        )
    if math.prod(shape) > storage.numel:
        raise ValueError(
            f"a tensor of shape {shape!s:.80} repeats the {storage.numel} elements of "
            "its storage; save tensor.contiguous()"
        )
    return TensorRef(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> TensorRef:
    """Replaces ``_rebuild_parameter``."""
    if not isinstance(tensor, TensorRef):
        raise ValueError(f"expected a parameter's tensor, got {tensor!r:.80}")
    return tensor


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Replaces ``torch.Size``."""
    if not _are_sizes(tuple(sizes)):
        raise ValueError(f"expected a shape, got {sizes!r:.80}")
    return tuple(sizes)


def _are_sizes(values: tuple) -> bool:
    return all(type(v) is int and 0 <= v < 2**62 for v in values)


_STORAGE_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "BoolStorage": np.bool_,
}

_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): OrderedDict,
    # Without its factory.
    ("collections", "defaultdict"): lambda *_: {},
}

_DTYPES = ["float16", "float32", "float64", "bfloat16", "half", "float", "double"]
_DTYPES += ["uint8", "int8", "int16", "int32", "int64", "short", "int", "long", "bool"]
_BUILTINS = ["bool", "bytearray", "complex", "dict", "float", "int", "list", "str"]
_BUILTINS += ["frozenset", "set", "tuple"]
_NUMPY_BUILDERS = ["_reconstruct", "scalar"]

# Python 2 and 3 and NumPy 1 and 2 have different names for the same module.
_WITHOUT_WEIGHTS: dict[str, list[str]] = {
    "torch": ["device", *_DTYPES],
    "numpy": ["dtype", "ndarray"],
    "numpy.core.multiarray": _NUMPY_BUILDERS,
    "numpy._core.multiarray": _NUMPY_BUILDERS,
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "_codecs": ["encode"],
    "argparse": ["Namespace"],
    "collections": ["Counter"],
    "pathlib": ["PosixPath", "WindowsPath"],
}
