import json
import runpy
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from llama_folders import SIZES, SMOLLM2, llama_folder, needs_smollm2

from woodfisher_jax.models.bert import Bert, BertConfig
from woodfisher_jax.weights import hugging_face
from woodfisher_jax.weights.files import load_safetensors, save_safetensors
from woodfisher_jax.weights.hugging_face import FolderError, read_folder, write_folder
from woodfisher_jax.weights.state_dicts import StateDictMismatchError, to_state_dict

UP = "model.layers.0.mlp.up_proj.weight"


def test_a_folder_comes_back_bit_by_bit(tmp_path):
    def change(tensors):
        tensors[UP] = tensors[UP].astype(ml_dtypes.bfloat16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    tensors = llama_folder(tmp_path / "a", change, rope_parameters={"rope_theta": 7.0})
    (tmp_path / "a" / "1_Pooling").mkdir()
    (tmp_path / "a" / "1_Pooling" / "config.json").write_text("{}")
    module, params = read_folder(tmp_path / "a")
    assert module.config.rope_theta == 7.0
    kernel = params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors[UP].T.astype(np.float32))
    write_folder(tmp_path / "b", params, tmp_path / "a")
    written, metadata = load_safetensors(tmp_path / "b" / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert {k: (a.dtype, a.tobytes()) for k, a in written.items()} == {
        k: (a.dtype, a.tobytes()) for k, a in tensors.items()
    }
    names = ["1_Pooling", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names


def test_shards_and_a_tied_head_are_read(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    tensors = llama_folder(tmp_path, change, tie_word_embeddings=True)
    (tmp_path / "model.safetensors").unlink()
    places = {k: f"{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for shard in set(places.values()):
        part = {k: a for k, a in tensors.items() if places[k] == shard}
        save_safetensors(tmp_path / shard, part, {})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    _, params = read_folder(tmp_path)
    params["model"]["embed_tokens"]["embedding"] = np.ones((11, 8), np.float32)
    write_folder(tmp_path / "out", params, tmp_path)
    written, _ = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert (written["lm_head.weight"] == 1).all()
    assert not (tmp_path / "out" / index.name).exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; expected one of llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; expected 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling=.* expected None"),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads=3; expected a"),
    ],
)
def test_a_network_of_another_form(tmp_path, stated, message):
    llama_folder(tmp_path, **stated)
    with pytest.raises(FolderError, match=message):
        read_folder(tmp_path)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.extra.weight"] = np.ones(3, np.float32)
        tensors[UP] = tensors[UP][:5]

    llama_folder(tmp_path, change)
    with pytest.raises(StateDictMismatchError) as caught:
        read_folder(tmp_path)
    for part in (
        "missing (1): model.norm.weight",
        "unexpected (1): model.layers.7.extra.weight",
        f"of another shape (1): {UP} (state dict (5, 8), model (12, 8))",
    ):
        assert part in str(caught.value)


def test_folders_without_weights(tmp_path):
    with pytest.raises(FolderError, match=r"config.json is not there; expected a fold"):
        read_folder(tmp_path)
    llama_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FolderError, match=r"weights cannot be read .* save them again"):
        read_folder(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"expected model.safetensors, found pytorch"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(FolderError, match=r"config.json cannot be read"):
        read_folder(tmp_path)


def test_nothing_is_written_of_another_network(tmp_path):
    llama_folder(tmp_path / "a")
    _, params = read_folder(tmp_path / "a")
    with pytest.raises(FolderError, match="expected another folder"):
        write_folder(tmp_path / "a", params, tmp_path / "a")
    del params["model"]["norm"]
    with pytest.raises(StateDictMismatchError, match=r"expected model.norm.weight of"):
        write_folder(tmp_path / "b", params, tmp_path / "a")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_transformers_loads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokens = np.arange(40)[None] % 11
    for tied in (False, True):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        network = transformers.LlamaForCausalLM(config)
        network.save_pretrained(tmp_path / "a")
        module, params = read_folder(tmp_path / "a")
        params = jax.tree.map(lambda leaf: leaf * 1.1, params)
        write_folder(tmp_path / "b", params, tmp_path / "a")
        loaded, found = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "b", output_loading_info=True
        )
        assert not any(found.values())
        with torch.no_grad():
            expected = loaded(torch.tensor(tokens)).logits.numpy()
        logits = module.apply({"params": params}, tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4 * abs(expected).max())


