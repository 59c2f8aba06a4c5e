"""The passes of the MixLoRA feed-forward in plain torch, one by one: those of `hecate.kernels.mixlora.passes` are tested against them.

Same functions and arguments. Rows of assignments that are computed elsewhere come out as zeros. Matrices and lows are taken in any types.
Parts of chunks without rows are not written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks
from hecate.kernels.common.dropout import RowDropout
from hecate.kernels.common.ffn import activation as act
from hecate.kernels.common.low_rank import LowRankPairs, LowRankTerm
from hecate.kernels.mixlora.passes import GatedGradients, GatedInputs


def shrink(
    x: Tensor,
    blocks: AssignmentBlocks,
    matrices: tuple[Tensor, ...],
    scales: tuple[float, ...],
    dropout: RowDropout | None,
    *,
    gather: bool,
) -> tuple[Tensor, ...]:
    x_PC = _dropped(x[blocks.order.token_P.long()] if gather else x, dropout)
    return tuple(scale * _times(x_PC, matrix, blocks, "pc,pcr->pr") for matrix, scale in zip(matrices, scales, strict=True))


def expand(terms: tuple[LowRankTerm, ...], blocks: AssignmentBlocks, dropout: RowDropout | None) -> Tensor:
    first, *rest = (_expanded(term, blocks) for term in terms)
    return _dropped(sum(rest, first), dropout)


def gated(inputs: GatedInputs, down_scale: float) -> tuple[Tensor, Tensor | None]:
    blocks = inputs.blocks
    gate_PF, up_PF = _gate_and_up(inputs)
    h_PF = (act(inputs.activation, gate_PF) * up_PF).where(_here(blocks)[:, None], 0.0)
    if inputs.a_down_SFR is None:
        return h_PF, None
    return h_PF, down_scale * _times(_dropped(h_PF, inputs.dropout), inputs.a_down_SFR, blocks, "pf,pfr->pr")


def gated_backward(
    inputs: GatedInputs, dhidden_TF: Tensor, weight_TK: Tensor, low_dy_PR: Tensor | None, parts: Mapping[str, LowRankPairs]
) -> GatedGradients:
    blocks, order, here_P1 = inputs.blocks, inputs.blocks.order, _here(inputs.blocks)[:, None]
    down = None if low_dy_PR is None or inputs.a_down_SFR is None else LowRankTerm(low_dy_PR, inputs.a_down_SFR)
    token_P, place_TK = order.token_P.long(), order.place_TK
    gate_PF, up_PF = (value.where(here_P1, 0.0) for value in _gate_and_up(inputs))
    with torch.enable_grad():
        leaf = gate_PF.detach().requires_grad_()
        act_PF = act(inputs.activation, leaf)
        (slope_PF,) = torch.autograd.grad(act_PF.sum(), leaf)
    act_PF = act_PF.detach()
    h_PF = act_PF * up_PF
    dh_PF = (dhidden_TF[token_P] + (0 if down is None else _dropped(_expanded(down, blocks), inputs.dropout))).where(here_P1, 0.0)
    dweight_P = (dh_PF * h_PF).sum(1)
    dweight_TK = (dweight_P[place_TK.clamp(min=0).long()] if len(dweight_P) else dweight_P.new_zeros(place_TK.shape)) * (place_TK >= 0)
    weight_P1 = weight_TK.flatten()[order.order_P, None].to(dh_PF.dtype)
    dgate_PF, dup_PF = weight_P1 * dh_PF * up_PF * slope_PF, weight_P1 * dh_PF * act_PF
    for name, term, gradient_PF in (("gate_proj", inputs.gate, dgate_PF), ("up_proj", inputs.up, dup_PF)):
        if term is not None:
            _by_chunk(gradient_PF, term.low_PR, blocks, parts[name].b_SOr)
    if down is not None:
        _by_chunk(weight_P1 * down.low_PR, _dropped(h_PF, inputs.dropout), blocks, parts["down_proj"].a_SrI)
    return GatedGradients(dgate_PF, dup_PF, dweight_TK)


def _gate_and_up(inputs: GatedInputs) -> tuple[Tensor, Tensor]:
    """[P, F] each, with the low-rank terms."""
    token_P = inputs.blocks.order.token_P.long()
    gate_PF = inputs.gate_TF[token_P] + (0 if inputs.gate is None else _expanded(inputs.gate, inputs.blocks))
    return gate_PF, inputs.up_TF[token_P] + (0 if inputs.up is None else _expanded(inputs.up, inputs.blocks))


def outer(
    x_TN: Tensor,
    blocks: AssignmentBlocks,
    lows: tuple[Tensor, ...],
    weight_TK: Tensor | None,
    dropout: RowDropout | None,
    parts: tuple[Tensor, ...],
    *,
    transposed: bool,
) -> None:
    x_PN = _dropped(x_TN[blocks.order.token_P.long()], dropout)
    if weight_TK is not None:
        x_PN = x_PN * weight_TK.flatten()[blocks.order.order_P, None].to(x_PN.dtype)
    for low, part in zip(lows, parts, strict=True):
        _by_chunk(x_PN, low, blocks, part.transpose(1, 2) if transposed else part)


def sum_chunks(parts: Tensor, blocks: AssignmentBlocks, dtype: torch.dtype) -> Tensor:
    first = blocks.first_chunk.tolist()
    sums = [parts[begin:end].sum(0) for begin, end in itertools.pairwise(first)]
    return torch.stack(sums).to(dtype)


def _slot_P(blocks: AssignmentBlocks) -> Tensor:
    """int64 [P]: the slot of each assignment in its place; the last slot for assignments that are computed elsewhere."""
    place_P = torch.arange(blocks.order.num_assignments, device=blocks.order.starts.device)
    slot_P = torch.searchsorted(blocks.order.starts.long(), place_P, right=True) - 1
    return slot_P.clamp(max=blocks.order.num_slots - 1)


def _here(blocks: AssignmentBlocks) -> Tensor:
    """bool [P]"""
    return torch.arange(blocks.order.num_assignments, device=blocks.order.starts.device) < blocks.order.starts[-1]


def _times(value_P: Tensor, matrix_S: Tensor, blocks: AssignmentBlocks, formula: str) -> Tensor:
    out = torch.einsum(formula, value_P, matrix_S.to(value_P.dtype)[_slot_P(blocks)])
    return out.where(_here(blocks)[:, None], 0.0)


def _expanded(term: LowRankTerm, blocks: AssignmentBlocks) -> Tensor:
    return _times(term.low_PR, term.matrix_SNR, blocks, "pr,pnr->pn")


def _by_chunk(left_PN: Tensor, right_PR: Tensor, blocks: AssignmentBlocks, part_CNR: Tensor) -> None:
    """Write the sums over each chunk's assignments."""
    for chunk, (_, first, rows) in enumerate(blocks.chunks.tolist()):
        if rows > 0:
            part_CNR[chunk] = left_PN[first : first + rows].T @ right_PR[first : first + rows]


def _dropped(value_PN: Tensor, dropout: RowDropout | None) -> Tensor:
    """Dropout without its scale."""
    if dropout is None:
        return value_PN
    return value_PN * dropout.keep(value_PN.shape[1], value_PN.dtype)
