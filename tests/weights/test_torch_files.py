import os
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_file_writers import (
    Call,
    Global,
    Storage,
    legacy_file,
    tensor,
    tensor_of,
    zip_file,
)

from woodfisher_jax.weights.torch_files import TorchFileError, read_state_dict
from woodfisher_jax.weights.torch_pickle import UnsafePickleError

WRITERS = {"zip": zip_file, "legacy": legacy_file}
DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.float64,
    np.uint8,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.bool_,
]

both_formats = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def read(tmp_path):
    """Reads a state dict out of bytes."""

    def read_bytes(content, name="model.pth"):
        (tmp_path / name).write_bytes(content)
        return read_state_dict(tmp_path / name)

    return read_bytes


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("pickle_file", "arrays_file", "count"),
    [
        ("mnist_25_epoch_93.97.ckpt", "mnist_mlpnet_93.97.npz", 6),
        ("resnet20_cifar10.pth.tar", "resnet20_cifar10.npz", 128),
    ],
)
def test_originals_checkpoints_equal_their_arrays(
    pickle_file, arrays_file, count, checkpoints_dir
):
    state_dict = read_state_dict(checkpoints_dir / pickle_file)
    expected = read_state_dict(checkpoints_dir / arrays_file)
    assert list(state_dict) == list(expected)
    assert len(state_dict) == count
    for key, array in expected.items():
        assert_same(state_dict[key], array)


@both_formats
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(write, dtype, read):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert_same(read(write({"w": tensor_of(array)}))["w"], array)


@both_formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_scalars_and_shared_storages(write, protocol, read):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    shared = Storage(base.ravel())
    state_dict = {
        "transposed": tensor(shared, 0, (6, 4), (1, 6)),
        "every second": tensor(shared, 1, (4, 3), (6, 2)),
        "scalar": tensor(shared, 23, (), ()),
        "expanded": tensor(shared, 5, (3, 2), (0, 1)),
        "empty": tensor(Storage(base[:0]), 0, (0, 5), (5, 1)),
        "count": tensor_of(np.array(7)),
    }
    arrays = read(write(state_dict, protocol=protocol))
    assert_same(arrays["transposed"], base.T)
    assert_same(arrays["every second"], base[:, 1::2])
    assert_same(arrays["scalar"], base[3, 5])
    assert_same(arrays["expanded"], np.stack([base.ravel()[5:7]] * 3))
    assert_same(arrays["empty"], np.empty((0, 5), np.float32))
    assert_same(arrays["count"], np.array(7))
    for array in arrays.values():
        assert array.flags.writeable
        assert array.flags.c_contiguous


@both_formats
@pytest.mark.parametrize(
    "key",
    [
        "state_dict",
        "model_state_dict",
        "model",
        "net",
        "module",
        "state_dict_ema",
        "model_ema",
        "ema_state_dict",
        "generator",
    ],
)
def test_weights_are_found_among_other_entries(write, key, read):
    weight = np.ones((2, 2), np.float32)
    scalar = Call(
        Global("numpy.core.multiarray", "scalar"), (Global("numpy", "dtype"),)
    )
    checkpoint = {
        "epoch": 3,
        "best": scalar,
        "device": Call(Global("torch", "device"), ("cuda", 0)),
        "dtype": Global("torch", "float32"),
        "optimizer": {"state": {0: {"momentum_buffer": tensor_of(weight * 9)}}},
        "scheduler": Call(
            Global("torch.optim.lr_scheduler", "StepLR"), (), {"gamma": 0.1}
        ),
        "history": Call(
            Global("collections", "defaultdict"), (Global("builtins", "list"),)
        ),
        key: {
            "w": Call(
                Global("torch._utils", "_rebuild_parameter"),
                (tensor_of(weight), True, {}),
            ),
            "size": Call(Global("torch", "Size"), ([2, 2],)),
        },
    }
    state_dict = read(write(checkpoint))
    assert list(state_dict) == ["w"]
    assert_same(state_dict["w"], weight)


def test_the_network_comes_before_its_average_and_two_networks_are_named(read):
    weights, average = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    both = {
        "state_dict_ema": {"w": tensor_of(average)},
        "state_dict": {"w": tensor_of(weights)},
    }
    assert_same(read(zip_file(both))["w"], weights)
    two = {name: {"w": tensor_of(weights)} for name in ("generator", "critic")}
    with pytest.raises(TorchFileError, match=r"each of.*'critic'.*'generator'"):
        read(zip_file(two))


