"""Run axolotl's scattermoe_lora (axolotl 0.19.0), fused Triton kernels of expert GEMM and LoRA, on the inputs of `benchmarks.kernels`.

Each expert has a copy of a shared base, made beforehand. Gate and up are one product, as in its own layers; their LoRA pairs are one pair
of twice the rank whose B is block-diagonal, which is the same formula. It needs a GPU.

Its kernels are tuned on their first call, over about a hundred configurations each, compiled one after another, which takes too long for a
benchmark of ten minutes. Only configurations with three stages and no block below 64 are kept, about eight for each kernel, because large
tiles are fastest for large inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import LORA_SCALE, Inputs, Layer
from benchmarks.kernel_providers import frozen_experts
from benchmarks.peers.wheels import pass_over_init, unpack

PACKAGE = "axolotl"
_LIBRARY = "axolotl.integrations.kernels.libs.scattermoe_lora"


def make(inputs: Inputs, folder: Path) -> Layer:
    """Return its layer, from the wheel unpacked into `folder`. Raises ImportError, UserError."""
    parents = ("axolotl", "axolotl.integrations", "axolotl.integrations.kernels", "axolotl.integrations.kernels.libs")
    pass_over_init(*parents, under=unpack(PACKAGE, folder))
    library = importlib.import_module(_LIBRARY)
    for module in ("lora_ops", "ops"):
        for kernel in vars(importlib.import_module(f"{_LIBRARY}.kernels.{module}")).values():
            if hasattr(kernel, "configs"):
                kernel.configs = [config for config in kernel.configs if _is_large(config)] or kernel.configs
    shape = inputs.shape
    gate_up_EDF, down_EFD = frozen_experts(inputs)
    leaves = {"x": inputs.x_TD, "weight": inputs.weight_TK, **_pairs(inputs)}

    def forward() -> Tensor:
        sorted_expert, sorted_pair, ends_E = library.flatten_sort_count(inputs.slot_TK, num_experts=shape.experts)
        sorting = (sorted_expert, sorted_pair, ends_E)
        gate, up = library.parallel_linear_lora(
            inputs.x_TD, gate_up_EDF, shape.k, *sorting, leaves["in.A"], leaves["in.B"], LORA_SCALE, grouped_out=True
        ).chunk(2, dim=-1)
        return library.parallel_linear_lora(
            F.silu(gate) * up,
            down_EFD,
            1,
            *sorting,
            leaves["down.A"],
            leaves["down.B"],
            LORA_SCALE,
            gates=inputs.weight_TK.to(inputs.x_TD.dtype),
            grouped_in=True,
        )

    def gradients(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        experts, rank = shape.experts, shape.rank
        a_in = found["in.A"].view(experts, 2, rank, shape.hidden)
        b_in = found["in.B"].view(2, shape.ffn, experts, 2, rank).permute(2, 0, 3, 1, 4)
        return {
            "x": found["x"],
            "weight": found["weight"],
            "gate_proj.A": a_in[:, 0],
            "up_proj.A": a_in[:, 1],
            "down_proj.A": found["down.A"].view(experts, rank, shape.ffn),
            "gate_proj.B": b_in[:, 0, 0],
            "up_proj.B": b_in[:, 1, 1],
            "down_proj.B": found["down.B"].view(shape.hidden, experts, rank).transpose(0, 1),
        }

    return Layer(forward, leaves, gradients)


def _pairs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the LoRA pairs in its layout: A [E·R, inputs] and B [outputs, E·R]."""
    shape = inputs.shape
    a = {name: lora.a_SrI.detach() for name, lora in inputs.loras.items()}
    b = {name: lora.b_SOr.detach() for name, lora in inputs.loras.items()}
    b_in = torch.zeros(2, shape.ffn, shape.experts, 2, shape.rank, dtype=inputs.x_TD.dtype, device=inputs.x_TD.device)
    b_in[0, :, :, 0], b_in[1, :, :, 1] = b["gate_proj"].transpose(0, 1), b["up_proj"].transpose(0, 1)
    pairs = {
        "in.A": torch.cat([a["gate_proj"], a["up_proj"]], dim=1).flatten(0, 1),
        "in.B": b_in.view(2 * shape.ffn, -1),
        "down.A": a["down_proj"].flatten(0, 1),
        "down.B": b["down_proj"].transpose(0, 1).reshape(shape.hidden, -1),
    }
    return {name: tensor.contiguous().requires_grad_() for name, tensor in pairs.items()}


def _is_large(config: Any) -> bool:
    blocks = [size for name, size in config.kwargs.items() if name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_DIM")]
    return config.num_stages == 3 and min(blocks, default=64) >= 64
