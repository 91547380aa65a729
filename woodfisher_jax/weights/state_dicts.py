"""PyTorch's state dicts as variables of the models here, and back.

The names map one to one, so that a variable's path says what it is called in PyTorch:

    params/layer2/block0/downsample_conv/kernel     layer2.0.downsample.0.weight
    params/layer2/block0/bn1/scale                  layer2.0.bn1.weight
    batch_stats/layer2/block0/bn1/mean              layer2.0.bn1.running_mean
    params/model1/depthwise_0/kernel                model.1.0.weight
    params/blocks0/attn/qkv/kernel                  blocks.0.attn.qkv.weight

Kernels are stored as [..., in, out] here and as [out, in, ...] there.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
}

_SEGMENTS = (
    (re.compile(r"block(\d+)"), r"\1"),
    (re.compile(r"(model|features|classifier|blocks)(\d+)"), r"\1.\2"),
    # PyTorch has the place in a sequence only, and not what the layer is.
    (re.compile(r"(?:conv|bn|depthwise|pointwise|expand|project)_(\d+)"), r"\1"),
    (re.compile(r"downsample_conv"), "downsample.0"),
    (re.compile(r"downsample_bn"), "downsample.1"),
    (re.compile(r"patch_embed_proj"), "patch_embed.proj"),
)

_MASK = re.compile(r"(^|\.)_(weight|bias|cls_token|pos_embed)_mask$")
_COUNT = "num_batches_tracked"
_MOST_KEYS_LISTED = 10


class StateDictMismatchError(ValueError):
    """A state dict is of another model than the one it should fill."""


def torch_name(path: str) -> str:
    """Translates a variable's path to the key of a PyTorch state dict.

    Args:
        path: Such as ``params/layer1/block0/conv1/kernel``, with its collection.

    Returns:
        Such as ``layer1.0.conv1.weight``.

    Raises:
        ValueError: The last name is none that a layer has in PyTorch.
    """
    _, *segments, leaf = path.split("/")
    if leaf not in _LEAVES:
        raise ValueError(
            f"path {path!r}: expected it to end in one of {', '.join(_LEAVES)}"
        )
    return ".".join([*map(_torch_segment, segments), _LEAVES[leaf]])


def to_variables(
    state_dict: Mapping[str, np.ndarray], variables: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """Fills a model's variables from a PyTorch state dict.

    Args:
        state_dict: Key to array. A leading ``module.`` and the original's wrapped names
            (``fc1._layer.weight``, ``fc1._weight_mask``) are understood;
            ``num_batches_tracked`` is ignored. A dense layer may be stored as a
            1 x 1 convolution; if that has no bias, zeros stand for it.
        variables: The model's ``{"params": ..., "batch_stats": ...}``, arrays or
            shapes: what ``model.init`` returns, or ``jax.eval_shape`` of it.

    Returns:
        The variables, as NumPy arrays of the dtypes asked for, zero where a mask is;
        and the masks by path inside the parameters, True where a weight stays, an
        empty dict when the state dict has none.

    Raises:
        StateDictMismatchError: A key is missing, unexpected or of another shape.
        ValueError: A mask has values other than 0 and 1.

    Note:
        The dense checkpoints of STR, from which the paper prunes, end in a 1 x 1
        convolution without a bias. The original then leaves the bias of its own
        classifier at random values; here it is zero, which is what STR trained.
    """
    targets = leaves_by_path(variables)
    paths = {torch_name(path): path for path in targets}
    weights, masks, unexpected = _assign(state_dict, paths)
    weights |= _zero_biases(weights, targets)
    weights, masks = _as_dense(weights, targets), _as_dense(masks, targets)
    missing = [name for name, path in paths.items() if path not in weights]
    misshaped = _misshaped(weights, targets) + _misshaped(masks, targets)
    _refuse_mismatch(missing, unexpected, misshaped)

    kept = {path: _to_mask(path, entry) for path, entry in masks.items()}
    leaves = {}
    for path, entry in weights.items():
        array = _from_torch_layout(path, entry.array)
        array = array.astype(targets[path].dtype, order="C")
        if path in kept:
            array[~kept[path]] = 0
        leaves[path] = array
    return (
        replace_leaves(variables, leaves),
        {path.removeprefix("params/"): mask for path, mask in kept.items()},
    )


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """Writes a model's variables as a PyTorch state dict.

    Args:
        variables: The model's ``{"params": ..., "batch_stats": ...}``.

    Returns:
        Key to array in PyTorch's names and layout, which `to_variables` undoes bit
        for bit. Masks are translated alike: ``to_state_dict({"params": masks})``.

    Raises:
        ValueError: A variable is none that a layer has in PyTorch.

    Note:
        Nobody here counts the batches that a batch norm has seen, and PyTorch reads
        the count only where the momentum is None; so ``num_batches_tracked`` is 0.
    """
    state_dict = {}
    for path, leaf in leaves_by_path(variables).items():
        name = torch_name(path)
        state_dict[name] = _to_torch_layout(path, np.asarray(leaf)).copy(order="C")
        layer, _, parameter = name.rpartition(".")
        if parameter == "running_var":
            state_dict[f"{layer}.{_COUNT}"] = np.zeros((), np.int64)
    return state_dict


def mask_name(name: str) -> str:
    """The key of a parameter's mask among the weights of the original's checkpoints.

    Args:
        name: Such as ``fc1.weight``.

    Returns:
        Such as ``fc1._weight_mask``, which `to_variables` reads.
    """
    layer, dot, parameter = name.rpartition(".")
    return f"{layer}{dot}_{parameter}_mask"


class _Entry(NamedTuple):
    key: str
    array: np.ndarray


def _torch_segment(segment: str) -> str:
    for pattern, name in _SEGMENTS:
        if match := pattern.fullmatch(segment):
            return match.expand(name)
    return segment


def _assign(
    state_dict: Mapping[str, np.ndarray], paths: Mapping[str, str]
) -> tuple[dict[str, _Entry], dict[str, _Entry], list[str]]:
    """Sorts a state dict into weights and masks by path, and keys without a place."""
    weights: dict[str, _Entry] = {}
    masks: dict[str, _Entry] = {}
    unexpected = []
    for key, array in state_dict.items():
        name = re.sub(r"^(module\.)+", "", key).replace("._layer.", ".")
        if name.split(".")[-1] == _COUNT:
            continue
        plain_name = _MASK.sub(r"\1\2", name)
        entries = weights if plain_name == name else masks
        path = paths.get(plain_name)
        # Taken already: the file has the weight twice, once with a prefix.
        if path is None or path in entries:
            unexpected.append(key)
        else:
            entries[path] = _Entry(key, array)
    return weights, masks, unexpected


def _is_convolution_for_dense(array: np.ndarray, target: Any) -> bool:
    return len(target.shape) == 2 and array.shape[2:] == (1, 1)


def _zero_biases(
    weights: Mapping[str, _Entry], targets: Mapping[str, Any]
) -> dict[str, _Entry]:
    """Biases that dense layers lack when stored as 1 x 1 convolutions: zeros."""
    biases = {}
    for path, (key, array) in weights.items():
        bias = path.removesuffix("kernel") + "bias"
        absent = bias in targets and bias not in weights
        if absent and _is_convolution_for_dense(array, targets[path]):
            biases[bias] = _Entry(key, np.zeros(targets[bias].shape, array.dtype))
    return biases


def _as_dense(
    entries: Mapping[str, _Entry], targets: Mapping[str, Any]
) -> dict[str, _Entry]:
    """Reads 1 x 1 convolutions that stand for dense layers as such."""
    return {
        path: _Entry(key, array[..., 0, 0])
        if _is_convolution_for_dense(array, targets[path])
        else _Entry(key, array)
        for path, (key, array) in entries.items()
    }


def _misshaped(entries: Mapping[str, _Entry], targets: Mapping[str, Any]) -> list[str]:
    found = []
    for path, (key, array) in entries.items():
        expected = _torch_shape(path, targets[path].shape)
        if array.shape != expected:
            found.append(f"{key} (state dict {array.shape}, model {expected})")
    return found


def _refuse_mismatch(
    missing: list[str], unexpected: list[str], misshaped: list[str]
) -> None:
    parts = []
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshaped),
    ):
        if keys:
            rest = len(keys) - _MOST_KEYS_LISTED
            more = f" and {rest} more" if rest > 0 else ""
            listed = ", ".join(keys[:_MOST_KEYS_LISTED])
            parts.append(f"{what} ({len(keys)}): {listed}{more}")
    if parts:
        raise StateDictMismatchError(
            "state_dict: expected the keys and shapes of the model; "
            f"{'; '.join(parts)}. Check the model's name and settings"
        )


def _to_mask(path: str, entry: _Entry) -> np.ndarray:
    kept = entry.array == 1
    if not np.all(kept | (entry.array == 0)):
        raise ValueError(
            f"mask {entry.key!r}: expected only 0 (pruned) and 1 (kept), got "
            f"{entry.array[~kept & (entry.array != 0)][0]}"
        )
    return _from_torch_layout(path, kept).copy(order="C")


def _is_kernel(path: str) -> bool:
    return path.endswith("/kernel")


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not _is_kernel(path):
        return shape
    *spatial, inputs, outputs = shape
    return (outputs, inputs, *spatial)


def _to_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    if not _is_kernel(path):
        return array
    return np.moveaxis(array, (-1, -2), (0, 1))


def _from_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    if not _is_kernel(path):
        return array
    return np.moveaxis(array, (0, 1), (-1, -2))
