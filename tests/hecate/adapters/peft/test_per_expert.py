"""Adapters with one pair for each expert: written as servers read them, and read whoever has written them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.format_table import read_adapter
from hecate.adapters.formats.per_expert import servers_for
from hecate.adapters.peft.description import expert_names, experts_paths
from hecate.adapters.peft.per_expert import scaled
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    LIMIT,
    RANK,
    damaged,
    export,
    hecate_logits,
    logits_of,
    save_moe,
    save_peft,
)

FILE = "adapter_model.safetensors"
NAMES = {
    "qwen3_moe": ("model.layers.1.mlp.experts.4.gate_proj.", "model.layers.0.mlp.experts.0.down_proj."),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.4.w1.", "model.layers.0.block_sparse_moe.experts.0.w2."),
}


def test_granites_experts_keep_the_name_of_their_block(tmp_path: Path) -> None:
    model = save_moe("granitemoe", tmp_path / "model")
    parameters = [f"block_sparse_moe.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj"], target_parameters=parameters)
    out = export(adapter, "per-expert", tmp_path / "out")
    assert load_file(export(out, "peft", tmp_path / "back") / "adapter_model.safetensors").keys() == load_file(adapter / FILE).keys()
    torch.testing.assert_close(hecate_logits(out), wanted, **LIMIT)
    card = (out / "README.md").read_text()
    assert "No program has been seen to read such a folder over a model of the type granitemoe" in card
    assert "- not llama.cpp, whose converter looks for other names" in card
    assert "convert_lora_to_gguf" not in card


def test_a_scale_is_folded_in_without_rounding() -> None:
    b = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert scaled(b, 0.5).dtype == torch.bfloat16
    assert torch.equal(scaled(b, 1.5), 1.5 * b.float())
    assert scaled(b.double(), 1.5).dtype == torch.float64


@pytest.mark.parametrize("kind", NAMES)
def test_one_pair_for_each_expert_and_back(tmp_path: Path, kind: str) -> None:
    """Its names are the servers', each expert's product is the adapter's, it says who takes it, and it comes back bit for bit."""
    model = save_moe(kind, tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj"], lora_alpha=2 * RANK)  # a scale of 2 is folded exactly
    out = export(adapter, "per-expert", tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    value = json.loads((out / "adapter_config.json").read_text())
    assert (value["lora_alpha"], value["r"], value["modules_to_save"], value["use_rslora"]) == (RANK, RANK, None, False)
    assert len(tensors) == 2 * 2 * (3 * 5 + 1)
    for name in NAMES[kind]:
        assert {f"base_model.model.{name}lora_{matrix}.weight" for matrix in "AB"} <= tensors.keys()
        assert name.split(".")[-2] in value["target_modules"]
    gate = f"base_model.model.{NAMES[kind][0]}"
    up = gate.replace("gate_proj", "up_proj").replace("w1", "w3")
    flat = load_file(adapter / "adapter_model.safetensors")
    joined = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    a_ErD, b_OrE = flat[f"{joined}A.weight"].view(5, RANK, 16), flat[f"{joined}B.weight"].view(-1, RANK, 5)
    both = torch.cat([tensors[f"{part}lora_B.weight"] @ tensors[f"{part}lora_A.weight"] for part in (gate, up)])
    torch.testing.assert_close(both, 2.0 * b_OrE[:, :, 4] @ a_ErD[4])
    card = (out / "README.md").read_text()
    assert "vLLM" in card
    assert "No server has been run with one on a GPU" in card
    assert "llama.cpp's converter read such folders of tiny models as meant" in card
    assert ("SGLang 0.5.23" in card) == (kind != "mixtral")
    assert ("--lora-paths" in card) == (kind != "mixtral")
    torch.testing.assert_close(hecate_logits(out), wanted, **LIMIT)
    back = read_adapter(export(out, "peft", tmp_path / "back"))
    for name, tensor in flat.items():
        assert torch.equal(back.tensors[name], 2 * tensor if ".lora_B." in name else tensor), name
    path = "model.layers.1.mlp.experts"
    assert {name for pair in expert_names(path, ("gate_up_proj", "down_proj")).values() for name in pair} <= back.tensors.keys()
    assert experts_paths(back.tensors) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


def test_who_takes_the_adapter_depends_on_the_model() -> None:
    taken = {kind: " ".join(line.partition(":")[0] for line in servers_for(kind)) for kind in ("olmoe", "mixtral", "qwen3_vl_moe_text")}
    assert "SGLang" in taken["olmoe"]
    assert "SGLang" not in taken["mixtral"]
    assert taken["mixtral"].startswith("vLLM")
    assert taken["qwen3_vl_moe_text"].startswith("not vLLM")


@pytest.mark.parametrize("rslora", [False, True])
def test_gate_and_up_with_another_a_each_are_read(tmp_path: Path, rslora: bool) -> None:
    """As other trainers write them: their rank doubles. Beside the model with each expert's own weights changed."""
    model = save_moe("qwen3_moe", tmp_path / "model")
    adapter, _ = save_peft(tmp_path / "adapter", model, ["q_proj"])
    out = export(adapter, "per-expert", tmp_path / "out")
    file, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(one.shape, generator=random) / 3 if "up_proj.lora_A" in name else one for name, one in tensors.items()}
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": rslora}))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager").eval()
    scale = RANK**0.5 if rslora else 1.0

    def product(path: str) -> Tensor:
        return (
            scale * tensors[f"base_model.model.{path}.lora_B.weight"].double() @ tensors[f"base_model.model.{path}.lora_A.weight"].double()
        )

    with torch.no_grad():
        for number, layer in enumerate(plain.model.layers):
            layer.self_attn.q_proj.weight += product(f"model.layers.{number}.self_attn.q_proj")
            for expert in range(5):
                prefix = f"model.layers.{number}.mlp.experts.{expert}"
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([product(f"{prefix}.gate_proj"), product(f"{prefix}.up_proj")])
                layer.mlp.experts.down_proj[expert] += product(f"{prefix}.down_proj")
    assert read_adapter(out).description.r == 2 * RANK  # type: ignore[union-attr]
    torch.testing.assert_close(hecate_logits(out), logits_of(plain), **LIMIT)


def test_an_expert_whose_pair_is_missing_is_named(tmp_path: Path) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("mixtral", tmp_path / "model"), [])
    out = export(adapter, "per-expert", tmp_path / "out")
    damaged(out, "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_B.weight", None)
    with pytest.raises(UserError, match=r"has no tensor base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_B.weight"):
        read_adapter(out)


def test_projections_without_a_pair_are_zeros(tmp_path: Path) -> None:
    """Servers want all three of an expert."""
    model = save_moe("olmoe", tmp_path / "model")
    for parameter in ("gate_up_proj", "down_proj"):
        given = {"target_parameters": [f"mlp.experts.{parameter}"]}
        adapter, wanted = save_peft(tmp_path / parameter, model, [], **given)
        out = export(adapter, "per-expert", tmp_path / f"out-{parameter}")
        assert len(load_file(out / "adapter_model.safetensors")) == 2 * 5 * 3 * 2
        torch.testing.assert_close(hecate_logits(out), wanted, **LIMIT)
