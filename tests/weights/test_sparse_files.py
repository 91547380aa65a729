"""Files of the size of the kept weights, without the loss of a bit."""

import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_runs import random_network

from woodfisher_jax.trees.masks import apply_masks, sparsity
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.sparse_files import (
    FORMATS,
    SparseFileError,
    load_sparse,
    save_sparse,
    to_bcoo,
)

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()
DTYPES = [np.float32, np.float16, jnp.bfloat16]


def loader(name: str) -> Any:
    """A function that the page prints."""
    names: dict[str, Any] = {}
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if name in c]
    exec(code, names)
    # Short enough to be written again in another language.
    assert len(re.search(r"def .*", code, re.S).group().splitlines()) <= 12
    return names[name]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        array = np.asarray(array)
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert np.asarray(found[key]).tobytes() == array.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_array_is_restored_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, format, shape, dtype, kept, seed
) -> None:
    """Of any bits: not a number, infinite, negative zero."""
    rng = np.random.default_rng(seed)
    bits = rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    mask = rng.random(shape) < kept
    array = np.frombuffer(bits, dtype).reshape(shape).copy()
    array[rng.random(shape) < 0.3] = -0.0
    array[~mask] = 0
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    params = {"a": [array], "b": np.arange(3, dtype=np.int32)}
    save_sparse(path, params, {"a/0": mask}, format)
    arrays, masks = load_sparse(path)
    assert_same(arrays, leaves_by_path(params))
    assert_same(masks, {"a/0": mask})
    if format != "masked":
        assert_same(loader(f"load_{format}")(path), leaves_by_path(params))


@pytest.fixture(scope="module")
def network() -> tuple:
    """ResNet-20 at 90 %, batch norms and all."""
    variables, masks = random_network("resnet20", (32, 32, 3), 0.9)
    masks = {f"params/{path}": mask for path, mask in masks.items()}
    return variables, masks


@pytest.mark.parametrize(
    ("format", "least", "most"),
    [("masked", 1.0, 1.05), ("bitmask", 0.12, 0.15), ("csr", 0.13, 0.165)],
)
def test_sizes_of_a_network_at_90_percent(
    network: tuple, tmp_path: Path, format: str, least: float, most: float
) -> None:
    variables, masks = network
    path = tmp_path / "net.safetensors"
    save_sparse(path, variables, masks, format)
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert sparsity(masks) == pytest.approx(0.9, abs=0.002)
    assert least < path.stat().st_size / dense <= most
    arrays, found = load_sparse(path)
    assert_same(arrays, leaves_by_path(variables))
    assert_same(found, masks)
    shapes = jax.eval_shape(lambda: variables)
    back, found = load_sparse(path, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert_same(leaves_by_path(back), leaves_by_path(variables))
    assert_same(found, masks)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"w": np.ones((3, 2))}, "'w' has shape (3, 2) there and (2, 3) in"),
        ({"w": np.ones((2, 3)), "b": 1.0}, "'b' has shape () there and None in"),
        ({}, "'w' has shape None there and (2, 3) in"),
    ],
)
def test_a_tree_of_another_structure_is_refused(
    tree: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    save_sparse(path, ONE, ALL)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_sparse(path, tree)


@pytest.mark.parametrize(
    "shape",
    [(3, 3, 4, 6), *(pytest.param(s, marks=pytest.mark.slow) for s in ((6,), (5, 7)))],
)
def test_bcoo_is_the_array(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random(shape) < 0.3)
    array = jnp.where(mask, jnp.float32(rng.standard_normal(shape)), 0)
    found = to_bcoo(array, mask)
    assert found.nse == int(mask.sum())
    np.testing.assert_array_equal(found.todense(), array)
    if len(shape) == 2:
        x = jnp.float32(rng.standard_normal((4, 5)))
        np.testing.assert_allclose(x @ found, x @ array, rtol=1e-5, atol=1e-6)


ONE = {"w": jnp.ones((2, 3))}
ALL = {"w": jnp.ones((2, 3), bool)}


@pytest.mark.parametrize(
    ("params", "masks", "format", "words"),
    [
        (ONE, ALL, "zip", r"format='zip'; expected one of \['masked', 'bitmask'"),
        (ONE, {"w": ~ALL["w"]}, "csr", "not zero where its mask is False"),
        (ONE, {"v": ALL["w"]}, "csr", "names 'v'"),
        ({"w:x": ONE["w"]}, {"w:x": ALL["w"]}, "csr", "rename 'w:x'"),
    ],
)
def test_invalid_arguments_are_refused(
    tmp_path: Path, params: dict, masks: dict, format: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        save_sparse(tmp_path / "x.safetensors", params, masks, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_negative_zeros_of_a_product_with_the_mask_are_pruned_weights(
    tmp_path: Path, format: str
) -> None:
    mask = jnp.array([[True, False, False], [False, True, True]])
    params = {"w": np.array([[1.0, -2, 3], [-4, -0.0, 6]]) * np.asarray(mask)}
    assert np.signbit(params["w"])[0, 1]
    save_sparse(tmp_path / "x.safetensors", params, {"w": mask}, format)
    found = load_sparse(tmp_path / "x.safetensors")[0]["w"]
    np.testing.assert_array_equal(found, params["w"])
    # Kept, and restored bit for bit.
    assert np.argwhere(np.signbit(found)).tolist() == [[1, 1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def test_other_files_are_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_sparse(path)
    safetensors.numpy.save_file({"w": np.ones(3)}, path, {"format": "pt"})
    with pytest.raises(SparseFileError, match="got 'pt'"):
        load_sparse(path)


def bits(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


@pytest.mark.parametrize(
    ("format", "part", "value"),
    [
        ("masked", "", None),
        *[
            (format, "bits", bits(content))
            for format in ("masked", "bitmask")
            for content in (zlib.compress(b""), zlib.compress(bytes(99)), b"no zlib")
        ],
        *[
            (format, part, None)
            for format, part in [
                *[("bitmask", part) for part in ("bits", "values", "shape")],
                *[("csr", part) for part in ("values", "columns", "rows", "shape")],
            ]
        ],
        ("bitmask", "values", np.ones(2, np.float32)),
        ("csr", "values", np.ones(2, np.float32)),
        ("csr", "columns", np.full(3, 9, np.uint8)),
    ],
)
def test_a_damaged_part_is_reported(
    path: Path, format: str, part: str, value: np.ndarray | None
) -> None:
    """Missing, of another size, or out of range."""
    mask = {"w": jnp.array([[True, False, True], [True, False, False]])}
    save_sparse(path, apply_masks(ONE, mask), mask, format)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(SparseFileError, match="cannot be read"):
        load_sparse(path)
    path.write_bytes(whole)
    stored = safetensors.numpy.load_file(path)
    name = f"w:{part}" if part else "w"
    del stored[name]
    if value is not None:
        stored[name] = value
    metadata = {"format": f"woodfisher_jax {format}"}
    safetensors.numpy.save_file(stored, path, metadata)
    with pytest.raises(SparseFileError, match="w is damaged"):
        load_sparse(path)
