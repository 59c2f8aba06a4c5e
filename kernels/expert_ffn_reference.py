"""The feed-forward of experts with weights of their own, written as its formula. What the fast version is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.activation import activation
from hecate.kernels.dropout import Dropout
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.mixlora_inputs import FfnBase, Lora, separate_gate_and_up
from hecate.kernels.mixlora_reference import mixlora_ffn_reference


def full_ffn_reference(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """As `full_ffn`: y = sum_k w_k W2 (act(W1 x) · W3 x), the matrices being those of the choice's expert."""
    y_TD = x_TD.new_zeros(x_TD.shape)
    for slot, flat in enumerate(experts_SC):
        tokens, choice = (slot_TK == slot).nonzero(as_tuple=True)
        gate_up, down = shape.matrices(flat.to(x_TD.dtype))
        gate, up = F.linear(x_TD[tokens], gate_up).chunk(2, dim=1)
        y = F.linear(activation(shape.activation, gate) * up, down)
        y_TD = y_TD.index_add(0, tokens, weight_TK[tokens, choice].to(y.dtype)[:, None] * y)
    return y_TD


def moe_lora_ffn_reference(
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
    """As `moe_lora_ffn`: each slot a MixLoRA expert over a base of its own."""
    loras = separate_gate_and_up(loras)
    y_TD = x_TD.new_zeros(x_TD.shape)
    for slot, flat in enumerate(frozen_S):
        gate_up, down = shape.matrices(flat)
        gate, up = gate_up.chunk(2)
        base = FfnBase(gate, up, down, shape.activation)
        only_TK = slot_TK.where(slot_TK == slot, -1)
        y_TD = y_TD + mixlora_ffn_reference(x_TD, only_TK, weight_TK, base, loras, dropout=dropout, token_T=token_T, expert_S=expert_S)
    return y_TD
