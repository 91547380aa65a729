"""Networks in the folders of Hugging Face's Transformers, read and written."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from woodfisher_jax.models.bert import Bert, BertConfig
from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.models.resizing import layer_outputs, resized
from woodfisher_jax.options import fields_of, shown
from woodfisher_jax.weights.files import load_safetensors, save_safetensors
from woodfisher_jax.weights.state_dicts import (
    StateDictMismatchError,
    narrowed_to,
    to_state_dict,
    to_variables,
)
from woodfisher_jax.weights.torch_code import torch_code
from woodfisher_jax.written_files import replace_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODE = "network.py"

_TOKENS = jax.ShapeDtypeStruct((1, 2), np.int32)
"""Of what a network is called with."""

COPIED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "README*",
    "LICENSE*",
    "[0-9]_*/*.json",
)
"""Files that are copied: config, tokenizer, licence, parts of Sentence Transformers."""


class Form(NamedTuple):
    """A kind of network.

    Attributes:
        config: Dataclass of its sizes, with Hugging Face's names.
        module: Builds the network from one.
        fixed: What the network does whatever a config says, by the config's names: the
            values that may be there.
        unused: Names of tensors that the network does without.
        sizes: From a size of the config to the layers whose outputs it gives; of heads,
            as many as these hold.
    """

    config: type
    module: Callable[[Any], nn.Module]
    fixed: Mapping[str, tuple[Any, ...]]
    unused: str
    sizes: Mapping[str, str]


FORMS = {
    "llama": Form(
        LlamaConfig,
        Llama,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "rope_scaling": (None,),
        },
        r"rotary_emb\.inv_freq$",
        {
            "hidden_size": r"embed_tokens$",
            "intermediate_size": r"gate_proj$",
            "num_attention_heads": r"q_proj$",
            "num_key_value_heads": r"k_proj$",
        },
    ),
    "bert": Form(
        BertConfig,
        Bert,
        {
            "hidden_act": ("gelu",),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
        },
        # The pooler and the heads of other tasks take the hidden states.
        r"(^|\.)pooler\.|^cls\.|^classifier\.|^qa_outputs\.|\.position_ids$",
        {
            "hidden_size": r"word_embeddings$",
            "intermediate_size": r"intermediate/dense$",
            "num_attention_heads": r"self/query$",
        },
    ),
}
"""From ``model_type`` to the network."""


class FolderError(ValueError):
    """A folder without a network that can be read; the message says what is wrong."""


def read_folder(folder: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """Reads a network of Hugging Face's Transformers.

    A layer of fewer outputs than the config says, from which structure was taken out,
    is read as it is; an attention layer has as many heads as its width holds.

    Args:
        folder: With ``config.json`` of one of `FORMS`, and ``model.safetensors`` or the
            shards that ``model.safetensors.index.json`` names.

    Returns:
        The Linen module, and its parameters as float32 NumPy arrays.

    Raises:
        FolderError: If a file is missing or damaged, a tensor has whole numbers, or the
            network is of another form.
        StateDictMismatchError: If tensors are missing, unexpected or of another shape,
            with their names.

    Example:
        >>> from woodfisher_jax.weights import hugging_face
        >>> module, params = hugging_face.read_folder("smollm2")  # doctest: +SKIP
        >>> logits = module.apply({"params": params}, tokens)  # doctest: +SKIP
    """
    folder = Path(folder)
    form, config = _read_config(folder)
    state_dict = _used(form, config, _read_weights(folder))
    try:
        module, shapes = narrowed_to(state_dict, form.module(config), _TOKENS)
        variables, masks = to_variables(state_dict, shapes)
    except StateDictMismatchError as error:
        raise StateDictMismatchError(f"{folder}: {error}") from error
    except ValueError as error:
        stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        absent = [f"{n}={getattr(config, n)}" for n in form.sizes if n not in stated]
        remedy = f"; {CONFIG} lacks {', '.join(absent)} (default)" if absent else ""
        raise FolderError(f"{folder}: {error}{remedy}") from error
    if masks:
        raise FolderError(f"{folder}: it has masks; expected weights alone")
    return module, variables["params"]


def read_shapes(folder: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """The network that a folder's ``config.json`` describes, without its weights.

    Args:
        folder: As for `read_folder`; ``config.json`` alone is read, so that a layer
            from which structure was taken out has the width that it says.

    Returns:
        The Linen module, and the shapes of its parameters.

    Raises:
        FolderError: If ``config.json`` is missing or damaged, or of another form.
    """
    form, config = _read_config(Path(folder))
    module = form.module(config)
    return module, jax.eval_shape(module.init, jax.random.key(0), _TOKENS)["params"]


def write_folder(
    folder: str | os.PathLike[str], params: Any, source: str | os.PathLike[str]
) -> None:
    """Writes a network so that ``transformers`` loads it as it does its source.

    Where structure was taken out, and as much in every block, the config has the new
    sizes. Where it is not as much, `read_folder` alone reads the folder; for PyTorch a
    Llama of that kind comes with ``network.py``, whose ``load()`` builds it.

    Args:
        folder: Made where absent; files in it are replaced.
        params: Of the module that `read_folder` gave for the source, or with fewer
            outputs of some of its layers.
        source: The folder that they were read from. Its names, dtypes and other files
            are taken, and the tensors that the module does without.

    Raises:
        FolderError: If the source cannot be read, or is the folder itself.
        StateDictMismatchError: If the parameters are of another network.
        WriteError: If the disk does not take a file; each is whole or absent.
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise FolderError(f"{folder}: expected another folder than that of the source")
    form, config = _read_config(source)
    written = _read_weights(source)
    new = to_state_dict({"params": params})
    used = _used(form, config, written)
    module = _module_of(params, form.module(config), used)
    is_small = bool(getattr(module, "widths", None))
    if is_small:
        written = dict(used)
    for key in used:
        array = written[key]
        name = next((n for n in new if key == n or key.endswith(f".{n}")), None)
        if name is None or (new[name].shape != array.shape and not is_small):
            given = "none" if name is None else new[name].shape
            raise StateDictMismatchError(
                f"params: expected {key} of shape {array.shape}, as {source} has it; "
                f"got {given}"
            )
        # In its place, so that no weight is in memory twice.
        written[key] = new[name].astype(array.dtype, copy=False)
    if getattr(config, "tie_word_embeddings", False):
        # Where a file has the tied head as well, it is the table.
        table = next(k for k in used if k.endswith("embed_tokens.weight"))
        written |= {k: written[table] for k in written if k.endswith("lm_head.weight")}
    for path in {path for pattern in COPIED for path in source.glob(pattern)}:
        if path.name != INDEX:
            replace_file(folder / path.relative_to(source), path.read_bytes())
    save_safetensors(folder / WEIGHTS, written, {"format": "pt"})
    if is_small and (sizes := _sizes(form, config, params)):
        stated = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        replace_file(folder / CONFIG, json.dumps(stated | sizes, indent=2) + "\n")
    elif is_small and isinstance(module, Llama):
        replace_file(folder / CODE, torch_code(module, WEIGHTS))


