"""What transformers makes of a GGUF file is the same when the file is read once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, modeling_gguf_pytorch_utils

from hecate.errors import UserError
from hecate.model.base import check_base
from hecate.model.files.gguf_files import one_gguf_reader
from hecate.model.files.load import load_model, read_config, resolve_model
from hecate.parallel.values.expert_kinds import MIXLORA

gguf = pytest.importorskip("gguf")

HIDDEN, FFN, VOCABULARY = 8, 24, 6


def write_llama(path: Path) -> None:
    """A Llama of two layers with random weights."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (("block_count", 2), ("embedding_length", HIDDEN), ("feed_forward_length", FFN), ("context_length", 64)):
        writer.add_uint32(f"llama.{name}", value)
    for name, value in (("attention.head_count", 2), ("attention.head_count_kv", 2), ("rope.dimension_count", HIDDEN // 2)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "défg", "h", "i", "j"])
    numbers = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, FFN), **{f"blk.{layer}.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(path: Path) -> Any:
    model = load_model(resolve_model(str(path)), torch.float64, torch.device("cpu"))
    assert isinstance(model, LlamaForCausalLM)
    return model


def test_configuration_and_weights_are_those_of_transformers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "tiny.gguf")
    alone = loaded(tmp_path / "tiny.gguf")
    assert "GGUF" in capsys.readouterr().err, "this test sees no bar, whoever prints one"
    with one_gguf_reader("tiny.gguf"):
        once = loaded(tmp_path / "tiny.gguf")
    assert capsys.readouterr().err == ""
    assert once.config.to_dict() == alone.config.to_dict()
    assert alone.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in alone.state_dict().items())
    assert alone.model.layers[1].mlp.up_proj.weight.abs().sum() > 0


def test_the_header_is_parsed_once_and_a_caller_may_change_what_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "tiny.gguf")
    opened = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    with one_gguf_reader("tiny.gguf"):
        first = modeling_gguf_pytorch_utils.load_gguf_checkpoint(str(tmp_path / "tiny.gguf"))
        first["config"].clear()
        assert read_config(source).hidden_size == HIDDEN
        loaded(tmp_path / "tiny.gguf")
    assert len(opened) == 1


def test_transformers_is_as_it_was_after_the_block() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.load_gguf_checkpoint
    with one_gguf_reader("tiny.gguf"):
        assert gguf.GGUFReader is not before[0]
    assert before == (gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.load_gguf_checkpoint)


def test_a_model_of_another_form_does_not_import_the_reader() -> None:
    """Importing it takes a quarter of a second of each start."""
    program = "import sys; from hecate.model.files.gguf_files import one_gguf_reader as r\nwith r(None): assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(("name", "known"), [("llama", True), ("rwkv7", False), ("gpt-oss", True), ("qwen3moe", True), ("x" * 2000, False)])
def test_a_file_of_an_unknown_architecture_is_refused_by_its_first_entry(tmp_path: Path, name: str, known: bool) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    if known:
        check_base(str(tmp_path / "a.gguf"), None, MIXLORA)
    else:
        with pytest.raises(UserError, match=rf"its architecture is '{name[:80]}', which transformers cannot read"):
            check_base(str(tmp_path / "a.gguf"), None, MIXLORA)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60])
def test_a_file_that_begins_otherwise_is_left_to_its_reader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    check_base(str(tmp_path / "a.gguf"), None, MIXLORA)
