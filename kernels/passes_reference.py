"""The passes of the MixLoRA feed-forward in plain torch, one by one: what those of `hecate.kernels.passes` are held to.

Same functions and arguments. Rows of pairs that are computed elsewhere come out as zeros. Matrices and lows are taken in any types.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hecate.kernels.activation import activation as act
from hecate.kernels.dropout import Dropout
from hecate.kernels.mixlora_launches import Adapter, Keep
from hecate.kernels.pair_blocks import PairBlocks


def shrink(
    x: Tensor, blocks: PairBlocks, matrices: tuple[Tensor, ...], scales: tuple[float, ...], keep: Keep | None, *, gather: bool
) -> tuple[Tensor, ...]:
    x_PC = _dropped(x[blocks.order.token_P.long()] if gather else x, keep)
    return tuple(scale * _times(x_PC, matrix, blocks, "pc,pcr->pr") for matrix, scale in zip(matrices, scales, strict=True))


def expand(adapters: tuple[Adapter, ...], blocks: PairBlocks, keep: Keep | None) -> Tensor:
    first, *rest = (_expanded(adapter, blocks) for adapter in adapters)
    return _dropped(sum(rest, first), keep)


def gated(
    gate_TF: Tensor,
    up_TF: Tensor,
    blocks: PairBlocks,
    gate: Adapter | None,
    up: Adapter | None,
    a_down_SFR: Tensor | None,
    down_scale: float,
    keep: Keep | None,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    token_P = blocks.order.token_P.long()
    gate_PF = gate_TF[token_P] + (0 if gate is None else _expanded(gate, blocks))
    up_PF = up_TF[token_P] + (0 if up is None else _expanded(up, blocks))
    h_PF = (act(activation, gate_PF) * up_PF).where(_here(blocks)[:, None], 0.0)
    if a_down_SFR is None:
        return h_PF, None
    return h_PF, down_scale * _times(_dropped(h_PF, keep), a_down_SFR, blocks, "pf,pfr->pr")


def gated_backward(
    gate_TF: Tensor,
    up_TF: Tensor,
    dhidden_TF: Tensor,
    weight_TK: Tensor,
    blocks: PairBlocks,
    gate: Adapter | None,
    up: Adapter | None,
    down: Adapter | None,
    keep: Keep | None,
    activation: str,
    pair_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    order, here_P1 = blocks.order, _here(blocks)[:, None]
    token_P, place_TK = order.token_P.long(), order.place_TK
    gate_PF = (gate_TF[token_P] + (0 if gate is None else _expanded(gate, blocks))).where(here_P1, 0.0)
    up_PF = (up_TF[token_P] + (0 if up is None else _expanded(up, blocks))).where(here_P1, 0.0)
    with torch.enable_grad():
        leaf = gate_PF.detach().requires_grad_()
        act_PF = act(activation, leaf)
        (slope_PF,) = torch.autograd.grad(act_PF.sum(), leaf)
    act_PF = act_PF.detach()
    h_PF = act_PF * up_PF
    dh_PF = (dhidden_TF[token_P] + (0 if down is None else _dropped(_expanded(down, blocks), keep))).where(here_P1, 0.0)
    dweight_P = (dh_PF * h_PF).sum(1)
    dweight_TK = (dweight_P[place_TK.clamp(min=0).long()] if len(dweight_P) else dweight_P.new_zeros(place_TK.shape)) * (place_TK >= 0)
    weight_P1 = weight_TK.flatten()[order.order_P, None].to(dh_PF.dtype)
    dgate_PF, dup_PF = weight_P1 * dh_PF * up_PF * slope_PF, weight_P1 * dh_PF * act_PF
    db_gate = None if gate is None else _by_slot(dgate_PF, gate.low_PR, blocks).to(pair_dtype)
    db_up = None if up is None else _by_slot(dup_PF, up.low_PR, blocks).to(pair_dtype)
    da_down = None if down is None else _by_slot(weight_P1 * down.low_PR, _dropped(h_PF, keep), blocks).to(pair_dtype)
    return dgate_PF, dup_PF, dweight_TK, db_gate, db_up, da_down


def outer(
    x_TN: Tensor,
    blocks: PairBlocks,
    lows: tuple[Tensor, ...],
    weight_TK: Tensor | None,
    keep: Keep | None,
    pair_dtype: torch.dtype,
    *,
    transposed: bool,
) -> tuple[Tensor, ...]:
    x_PN = _dropped(x_TN[blocks.order.token_P.long()], keep)
    if weight_TK is not None:
        x_PN = x_PN * weight_TK.flatten()[blocks.order.order_P, None].to(x_PN.dtype)
    sums = (_by_slot(x_PN, low, blocks) for low in lows)
    return tuple((value.transpose(1, 2) if transposed else value).to(pair_dtype) for value in sums)


def _slot_P(blocks: PairBlocks) -> Tensor:
    """int64 [P]: the slot of each pair in its place; the last one's for pairs that are elsewhere."""
    place_P = torch.arange(blocks.order.num_pairs, device=blocks.order.starts.device)
    slot_P = torch.searchsorted(blocks.order.starts.long(), place_P, right=True) - 1
    return slot_P.clamp(max=blocks.order.num_slots - 1)


def _here(blocks: PairBlocks) -> Tensor:
    """bool [P]"""
    return torch.arange(blocks.order.num_pairs, device=blocks.order.starts.device) < blocks.order.starts[-1]


def _times(value_P: Tensor, matrix_S: Tensor, blocks: PairBlocks, formula: str) -> Tensor:
    out = torch.einsum(formula, value_P, matrix_S.to(value_P.dtype)[_slot_P(blocks)])
    return out.where(_here(blocks)[:, None], 0.0)


def _expanded(adapter: Adapter, blocks: PairBlocks) -> Tensor:
    return _times(adapter.low_PR, adapter.matrix_SNR, blocks, "pr,pnr->pn")


def _by_slot(left_PN: Tensor, right_PR: Tensor, blocks: PairBlocks) -> Tensor:
    """[S, N, R], the sums over each slot's pairs."""
    slot_P, here_P = _slot_P(blocks), _here(blocks)
    out = [left_PN[here_P & (slot_P == s)].T @ right_PR[here_P & (slot_P == s)] for s in range(blocks.order.num_slots)]
    return torch.stack(out)


def _dropped(value_PN: Tensor, keep: Keep | None) -> Tensor:
    """Dropout without its scale."""
    if keep is None:
        return value_PN
    mask = torch.empty_like(value_PN)
    return value_PN * Dropout(keep.dropped_levels / 65536, key=0).keep_into(keep.row_P, Dropout.scratch(mask), mask)