def _module_of(
    params: Any, module: nn.Module, state_dict: Mapping[str, np.ndarray]
) -> nn.Module:
    """The module that parameters are of: that of their source, or a smaller one."""
    own, shapes = narrowed_to(state_dict, module, _TOKENS)
    given, expected = map(layer_outputs, ({"params": params}, shapes))
    if given.keys() != expected.keys() or all(
        given[layer] >= expected[layer] for layer in given
    ):
        return own
    try:
        return resized(module, {"params": params}, _TOKENS)
    except ValueError as error:
        raise StateDictMismatchError(f"params: {error}") from error


def _sizes(form: Form, config: Any, params: Any) -> dict[str, int]:
    """Sizes of a config that are those of all blocks; none where blocks differ."""
    outputs = layer_outputs({"params": params})
    head = config.hidden_size // config.num_attention_heads
    sizes = {}
    if isinstance(config, LlamaConfig):
        sizes["head_dim"] = head = config.head_width
    for name, layers in form.sizes.items():
        found = {n for layer, n in outputs.items() if re.search(layers, layer)}
        if len(found) > 1:
            return {}
        sizes[name] = found.pop() // (head if name.endswith("heads") else 1)
    try:
        module = form.module(dataclasses.replace(config, **sizes))
    except ValueError:  # BERT has no size for the width of a head.
        return {}
    shapes = jax.eval_shape(module.init, jax.random.key(0), _TOKENS)["params"]
    fits = jax.tree.map(lambda a, b: a.shape == b.shape, shapes, params)
    return sizes if jax.tree.all(fits) else {}


def _read_config(folder: Path) -> tuple[Form, Any]:
    """The form that a folder is of, and its sizes."""
    path = folder / CONFIG
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        kind = stated["model_type"]
    except FileNotFoundError:
        raise FolderError(
            f"{path} is not there; expected a folder of Hugging Face's Transformers "
            f"with {CONFIG} and {WEIGHTS}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected a JSON "
            "object with model_type"
        ) from error
    form = FORMS.get(kind)
    if form is None:
        raise FolderError(
            f"{path}: model_type={shown(kind)}; expected one of {', '.join(FORMS)}"
        )
    # Since version 5 of Transformers the positions have a section of their own.
    rope = stated.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        stated["rope_scaling"] = rope
    stated |= {key: rope[key] for key in rope.keys() & {"rope_theta"}}
    for name, allowed in form.fixed.items():
        if stated.get(name, allowed[0]) not in allowed:
            raise FolderError(
                f"{path}: {name}={shown(stated[name])}; expected "
                f"{' or '.join(map(repr, allowed))}: a network with another one would "
                "be computed wrongly"
            )
    sizes = {name: stated[name] for name in fields_of(form.config) if name in stated}
    try:
        return form, form.config(**sizes)
    except ValueError as error:
        raise FolderError(f"{path}: {error}") from error


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    files = [folder / WEIGHTS]
    index = folder / INDEX
    try:
        if not files[0].is_file() and index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(places.values()))]
        found: dict[str, np.ndarray] = {}
        for file in files:
            found |= load_safetensors(file)[0]
    except FileNotFoundError as error:
        others = sorted(path.name for path in folder.glob("*.bin"))
        remedy = "save it with model.save_pretrained(folder), which writes safetensors"
        raise FolderError(
            f"{folder}: expected {WEIGHTS}, found "
            f"{', '.join(others) or 'no weights'}; {remedy}"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FolderError(
            f"{folder}: its weights cannot be read ({type(error).__name__}: {error}); "
            "fetch or save them again"
        ) from error
    return found


def _used(
    form: Form, config: Any, state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors that a network of the form has."""
    unused = form.unused
    if getattr(config, "tie_word_embeddings", False):
        unused += r"|(^|\.)lm_head\.weight$"
    return {k: a for k, a in state_dict.items() if not re.search(unused, k)}