def test_npz_and_safetensors_whatever_their_names(read, tmp_path):
    arrays = {"w": np.arange(6.0).reshape(2, 3), "n": np.array(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    half = {"w": np.ones((2, 3), ml_dtypes.bfloat16), "n": np.array(2**40)}
    for content, expected in [
        ((tmp_path / "a.npz").read_bytes(), arrays),
        (safetensors.numpy.save(half), half),
    ]:
        state_dict = read(content, "weights.bin")
        assert state_dict.keys() == expected.keys()
        for key, array in expected.items():
            assert_same(state_dict[key], array)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: expected a file"):
        read_state_dict(tmp_path / "absent.pth")


@both_formats
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch", "load"),
        ("numpy", "save"),
        ("woodfisher_jax.weights.torch_files", "read_state_dict"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_other_names_are_refused_and_not_executed(write, module, name, read, tmp_path):
    proof = tmp_path / "executed"
    call = Call(Global(module, name), (f"touch {proof}",))
    weights = {"w": tensor_of(np.ones(3, np.float32))}
    with pytest.raises(UnsafePickleError, match=rf"model\.pth: .*{module}\.{name}"):
        read(write({"state_dict": weights, "extra": call}))
    assert not proof.exists()


def test_stand_ins_execute_nothing(read, tmp_path):
    proof = tmp_path / "executed"
    scheduler = Call(
        Global("torch.optim.lr_scheduler", "LambdaLR"),
        (f"touch {proof}",),
        {"__class__": "os.system", "__setstate__": f"touch {proof}"},
    )
    weight = np.ones(3, np.float32)
    state_dict = read(zip_file({"model": {"w": tensor_of(weight)}, "s": scheduler}))
    assert_same(state_dict["w"], weight)
    assert not proof.exists()


def test_a_pickle_cannot_alter_the_functions_it_is_given(read):
    # BUILD with a pair sets attributes: here, defaults for all four arguments.
    alteration = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00" + (
        b"__defaults__(K\x01K\x02K\x03K\x04ts\x86b."
    )
    with pytest.raises(TorchFileError, match="holds no tensors"):
        read(zip_file({}, **{"data.pkl": alteration}))
    call = Call(Global("torch._utils", "_rebuild_tensor_v2"), ())
    with pytest.raises(TorchFileError, match="missing 4 required"):
        read(zip_file({"w": call}))


@both_formats
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),
        (6, (1,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2,), (2**61,)),
        (0, (2**61,), (2**61,)),
        (-1, (1,), (1,)),
        (5, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2, 3), (3,)),
        (0, (True,), (1,)),
        (0.0, (2,), (1,)),
        (0, ("2",), (1,)),
        (0, 2, (1,)),
        (2**70, (1,), (1,)),
        (0, (2**50,), (0,)),
    ],
)
def test_tensors_must_lie_inside_their_storage(write, offset, shape, strides, read):
    storage = Storage(np.arange(6, dtype=np.float32))
    with pytest.raises(TorchFileError, match=r"model\.pth"):
        read(write({"w": tensor(storage, offset, shape, strides)}))


@both_formats
@pytest.mark.parametrize("numel", [5, 7, 2**61, -1, "6"])
def test_storages_must_have_the_size_the_pickle_says(write, numel, read):
    storage = Storage(np.arange(6, dtype=np.float32), numel=numel)
    with pytest.raises(TorchFileError):
        read(write({"w": tensor(storage, 0, (5,), (1,))}))


def test_tensors_need_a_storage(read):
    with pytest.raises(TorchFileError, match="expected a tensor's storage"):
        read(zip_file({"w": tensor(b"abcdefgh", 0, (2,), (1,))}))


def test_a_storage_has_one_type(read):
    one, two = Storage(np.zeros(4, np.float32)), Storage(np.zeros(4, np.int32))
    content = legacy_file(
        {"a": tensor(one, 0, (4,), (1,)), "b": tensor(two, 0, (4,), (1,))}
    )
    assert read(content)["b"].dtype == np.int32
    with pytest.raises(TorchFileError, match="described in two ways"):
        read(content.replace(b"X\x01\x00\x00\x002", b"X\x01\x00\x00\x001"))


def test_a_huge_memo_index_is_refused_before_memory_is_asked_for(read):
    # LONG_BINPUT with an index of 2 ** 32 - 1.
    hostile = b"\x80\x02}r\xff\xff\xff\xff."
    with pytest.raises(TorchFileError, match="memo index 4294967295"):
        read(zip_file({}, **{"data.pkl": hostile}))


def nested(levels):
    """A tuple that holds the one before twice, and so on: 5 bytes a level."""
    pickled = b"\x80\x02)"
    for level in range(levels):
        index = level.to_bytes(4, "little")
        pickled += b"r" + index + b"j" + index + b"\x86"
    return pickled


@pytest.mark.parametrize("end", [b"q\xfe0}h\xfeK\x01s.", b"Q.", b"."])
def test_nested_tuples_do_not_hang(end, read):
    # As a key of a dictionary, as the reference of a storage, and as the whole.
    with pytest.raises(TorchFileError, match="tuple of more than 1000 items"):
        read(zip_file({}, **{"data.pkl": nested(60) + end}))


