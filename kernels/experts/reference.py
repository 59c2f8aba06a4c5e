"""The plain formula of the feed-forward of experts that have their own weights. The faster versions are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_stream
from hecate.kernels.common.ffn import FfnBase, FfnShape, activation
from hecate.kernels.common.low_rank import LowRankPairs, separate_gate_and_up
from hecate.kernels.mixlora.reference import low_rank_product, mixlora_ffn_reference


def full_ffn_reference(routed: RoutedTokens, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """As `full_ffn`: y = sum_k w_k W2 (act(W1 x) · W3 x), the matrices being those of the assignment's expert."""
    y_TD = routed.x_TD.new_zeros(routed.x_TD.shape)
    for slot, flat in enumerate(experts_SC):
        tokens, k = (routed.slot_TK == slot).nonzero(as_tuple=True)
        gate_up, down = shape.matrices(flat.to(routed.x_TD.dtype))
        gate, up = F.linear(routed.x_TD[tokens], gate_up).chunk(2, dim=1)
        y = F.linear(activation(shape.activation, gate) * up, down)
        y_TD = y_TD.index_add(0, tokens, routed.weight_TK[tokens, k].to(y.dtype)[:, None] * y)
    return y_TD


def moe_lora_ffn_reference(
    routed: RoutedTokens,
    frozen_S: Sequence[Tensor],
    pairs: dict[str, LowRankPairs],
    shape: FfnShape,
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """As `moe_lora_ffn`: each slot a MixLoRA expert over a base of its own."""
    pairs = separate_gate_and_up(pairs)
    y_TD = routed.x_TD.new_zeros(routed.x_TD.shape)
    for slot, flat in enumerate(frozen_S):
        gate_up, down = shape.matrices(flat)
        gate, up = gate_up.chunk(2)
        only = replace(routed, slot_TK=routed.slot_TK.where(routed.slot_TK == slot, -1), served=None)
        y_TD = y_TD + mixlora_ffn_reference(only, FfnBase(gate, up, down, shape.activation), pairs, dropout=dropout)
    return y_TD


def routed_pairs_reference(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """As `routed_pairs`: y = sum_k w_k s B A dropout(x), the pair being that of the assignment's expert."""
    y_TO = routed.x_TD.new_zeros((len(routed.x_TD), pairs.b_SOr.shape[1]))
    for slot in range(len(pairs.a_SrI)):
        tokens, k = (routed.slot_TK == slot).nonzero(as_tuple=True)
        x = routed.x_TD[tokens]
        if dropout is not None:
            assert routed.token_T is not None
            stream = dropout_stream(int(routed.experts_in_slots[slot]), "linear")
            x = x * dropout.mask(routed.token_T[tokens], stream, x.shape[1], x.dtype)
        y = pairs.scale * low_rank_product(x, pairs.of_slot(slot, x.dtype))
        y_TO = y_TO.index_add(0, tokens, routed.weight_TK[tokens, k].to(y.dtype)[:, None] * y)
    return y_TO


def mixed_factors_reference(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """As `mixed_factors`: a pair A, B of its own for each token."""
    x, weight_TS = routed.x_TD, routed.weight_TK.to(routed.x_TD.dtype)
    if dropout is not None:
        assert routed.token_T is not None
        x = x * dropout.mask(routed.token_T, dropout_stream(0, "linear"), x.shape[1], x.dtype)
    a_TrI = torch.einsum("ts,sri->tri", weight_TS, pairs.a_SrI.to(x.dtype))
    b_TOr = torch.einsum("ts,sor->tor", weight_TS, pairs.b_SOr.to(x.dtype))
    return pairs.scale * (b_TOr @ (a_TrI @ x[..., None])).squeeze(-1)
