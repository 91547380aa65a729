"""PyTorch's state dicts to the variables of the models, and the reverse.

The names map one to one:

    params/layer2/block0/downsample_conv/kernel     layer2.0.downsample.0.weight
    params/layer2/block0/bn1/scale                  layer2.0.bn1.weight
    batch_stats/layer2/block0/bn1/mean              layer2.0.bn1.running_mean
    params/model1/depthwise_0/kernel                model.1.0.weight
    params/blocks0/attn/qkv/kernel                  blocks.0.attn.qkv.weight
    params/model/layers_0/mlp/up_proj/kernel        model.layers.0.mlp.up_proj.weight

Kernels are stored as [..., in, out] here and as [out, in, ...] there.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from woodfisher_jax.models.resizing import layer_outputs, narrowed
from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
}

_SEGMENTS = (
    (re.compile(r"block(\d+)"), r"\1"),
    (re.compile(r"(model|features|classifier|blocks)(\d+)"), r"\1.\2"),
    (re.compile(r"(layers?)_(\d+)"), r"\1.\2"),
    # PyTorch has the place in a sequence only, and not what the layer is.
    (re.compile(r"(?:conv|bn|depthwise|pointwise|expand|project)_(\d+)"), r"\1"),
    (re.compile(r"downsample_conv"), "downsample.0"),
    (re.compile(r"downsample_bn"), "downsample.1"),
    (re.compile(r"patch_embed_proj"), "patch_embed.proj"),
)

_MASK = re.compile(r"(^|\.)_(weight|bias|cls_token|pos_embed)_mask$")
_COUNT = "num_batches_tracked"
_COUNTS = (_COUNT, "n_averaged")
"""Of batches, and of the averages of ``AveragedModel``; neither is a weight."""

_WRAPPERS = (
    "module",  # DataParallel, DistributedDataParallel, AveragedModel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_layer",  # the original's masked layers
)
_MOST_KEYS_LISTED = 10


class StateDictMismatchError(ValueError):
    """A state dict and the model to fill have different names or shapes."""


def torch_name(path: str) -> str:
    """Translates a variable's path to the key of a PyTorch state dict.

    Args:
        path: Such as ``params/layer1/block0/conv1/kernel``, with its collection.

    Returns:
        Such as ``layer1.0.conv1.weight``.

    Raises:
        ValueError: If no layer in PyTorch has a parameter of the last name.
    """
    _, *segments, leaf = path.split("/")
    if leaf not in _LEAVES:
        raise ValueError(
            f"path {path!r}: expected it to end in one of {', '.join(_LEAVES)}"
        )
    return ".".join([*map(_torch_segment, segments), _LEAVES[leaf]])


def mask_name(name: str) -> str:
    """The key of a parameter's mask among the weights of the original's checkpoints.

    Args:
        name: Such as ``fc1.weight``.

    Returns:
        Such as ``fc1._weight_mask``, which `to_variables` reads.
    """
    layer, dot, parameter = name.rpartition(".")
    return f"{layer}{dot}_{parameter}_mask"


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """Converts a model's variables to a PyTorch state dict.

    Args:
        variables: The model's ``{"params": ..., "batch_stats": ...}``.

    Returns:
        Key to array in PyTorch's names and layout; `to_variables` restores every bit.
        Masks are converted alike: ``to_state_dict({"params": masks})``.

    Raises:
        ValueError: If no layer in PyTorch has one of the variables.

    Note:
        Here no batch norm counts its batches, and PyTorch reads the count only where
        the momentum is None; so ``num_batches_tracked`` is 0.
    """
    state_dict = {}
    for path, leaf in leaves_by_path(variables).items():
        name, array = torch_name(path), np.asarray(leaf)
        state_dict[name] = array.transpose(_torch_axes(path, array.ndim)).copy("C")
        layer, _, parameter = name.rpartition(".")
        if parameter == "running_var":
            state_dict[f"{layer}.{_COUNT}"] = np.zeros((), np.int64)
    return state_dict


def num_outputs(state_dict: Mapping[str, np.ndarray], variables: Any) -> dict[str, int]:
    """Outputs that the layers of a model have in a state dict.

    Args:
        state_dict: As for `to_variables`.
        variables: As for `to_variables`.

    Returns:
        From the path of a layer, such as ``layer1/block0/conv1``, to a number; layers
        that the state dict does not have are not there.
    """
    names = {_unwrapped(key): key for key in state_dict}
    paths = {path: torch_name(path) for path in leaves_by_path(variables)}
    prefix = _prefix(names, paths.values())
    found = {}
    for path, name in paths.items():
        layer, _, leaf = path.removeprefix("params/").rpartition("/")
        key = names.get(prefix + name)
        if leaf in ("kernel", "embedding") and key is not None:
            found[layer] = int(state_dict[key].shape[0 if leaf == "kernel" else -1])
    return found


def narrowed_to(
    state_dict: Mapping[str, np.ndarray], model: nn.Module, *inputs: Any
) -> tuple[nn.Module, Any]:
    """The model whose layers have as few outputs as in a state dict.

    Args:
        state_dict: As for `to_variables`.
        model: A network of this package.
        *inputs: What it is called with; arrays or shapes.

    Returns:
        The model, as `models.narrowed` gives it, and the shapes of its variables.

    Raises:
        ValueError: If an attention layer has part of a head.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found, usual = num_outputs(state_dict, shapes), layer_outputs(shapes)
    if any(found.get(layer, n) < n for layer, n in usual.items()):
        model = narrowed(model, found, *inputs)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return model, shapes