@pytest.mark.slow
@needs_smollm2
def test_a_published_network_continues_a_sentence(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(SMOLLM2)
    module, params = hugging_face.read_folder(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = np.array([tokenizer.encode("The capital of France is").ids])
    logits = module.apply({"params": params}, tokens)
    assert tokenizer.decode([int(logits[0, -1].argmax())]).strip() == "Paris"
    write_folder(tmp_path, params, folder)
    old, new = (
        load_safetensors(f / "model.safetensors")[0] for f in (folder, tmp_path)
    )
    assert all((new[key] == old[key]).all() for key in old.keys() | new.keys())


BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
}


def test_an_encoder_under_a_head_is_read_without_it(tmp_path):
    shapes = jax.eval_shape(
        Bert(BertConfig(**BERT)).init, jax.random.key(0), np.zeros((1, 2), np.int32)
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)
    tensors = {f"bert.{k}": np.float32(a) for k, a in to_state_dict(variables).items()}
    tensors["bert.embeddings.position_ids"] = np.arange(40)
    tensors["bert.pooler.dense.weight"] = np.ones((8, 8), np.float32)
    tensors["cls.predictions.bias"] = np.ones(11, np.float32)
    source = tmp_path / "a"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "bert", **BERT}))
    save_safetensors(source / "model.safetensors", tensors, {})
    _, params = read_folder(source)
    kernel = params["encoder"]["layer_0"]["attention"]["self"]["query"]["kernel"]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    np.testing.assert_array_equal(kernel, tensors[name].T)
    write_folder(tmp_path / "b", params, source)
    written, _ = load_safetensors(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all((written[key] == tensors[key]).all() for key in tensors)


@pytest.mark.slow
def test_transformers_loads_an_encoder_that_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokens, mask = np.arange(40)[None] % 11, np.arange(40)[None] < 30
    network = transformers.BertModel(transformers.BertConfig(**BERT))
    network.save_pretrained(tmp_path / "a")
    module, params = read_folder(tmp_path / "a")
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    write_folder(tmp_path / "b", params, tmp_path / "a")
    loaded, found = transformers.BertModel.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(found.values())
    with torch.no_grad():
        expected = loaded.eval()(torch.tensor(tokens), torch.tensor(mask))
    expected = expected.last_hidden_state.numpy()[mask]
    hidden = module.apply({"params": params}, tokens, mask)[mask]
    np.testing.assert_allclose(hidden, expected, atol=1e-4 * abs(expected).max())


def without_half(block):
    """A block without its second group of heads, queries 2 and 3, and some neurons."""
    outputs = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "gate_proj": 5, "up_proj": 5}
    inputs = {"o_proj": 4, "down_proj": 5}
    small = {
        part: {
            name: {"kernel": layer["kernel"][: inputs.get(name), : outputs.get(name)]}
            for name, layer in block[part].items()
        }
        for part in ("self_attn", "mlp")
    }
    return {**block, **small}


def test_a_network_with_smaller_blocks_is_written_and_read(tmp_path):
    two = {"num_hidden_layers": 2}
    llama_folder(tmp_path / "dense", **two)
    _, params = read_folder(tmp_path / "dense")
    blocks = {
        name: without_half(block) if name == "layers_1" else block
        for name, block in params["model"].items()
    }
    given = {**params, "model": blocks}
    write_folder(tmp_path / "small", given, tmp_path / "dense")
    found, back = read_folder(tmp_path / "small")
    assert found.widths["model/layers_1/self_attn/k_proj"] == 2
    assert found.widths["model/layers_1/mlp/gate_proj"] == 5
    jax.tree.map(np.testing.assert_array_equal, back, given)
    code = (tmp_path / "small" / "network.py").read_text()
    assert 'load(path="model.safetensors")' in code
    # It is the source of another, pruned further.
    write_folder(tmp_path / "again", back, tmp_path / "small")
    jax.tree.map(
        np.testing.assert_array_equal, read_folder(tmp_path / "again")[1], back
    )

    # Where all blocks are as small, they are what the config says.
    blocks["layers_0"] = without_half(blocks["layers_0"])
    write_folder(tmp_path / "even", given, tmp_path / "dense")
    found, back = read_folder(tmp_path / "even")
    assert not found.widths
    assert found.config.num_attention_heads == 2
    assert (found.config.head_width, found.config.intermediate_size) == (2, 5)
    jax.tree.map(np.testing.assert_array_equal, back, given)
    assert not (tmp_path / "even" / "network.py").exists()

    blocks["layers_0"]["mlp"]["down_proj"] = {"kernel": np.ones((4, 8), np.float32)}
    with pytest.raises(StateDictMismatchError, match=r"down_proj/kernel: got \(4, 8\)"):
        write_folder(tmp_path / "wrong", given, tmp_path / "dense")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_pytorch_loads_smaller_blocks(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    tokens = torch.arange(40)[None] % 11
    llama_folder(tmp_path / "dense", num_hidden_layers=2)
    _, params = read_folder(tmp_path / "dense")
    for which in (("layers_0", "layers_1"), ("layers_1",)):
        blocks = {
            name: without_half(block) if name in which else block
            for name, block in params["model"].items()
        }
        given = {**params, "model": blocks}
        folder = tmp_path / which[0]
        write_folder(folder, given, tmp_path / "dense")
        module, back = read_folder(folder)
        with torch.no_grad():
            if len(which) == 2:
                network = transformers.LlamaForCausalLM.from_pretrained(folder)
                expected = network(tokens).logits.numpy()
            else:
                load = runpy.run_path(str(folder / "network.py"))["load"]
                expected = load(folder / "model.safetensors")(tokens).numpy()
        logits = module.apply({"params": back}, tokens.numpy())
        np.testing.assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
