"""The base model of a run as it is loaded: what a run finds in it, and which kinds of experts it is no base for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hecate.errors import UserError
from hecate.model.base import build_base
from hecate.model.files.safetensors_headers import StoredTensor
from hecate.model.files.stored_experts import expert_layers
from hecate.parallel.values.expert_kinds import FULL, MIXLORA, MOE_LORA
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.model.tiny import tiny

CPU = torch.device("cpu")


def saved(folder: Path, model_type: str, **changes: Any) -> str:
    tiny(model_type, torch.float32, **changes).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_dense_model_is_found_with_its_ffns_and_without_dropout(tmp_path: Path) -> None:
    base = build_base(saved(tmp_path, "llama", attention_dropout=0.5), "float64", 2, CPU, MIXLORA)
    assert [(unit.unit.layer, unit.path, unit.shape.ffn) for unit in base.found] == [
        (0, "model.layers.0.mlp", 24),
        (1, "model.layers.1.mlp", 24),
    ]
    assert (base.vocab_size, len(base.tokenizer), base.own_experts) == (32, 258, ())
    assert not any(module.training for module in base.model.modules())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float64}


def test_an_moe_model_is_found_with_its_own_experts(tmp_path: Path) -> None:
    base = build_base(saved(tmp_path, "mixtral", num_local_experts=5), "float32", None, CPU, MOE_LORA)
    assert [(unit.block_path, unit.own_experts) for unit in base.found] == [(f"model.layers.{layer}.mlp", 5) for layer in range(3)]
    assert base.ffns == ()


@pytest.mark.parametrize(
    ("model_type", "kind", "words"),
    [
        ("llama", MOE_LORA, "LlamaForCausalLM has no experts, but moe.family is moe_lora"),
        ("mixtral", MIXLORA, "the model has experts already, but moe.family mixlora puts experts in the place of a dense FFN"),
        ("mixtral", FULL, "the model has experts already, but moe.family full puts experts in the place of a dense FFN"),
    ],
)
def test_experts_of_another_kind_are_refused(tmp_path: Path, model_type: str, kind: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_base(saved(tmp_path, model_type), "float32", None, CPU, kind)


def test_a_gguf_file_of_a_model_with_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors have names of their own. The one gated FFN of each layer is the expert that all tokens share."""
    (tmp_path / "model.gguf").touch()
    model = tiny("qwen2_moe", torch.float32, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    monkeypatch.setattr("hecate.model.base.load_model", lambda *_: model)
    monkeypatch.setattr("hecate.model.base.load_tokenizer", lambda _: build_byte_tokenizer())
    with pytest.raises(UserError, match=r"model\.gguf: the model has experts already"):
        build_base(str(tmp_path / "model.gguf"), "float32", None, CPU, MIXLORA)


def test_two_tensors_for_the_same_experts_are_refused(tmp_path: Path) -> None:
    """A second stack of layers, for the prediction of several tokens, has numbers from 0, too."""
    shapes = {"gate_up_proj": (2, 6, 4), "down_proj": (2, 4, 3)}
    names = {f"{stack}.layers.0.mlp.experts.{name}": shape for stack in ("model", "mtp") for name, shape in shapes.items()}
    entries = {name: StoredTensor(tmp_path / "m.safetensors", "F32", shape, 0) for name, shape in names.items()}
    first = {name: entry for name, entry in entries.items() if name.startswith("model.")}
    assert expert_layers(first, tmp_path)[0].num_experts == 2
    with pytest.raises(UserError, match=r"(?s)two tensors are gate_up_proj .* model\.layers\.0\..* and mtp\.layers\.0\..*multi-token"):
        expert_layers(entries, tmp_path)
