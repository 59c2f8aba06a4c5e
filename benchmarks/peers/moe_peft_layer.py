"""Run MoE-PEFT's MixLoRA feed-forward (moe-peft 2.0.2) on the inputs of `benchmarks.kernels`.

Its own modules are used: `LlamaMLP` with `Lora` pairs, through `MixtralSparseMoe` and its efficient path. Only the linear layer of its
router is replaced by given logits, so that it selects the same experts and weights as all others. Pairs are float32, as in MoE-PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import LORA_SCALE, Inputs, Layer
from benchmarks.peers.wheels import pass_over_init, unpack

PACKAGE = "moe_peft"
NAMES = {"gate_proj": "w1_", "down_proj": "w2_", "up_proj": "w3_"}
_ADAPTER = "bench"


def make(inputs: Inputs, folder: Path) -> Layer:
    """Return its layer, from the wheel unpacked into `folder`. Raises ValueError for unsupported inputs, ImportError, UserError."""
    if inputs.base is None:
        raise ValueError("MoE-PEFT's MixLoRA has one base FFN under all experts")
    # This is read when its executors are imported.
    os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CUDA" if inputs.x_TD.is_cuda else "CPU"
    pass_over_init(PACKAGE, f"{PACKAGE}.models", under=unpack(PACKAGE, folder))
    from moe_peft.adapters.mixlora.config import MixLoraConfig  # type: ignore[import-not-found]
    from moe_peft.adapters.mixlora.model import MixtralSparseMoe  # type: ignore[import-not-found]
    from moe_peft.common import LLMModelInput  # type: ignore[import-not-found]
    from moe_peft.models.modeling_llama import LlamaConfig, LlamaMLP  # type: ignore[import-not-found]

    shape, device = inputs.shape, inputs.x_TD.device
    config = MixLoraConfig.from_config(
        {
            "name": _ADAPTER,
            "routing_strategy": "mixlora",
            "r": shape.rank,
            "lora_alpha": LORA_SCALE * shape.rank,
            # It refuses 0; this value drops nothing, at the same cost.
            "lora_dropout": 1e-9,
            "target_modules": list(NAMES),
            "num_experts": shape.experts,
            "top_k": shape.k,
            "act_fn": "silu",
        }
    )
    base = {"gate_proj": inputs.base.gate_FD, "up_proj": inputs.base.up_FD, "down_proj": inputs.base.down_DF}
    mlp = LlamaMLP(
        *(_linear(base[name]) for name in ("gate_proj", "down_proj", "up_proj")), LlamaConfig(device_=str(device), hidden_act_="silu")
    )
    leaves = {"x": inputs.x_TD}
    for expert in range(shape.experts):
        expert_config = config.expert_config(expert)
        for name, attribute in NAMES.items():
            linear, lora = getattr(mlp, attribute), inputs.loras[name]
            linear.init_lora_weight(expert_config, (lora.a_SrI[expert].detach(), lora.b_SOr[expert].detach()))
            pair = linear.loras_[expert_config.adapter_name]
            leaves[f"{name}.A.{expert}"], leaves[f"{name}.B.{expert}"] = pair.lora_a_.weight, pair.lora_b_.weight
    moe = MixtralSparseMoe(shape.hidden, device, config)
    moe.gate_ = _GivenLogits(inputs)
    arguments = LLMModelInput(efficient_operator_=True, inference_mode_=False)

    def forward() -> Tensor:
        return moe.forward(inputs.x_TD[None], mlp, arguments)[0][0]

    def gradients(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stacked = {
            f"{name}.{part}": torch.stack([found[f"{name}.{part}.{expert}"] for expert in range(shape.experts)])
            for name in NAMES
            for part in ("A", "B")
        }
        return {"x": found["x"], **stacked}

    return Layer(forward, leaves, gradients)


def _linear(weight_OI: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    return linear


class _GivenLogits(torch.nn.Module):
    """Logits whose softmax's largest, divided by their sum, are the inputs' weights."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        logits = torch.full((inputs.shape.tokens, inputs.shape.experts), -1e4, device=inputs.x_TD.device)
        self.logits_TE = logits.scatter_(1, inputs.slot_TK, inputs.weight_TK.detach().log()).requires_grad_()

    def forward(self, hidden_states: Any) -> Tensor:
        return self.logits_TE