def to_variables(
    state_dict: Mapping[str, np.ndarray],
    variables: Any,
    own: Collection[str] = (),
) -> tuple[Any, dict[str, np.ndarray]]:
    """Fills a model's variables from a PyTorch state dict.

    Args:
        state_dict: Key to array. Names of wrappers at any place (``module.``,
            ``_orig_mod.``, the original's ``fc1._layer.weight``) and a prefix of all
            names (``model.``, ``net.``, ``ema_model.``) are left out; masks
            (``fc1._weight_mask``) are read; ``num_batches_tracked`` and ``n_averaged``
            are ignored. A dense layer may be stored as a 1 x 1 convolution; if that has
            no bias, the bias is zero.
        variables: The model's ``{"params": ..., "batch_stats": ...}``, arrays or
            shapes: what ``model.init`` returns, or ``jax.eval_shape`` of it.
        own: Paths such as ``params/fc/kernel`` of variables that stay as they are,
            whatever the state dict has in their place. Default none.

    Returns:
        The variables, as NumPy arrays of the model's dtypes, zero where a mask is
        False; and the masks by path inside the parameters, True = kept, an empty dict
        when the state dict has none.

    Raises:
        StateDictMismatchError: If a key is missing, unexpected or of another shape, or
            several prefixes have the whole model.
        ValueError: If a mask has values other than 0 and 1, or a weight is of whole
            numbers.

    Note:
        The dense checkpoints of STR, from which the paper prunes, end in a 1 x 1
        convolution without a bias. The original then leaves the bias of its own
        classifier at random values; here it is zero, which is what STR trained.
    """
    targets = leaves_by_path(variables)
    weights, masks = _match(state_dict, targets, own)
    kept = {path: (mask == 1).copy("C") for path, mask in masks.items()}
    leaves = {}
    for path, array in weights.items():
        if array.dtype.kind in "biu" and targets[path].dtype.kind not in "biu":
            raise ValueError(
                f"{torch_name(path)} has dtype {array.dtype}; expected floating-point "
                "weights: multiply a quantized tensor by its scale before saving it"
            )
        leaves[path] = array.astype(targets[path].dtype, order="C")
        if path in kept:
            leaves[path][~kept[path]] = 0
    return (
        replace_leaves(variables, leaves),
        {path.removeprefix("params/"): mask for path, mask in kept.items()},
    )


def _match(
    state_dict: Mapping[str, np.ndarray],
    targets: Mapping[str, Any],
    own: Collection[str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights and the masks of a state dict by path, in the layout used here."""
    paths = {torch_name(path): path for path in targets}
    weights: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    zero_biases: dict[str, np.ndarray] = {}
    unexpected, misshaped = [], []
    names = {key: _unwrapped(key) for key in state_dict}
    prefix = _prefix(names.values(), paths)
    for key, array in state_dict.items():
        name = names[key]
        if name.split(".")[-1] in _COUNTS:
            continue
        weight_name = _MASK.sub(r"\1\2", name)
        found = weights if weight_name == name else masks
        inside = weight_name.startswith(prefix)
        path = paths.get(weight_name.removeprefix(prefix)) if inside else None
        if path in own:
            continue
        # A path that is filled already: the file has the weight twice, once prefixed.
        if path is None or path in found:
            unexpected.append(key)
            continue
        shape = targets[path].shape
        if len(shape) == 2 and array.shape[2:] == (1, 1):
            array = array[..., 0, 0]
            bias = path.removesuffix("kernel") + "bias"
            if bias in targets:
                zero_biases[bias] = np.zeros(targets[bias].shape, array.dtype)
        axes = _torch_axes(path, len(shape))
        expected = tuple(shape[axis] for axis in axes)
        if array.shape == expected:
            array = array.transpose(np.argsort(axes))
        else:
            misshaped.append(f"{key} (state dict {array.shape}, model {expected})")
        if found is masks:
            _check_mask(key, array)
        found[path] = array
    weights = zero_biases | weights
    missing = [
        name for name, path in paths.items() if path not in weights and path not in own
    ]
    _refuse_mismatch(missing, unexpected, misshaped)
    return weights, masks


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _prefix(names: Iterable[str], wanted: Collection[str]) -> str:
    """What comes before the names of the model: the prefix that most of them have.

    Args:
        names: Of a state dict.
        wanted: Of the model.

    Raises:
        StateDictMismatchError: If several prefixes have all names, as in a file with a
            network and its average.
    """
    found: dict[str, set[str]] = {"": set()}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            rest = ".".join(parts[i:])
            if rest in wanted:
                found.setdefault(name.removesuffix(rest), set()).add(rest)
    whole = [prefix for prefix, rest in found.items() if len(rest) == len(wanted)]
    if len(whole) > 1:
        raise StateDictMismatchError(
            "state_dict: it has the whole model several times, under the prefixes "
            f"{', '.join(map(repr, whole))}; save the keys of one of them to a file of "
            "its own"
        )
    return max(found, key=lambda prefix: len(found[prefix]))


def _torch_segment(segment: str) -> str:
    for pattern, name in _SEGMENTS:
        if match := pattern.fullmatch(segment):
            return match.expand(name)
    return segment


def _torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The axes of a variable in PyTorch's order."""
    if not path.endswith("/kernel"):
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _check_mask(key: str, mask: np.ndarray) -> None:
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        raise ValueError(
            f"mask {key!r}: expected only 0 (pruned) and 1 (kept), got {wrong[0]}"
        )


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
            + ", and the image size"
            * any("pos_embed" in key for key in misshaped)
        )
