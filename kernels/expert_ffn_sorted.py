"""The feed-forward of experts that each have weights of their own, on grouped Triton kernels over pairs sorted by slot.

What `expert_ffn` computes, with the same signatures: here nothing waits for the device, and a layer is a dozen launches whatever the
number of experts. A layer keeps x, and of each pair the gate and up outputs and the shrunk x. Sums have one order, without atomics.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, C elements of an expert's chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hecate.kernels.dropout import Dropout
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.full_ops import full_experts
from hecate.kernels.mixlora_inputs import PROJECTIONS, Lora, dropout_rows, separate_gate_and_up
from hecate.kernels.moe_lora_ops import lora_experts


def full_ffn_sorted(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """As `expert_ffn.full_ffn`, in float32, bfloat16 or float16; differentiable once."""
    return full_experts(x_TD, slot_TK, weight_TK, experts_SC, shape.hidden, shape.ffn, shape.activation)[0]


def moe_lora_ffn_sorted(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    loras: dict[str, Lora],
    shape: FfnShape,
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    expert_S: Tensor | None = None,
) -> Tensor:
    """As `expert_ffn.moe_lora_ffn`, in float32, bfloat16 or float16; differentiable once."""
    assert len(loras) > 0, "frozen experts without adapters have nothing to train"
    loras = separate_gate_and_up(loras)
    words: dict[str, Tensor] = {}
    if dropout is not None and frozen_S:
        # A choice that is computed elsewhere takes the last slot's stream; its row is not used.
        words = dropout_rows(dropout, torch.arange(slot_TK.numel(), device=slot_TK.device), slot_TK, token_T, expert_S)
    grow = 1.0 if dropout is None else dropout.scale
    has = [name in loras for name in PROJECTIONS]
    pairs = [matrix for name in PROJECTIONS if name in loras for matrix in (loras[name].a_SrI, loras[name].b_SOr)]
    scales = [loras[name].scale * grow if name in loras else 0.0 for name in PROJECTIONS]
    return lora_experts(
        x_TD,
        slot_TK,
        weight_TK,
        pairs,
        list(frozen_S),
        words.get("in"),
        words.get("down"),
        *has,
        scales,
        0 if dropout is None else dropout.dropped_levels,
        shape.hidden,
        shape.ffn,
        shape.activation,
    )[0]
