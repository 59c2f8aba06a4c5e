"""Make a small adapter whose tensors are listed by hand: 2 layers, hidden 6, FFN 10, r 2, q (8 outputs), gate and down, 3 experts."""

import torch
from torch import Tensor

from hecate.adapters.formats.linears import LinearsDescription
from hecate.adapters.mixlora.description import MixLoraDescription


def config_of(**changes: object) -> MixLoraDescription:
    values: dict = {
        "base_model_name_or_path": "models/tiny",
        "r": 2,
        "alpha": 4,
        "dropout": 0.05,
        "target_modules": ("q_proj", "gate_proj", "down_proj"),
        "num_layers": 2,
        "num_experts": 3,
        "top_k": 2,
        "act_fn": "silu",
    }
    return MixLoraDescription(**(values | changes))


def linear_config_of(**changes: object) -> LinearsDescription:
    """The description of an adapter of experts over linears."""
    values: dict = {
        "base_model_name_or_path": "models/tiny",
        "r": 2,
        "alpha": 4,
        "use_rslora": False,
        "target_modules": ("q_proj",),
        "experts_per_layer": (3, 3),
        "top_k": 2,
        "dropout": 0.1,
        "router_aux_loss_coef": 0.001,
    }
    return LinearsDescription(**(values | changes))


def tensors_of(experts_per_layer: tuple[int, ...] = (3, 3), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    tensors = {}
    for layer, experts in enumerate(experts_per_layer):
        prefix = f"mixlora.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"] = matrix(2, 6)
        tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"] = matrix(8, 2)
        tensors[f"{prefix}.mlp.moe_gate.weight"] = matrix(experts, 6)
        for expert in range(experts):
            tensors[f"{prefix}.mlp.gate_proj.experts.{expert}.lora_A.weight"] = matrix(2, 6)
            tensors[f"{prefix}.mlp.gate_proj.experts.{expert}.lora_B.weight"] = matrix(10, 2)
            tensors[f"{prefix}.mlp.down_proj.experts.{expert}.lora_A.weight"] = matrix(2, 10)
            tensors[f"{prefix}.mlp.down_proj.experts.{expert}.lora_B.weight"] = matrix(6, 2)
    return tensors