def test_a_builder_hands_no_tuple_on(read):
    hidden = nested(8)[2:] + b"\x85R"
    for _ in range(8):
        hidden = b"ctorch._utils\n_rebuild_parameter\n" + hidden
    with pytest.raises(TorchFileError, match="expected a parameter's tensor"):
        read(zip_file({}, **{"data.pkl": b"\x80\x02" + hidden + b"."}))


def test_small_files_do_not_fill_the_memory(read, tmp_path):
    one = Storage(np.zeros(1, np.float32))
    with pytest.raises(TorchFileError, match=r"repeats the 1 elements.*contiguous"):
        read(zip_file({"w": tensor(one, 0, (2**30,), (0,))}))
    shared = Storage(np.zeros(100, np.float32))
    views = {f"w{i}": tensor(shared, 0, (100 - i,), (1,)) for i in range(50)}
    with pytest.raises(TorchFileError, match=r"storages that they share 400;"):
        read(zip_file(views))
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", bytes(2**27))
    with pytest.raises(TorchFileError, match=r"134,217,728 bytes, more than 100 times"):
        read((tmp_path / "bomb").read_bytes())


def test_tied_weights_are_one_array(read):
    shared = Storage(np.arange(6, dtype=np.float32))
    arrays = read(
        zip_file({f"w{i}": tensor(shared, 0, (2, 3), (3, 1)) for i in range(9)})
    )
    assert all(array is arrays["w0"] for array in arrays.values())


@pytest.mark.parametrize("key", ["w" * 501, "w\x1b[2J"])
def test_names_that_cannot_be_printed_are_refused(key, read):
    with pytest.raises(TorchFileError, match="expected at most 500 printable") as found:
        read(zip_file({key: tensor_of(np.ones(3, np.float32))}))
    assert len(str(found.value)) < 300
    assert "\x1b" not in str(found.value)


def test_compressed_members_are_refused(read, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"0" * 10_000)
    with pytest.raises(TorchFileError, match=r"data\.pkl is compressed"):
        read((tmp_path / "bomb").read_bytes())


@both_formats
def test_big_endian_files_are_refused(write, read):
    weights = {"w": tensor_of(np.ones(3, np.float32))}
    order = {"byte_order": b"big"} if write is zip_file else {"little_endian": False}
    with pytest.raises(TorchFileError, match="big-endian"):
        read(write(weights, **order))


def sample_files(tmp_path):
    weights = {f"w{i}": np.arange(40, dtype=np.float32) + i for i in range(3)}
    tensors = {"state_dict": {k: tensor_of(a) for k, a in weights.items()}, "epoch": 1}
    np.savez(tmp_path / "sample.npz", **weights)
    return {
        "zip": zip_file(tensors),
        "legacy": legacy_file(tensors),
        "safetensors": safetensors.numpy.save(weights),
        "npz": (tmp_path / "sample.npz").read_bytes(),
    }, weights


FORMATS = ["zip", "legacy", "safetensors", "npz"]


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files(kind, read, tmp_path):
    content = sample_files(tmp_path)[0][kind]
    for length in {*range(0, len(content), 17), 1, 9, 40, len(content) - 1}:
        with pytest.raises(TorchFileError, match=r"model\.pth: "):
            read(content[:length])


@pytest.mark.parametrize("kind", FORMATS)
def test_corrupt_bytes_never_do_worse_than_an_error(kind, read, tmp_path):
    content, weights = sample_files(tmp_path)
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        broken = bytearray(content[kind])
        broken[rng.randrange(len(broken))] ^= rng.randrange(1, 256)
        try:
            state_dict = read(bytes(broken))
        except (TorchFileError, UnsafePickleError):
            refused += 1
        else:
            # Nothing but the zip formats has check sums.
            assert all(a.size <= 40 * 256 for a in state_dict.values())
            if kind in {"zip", "npz"}:
                for key, array in state_dict.items():
                    assert_same(array, weights[key])
    assert refused


@pytest.mark.parametrize(
    "head", [b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]
)
def test_random_bytes(head, read):
    for seed in range(20):
        with pytest.raises(TorchFileError):
            read(head + random.Random(seed).randbytes(200))


def test_empty_and_foreign_files_say_so(read):
    with pytest.raises(TorchFileError, match="it is empty"):
        read(b"")
    with pytest.raises(TorchFileError, match=r"begins with b'hello wo'"):
        read(b"hello world")


@both_formats
@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], 7, {"state_dict": None}])
def test_files_without_tensors(write, content, read):
    with pytest.raises(TorchFileError, match=r"holds no tensors.*state_dict"):
        read(write(content))


def test_arrays_that_are_no_numbers(read, tmp_path):
    for array in (np.ones(3, ml_dtypes.bfloat16), np.array(["a"])):
        np.savez(tmp_path / "a.npz", w=array)
        with pytest.raises(TorchFileError, match=r"'w' has dtype"):
            read((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "a.npz", w=np.array([os.system], dtype=object))
    with pytest.raises(TorchFileError, match="allow_pickle"):
        read((tmp_path / "a.npz").read_bytes())
