"""The plain formula of the MixLoRA feed-forward. The faster versions are tested against it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_stream
from hecate.kernels.common.ffn import FfnBase, activation
from hecate.kernels.common.low_rank import LowRankPairs, row_factors


def mixlora_ffn_reference(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs], *, dropout: Dropout | None = None) -> Tensor:
    """As `mixlora_ffn`: y = sum_k w_k (W2 h_k + s B2 A2 h_k), h_k = act(W1 x + s B1 A1 x) · (W3 x + s B3 A3 x)."""

    def linear(name: str, weight: Tensor, inputs: Tensor, tokens: Tensor, slot: int) -> Tensor:
        out = F.linear(inputs, weight)
        if name in pairs:
            of = pairs[name]
            if dropout is not None:
                assert routed.token_T is not None
                assert routed.expert_S is not None
                stream = dropout_stream(int(routed.expert_S[slot]), name)
                inputs = inputs * dropout.mask(routed.token_T[tokens], stream, inputs.shape[1], inputs.dtype)
            out = out + of.scale * low_rank_product(inputs, of.a_SrI[slot].to(inputs.dtype), of.b_SOr[slot].to(inputs.dtype), of.eta)
        return out

    num_slots = next(iter(pairs.values())).a_SrI.shape[0]
    y_TD = routed.x_TD.new_zeros(routed.x_TD.shape)
    for slot in range(num_slots):
        tokens, k = (routed.slot_TK == slot).nonzero(as_tuple=True)
        x = routed.x_TD[tokens]
        gate = linear("gate_proj", base.gate_FD, x, tokens, slot)
        up = linear("up_proj", base.up_FD, x, tokens, slot)
        y = linear("down_proj", base.down_DF, activation(base.activation, gate) * up, tokens, slot)
        y_TD = y_TD.index_add(0, tokens, routed.weight_TK[tokens, k].to(y.dtype)[:, None] * y)
    return y_TD


def low_rank_product(x: Tensor, a_rI: Tensor, b_Or: Tensor, eta: float | None) -> Tensor:
    """Return B A x. With `eta`, what reaches A and B of an output row's gradient is multiplied by its factor, and what reaches x is not."""
    if eta is None:
        return F.linear(F.linear(x, a_rI), b_Or)
    for_x = F.linear(F.linear(x, a_rI.detach()), b_Or.detach())
    for_pair = F.linear(F.linear(x.detach(), a_rI), b_Or)
    factor_O = row_factors(a_rI.detach(), b_Or.detach(), eta)
    if for_pair.requires_grad:
        for_pair.register_hook(lambda gradient: gradient * factor_O)
    return for_x + (for_pair - for_pair.detach())
