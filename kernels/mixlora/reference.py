"""The plain formula of the MixLoRA feed-forward. The faster versions are tested against it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_stream
from hecate.kernels.common.ffn import FfnBase, activation
from hecate.kernels.common.low_rank import LowRankPairs


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
            out = out + of.scale * low_rank_product(inputs, of.of_slot(slot, inputs.dtype))
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


def low_rank_product(x: Tensor, pair: LowRankPairs) -> Tensor:
    """Return B A x of a single pair, without its scale. A's gradient comes of what stands for B in it, if there is such a matrix."""
    a_rI, b_Or, b_for_a_Or = pair.matrices
    if b_for_a_Or is None:
        return F.linear(F.linear(x, a_rI), b_Or)
    for_a = F.linear(F.linear(x.detach(), a_rI), b_for_a_Or)
    return F.linear(F.linear(x, a_rI.detach()), b_Or) + (for_a - for_a.detach())
