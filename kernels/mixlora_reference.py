"""The MixLoRA feed-forward, written as its formula. What the fast version is held to."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.activation import activation
from hecate.kernels.dropout import Dropout
from hecate.kernels.mixlora_inputs import FfnBase, Lora, dropout_stream


def mixlora_ffn_reference(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    base: FfnBase,
    loras: dict[str, Lora],
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    expert_S: Tensor | None = None,
) -> Tensor:
    """As `mixlora_ffn`: y = sum_k w_k (W2 h_k + s B2 A2 h_k), h_k = act(W1 x + s B1 A1 x) · (W3 x + s B3 A3 x)."""

    def linear(name: str, weight: Tensor, inputs: Tensor, tokens: Tensor, slot: int) -> Tensor:
        out = F.linear(inputs, weight)
        if name in loras:
            lora = loras[name]
            if dropout is not None:
                assert token_T is not None
                assert expert_S is not None
                stream = dropout_stream(int(expert_S[slot]), name)
                inputs = inputs * dropout.mask(token_T[tokens], stream, inputs.shape[1], inputs.dtype)
            a, b = lora.a_SrI[slot].to(inputs.dtype), lora.b_SOr[slot].to(inputs.dtype)
            out = out + lora.scale * F.linear(F.linear(inputs, a), b)
        return out

    num_slots = next(iter(loras.values())).a_SrI.shape[0]
    y_TD = x_TD.new_zeros(x_TD.shape)
    for slot in range(num_slots):
        tokens, choice = (slot_TK == slot).nonzero(as_tuple=True)
        x = x_TD[tokens]
        gate = linear("gate_proj", base.gate_FD, x, tokens, slot)
        up = linear("up_proj", base.up_FD, x, tokens, slot)
        y = linear("down_proj", base.down_DF, activation(base.activation, gate) * up, tokens, slot)
        y_TD = y_TD.index_add(0, tokens, weight_TK[tokens, choice].to(y.dtype)[:, None] * y)
    return y_TD
