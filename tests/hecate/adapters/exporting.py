"""Tiny models in folders, adapters of random numbers for them, and the logits that hecate, transformers and PEFT compute with both.

All is in float64, where only mistakes are larger than rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.export import write_form
from hecate.adapters.folder import save_adapter
from hecate.adapters.format_table import read_adapter
from hecate.adapters.mixlora.description import MixLoraDescription, expected_shapes
from hecate.apps.answers.opened import load_trained
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.model.tiny import SIZES, tiny
from tests.plain_moe_lora import peft_model, save_tiny

LIMIT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.arange(40, 70)[None]
RANK, EXPERTS = 4, 3
_EXPERTS = 5
"""of the MoE models"""
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_VOCABULARY: dict[str, Any] = {"vocab_size": 258, "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}


def save_dense(kind: str, folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    tiny(kind, dtype, **{**_VOCABULARY, **changes}).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def save_moe(kind: str, folder: Path) -> Path:
    save_tiny(kind, folder, torch.float64, max_position_embeddings=128, **_VOCABULARY)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def mixlora_description(model: Path, **changes: Any) -> MixLoraDescription:
    values: dict[str, Any] = {
        "base_model_name_or_path": str(model),
        "r": RANK,
        "alpha": 6,
        "dropout": 0.1,
        "target_modules": ALL,
        "num_layers": SIZES["num_hidden_layers"],
        "num_experts": EXPERTS,
        "top_k": 2,
        "act_fn": "silu",
    }
    return MixLoraDescription(**(values | changes))


def mixlora_tensors(config: MixLoraDescription) -> dict[str, Tensor]:
    hidden, width = SIZES["hidden_size"], SIZES["head_dim"]
    random = torch.Generator().manual_seed(3)
    inner = {"q_proj": SIZES["num_attention_heads"] * width, "o_proj": SIZES["num_attention_heads"] * width}

    def size(wanted: int | str) -> int:
        if isinstance(wanted, int):
            return wanted
        if wanted == "hidden":
            return hidden
        return (
            SIZES["intermediate_size"] if wanted.startswith("ffn") else inner.get(wanted.split()[0], SIZES["num_key_value_heads"] * width)
        )

    return {name: 0.4 * torch.randn([size(one) for one in shape], generator=random) for name, shape in expected_shapes(config)}


def save_mixlora(folder: Path, model: Path, **changes: Any) -> Path:
    config = mixlora_description(model, **changes)
    save_adapter(folder, mixlora_tensors(config), config)
    return folder


def save_peft(folder: Path, model: Path, modules: list[str], *, experts: bool = True, **changes: Any) -> tuple[Path, Tensor]:
    """An adapter as PEFT writes it, and the logits that PEFT computes with it."""
    from peft import LoraConfig, get_peft_model

    if experts and not changes:
        adapted = peft_model(model, RANK, 6, modules, torch.float64)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
        given = {"r": RANK, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": modules, "target_parameters": parameters, **changes}
        adapted = get_peft_model(base, LoraConfig(**given)).eval()
    random = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    adapted.save_pretrained(folder)
    return folder, logits_of(adapted)


def save_stacked(folder: Path, adapter: Path, *, first: bool) -> Path:
    """PEFT's adapter with its tensors in three axes; `first`: experts are the first axis of B."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        for old, part in (("base_layer.", "gate_up_proj."), ("", "down_proj.")):
            a, b = tensors.pop(f"{path}.{old}lora_A.weight"), tensors.pop(f"{path}.{old}lora_B.weight")
            b_OrE = b.view(len(b), RANK, _EXPERTS)
            tensors[f"{path}.{part}lora_A.weight"] = a.view(_EXPERTS, RANK, -1).contiguous()
            tensors[f"{path}.{part}lora_B.weight"] = (b_OrE.permute(2, 0, 1) if first else b_OrE).contiguous()
    value = json.loads((adapter / "adapter_config.json").read_text())
    value |= {"target_parameters": None, "target_modules": ["q_proj", "gate_up_proj", "down_proj"]}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(value))
    return folder


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def hecate_logits(folder: Path) -> Tensor:
    """Of whatever lies in the folder."""
    with join_ranks() as ranks:
        base, moe = load_trained(folder, ranks, BaseChoice(dtype="float64", kernels="torch"))
        with moe.engine.evaluation(), torch.no_grad():
            return base.head.logits(base.head.hidden(IDS, None, torch.arange(IDS.shape[1])[None]))


def transformers_logits(folder: Path) -> Tensor:
    """Of a whole model, whose tensors are just those that transformers looks for."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    model.set_experts_implementation("eager")  # the others compute no float64
    return logits_of(model.eval())


def export(source: Path, form: str, out: Path) -> Path:
    write_form(form, read_adapter(source), out)
    return out


def with_router(adapter: Path, layers: int = 2, router: str = "mlp.gate") -> None:
    """Let an adapter have trained routers, too."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    routers = {f"base_model.model.model.layers.{n}.{router}.weight": torch.randn(5, 16) for n in range(layers)}
    save_file({**load_file(file), **routers}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": [router]}))


def damaged(adapter: Path, name: str, tensor: Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {key: one for key, one in load_file(file).items() if key != name}
    save_file(tensors if tensor is None else {**tensors, name: tensor}, file)
