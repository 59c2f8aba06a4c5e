"""The MixLoRA feed-forward over a shared frozen FFN in Triton, as a forward and a backward operator for autograd and torch.compile.

torch computes the six large GEMMs, which have T rows. Between them run the passes of `hecate.kernels.mixlora.passes`, on assignments
sorted by slot. The backward pass recomputes all values of an assignment from G = x Wg', U = x Wu' and its inputs multiplied by A. Nothing
waits for the device.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, P = T·K places of the sorted assignments, S slots, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks, AssignmentOrder, RoutedTokens
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.dropout import Dropout, FfnDropout
from hecate.kernels.common.ffn import FfnBase
from hecate.kernels.common.low_rank import MAX_RANK, LowRankPairs, LowRankTerm, PackedPairs, split_like
from hecate.kernels.common.operands import Operands
from hecate.kernels.common.operators import DifferentiableOperator
from hecate.kernels.common.sorting import Unsorted, blocks_of, sorted_assignments, words_dropout
from hecate.kernels.mixlora import passes
from hecate.kernels.mixlora.passes import GatedInputs, config_for

INPUTS = ("gate_proj", "up_proj")
"""the projections of x"""


def mixlora_ffn_triton(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs], *, dropout: Dropout | None = None) -> Tensor:
    """As `hecate.kernels.mixlora.torch_path.mixlora_ffn`, on CUDA tensors, or on the CPU under TRITON_INTERPRET=1; not in float64.

    Ranks are 1 to 256 and may differ by projection. Slots whose ranks differ share matrices of the largest, the rest zeros: such rows of A
    and columns of B stay zero, since the gradient of either is a product with the other.
    """
    assert len(pairs) > 0, "a MixLoRA layer without adapters is its base FFN"
    assert routed.x_TD.dtype.itemsize <= 4, routed.x_TD.dtype
    call = MixloraCall(routed.x_TD.contiguous(), routed.weight_TK.contiguous(), base, PackedPairs.of(pairs, dropout))
    assert _widest(call.pairs) <= MAX_RANK, f"the kernels take ranks to {MAX_RANK}, and half of that where A's gradient has a B of its own"
    return mixlora_operator(call, Unsorted.of(routed, dropout))


@dataclass(frozen=True)
class MixloraCall(Operands):
    """What both passes take."""

    x_TD: Tensor
    weight_TK: Tensor
    base: FfnBase
    pairs: PackedPairs


@dataclass(frozen=True)
class MixloraKept(Operands):
    """What the forward pass keeps for the backward pass."""

    gate_TF: Tensor
    """G, the base's gate projection of each token"""
    up_TF: Tensor
    """U, the base's up projection of each token"""
    low_gate_PR: Tensor
    """the inputs of gate multiplied by A; R is 0 for a projection without a pair"""
    low_up_PR: Tensor
    low_down_PR: Tensor
    words: Tensor
    """the words of dropout, see `sorted_assignments`"""
    order: AssignmentOrder
    # As `AssignmentBlocks` has them. They are kept, so that the backward pass need not cut the order again.
    tiles: Tensor
    chunks: Tensor
    first_chunk: Tensor


def _forward(call: MixloraCall, unsorted: Unsorted) -> tuple[Tensor, MixloraKept]:
    x_TD, weight_TK, base, pairs = call.x_TD, call.weight_TK, call.base, call.pairs.unpacked()
    order, words = sorted_assignments(unsorted, call.pairs.matrices[0].shape[0])
    sizes = _block_sizes(call)
    blocks, dropout = blocks_of(order, sizes["ROWS"], sizes["CHUNK_ROWS"]), words_dropout(words, call.pairs.dropped_levels)
    low_gate, low_up = _shrink_inputs(x_TD, blocks, pairs, dropout)
    no_rank = x_TD.new_empty((order.num_assignments, 0))
    kept = MixloraKept(
        x_TD @ base.gate_FD.T, x_TD @ base.up_FD.T, low_gate, low_up, no_rank, words, order, blocks.tiles, blocks.chunks, blocks.first_chunk
    )
    h_PF, low_down = passes.gated(_gated_inputs(call, kept, blocks, dropout), pairs["down_proj"].scale if "down_proj" in pairs else 0.0)
    y_TD = combine_assignments(h_PF, weight_TK, order) @ base.down_DF.T
    if low_down is None:
        return y_TD, kept
    y_PD = passes.expand((LowRankTerm(low_down, pairs["down_proj"].b_SOr),), blocks, None)
    return combine_assignments(y_PD, weight_TK, order, y_TD), replace(kept, low_down_PR=low_down)


def _backward(dy_TD: Tensor, call: MixloraCall, kept: MixloraKept) -> list[Tensor]:
    """Return the gradients of x and the weights, then those of what trains of the pairs, side by side in their order, [S, C]."""
    dy_TD, x_TD, base, pairs = dy_TD.contiguous(), call.x_TD, call.base, call.pairs.unpacked()
    blocks = AssignmentBlocks(kept.order, _block_sizes(call)["ROWS"], kept.tiles, kept.chunks, kept.first_chunk)
    dropout = words_dropout(kept.words, call.pairs.dropped_levels)
    inputs, trains_a = _gated_inputs(call, kept, blocks, dropout), call.pairs.trains_a
    written = {name: of if trains_a or name == "down_proj" else replace(of, a_SrI=of.a_SrI[:, :0]) for name, of in pairs.items()}
    low_dy, down = None, pairs.get("down_proj")
    if down is not None and down.b_for_a_SOr is not None:
        down = _side_by_side(down, down.b_for_a_SOr)
        written["down_proj"] = replace(pairs["down_proj"], a_SrI=down.a_SrI)
        inputs = replace(inputs, a_down_SFR=down.a_SrI.transpose(1, 2))
    all_parts, parts = passes.chunk_parts(blocks, written)
    if down is not None:
        (low_dy,) = passes.shrink(dy_TD, blocks, (down.b_SOr,), (down.scale,), None, gather=True)
        passes.outer(dy_TD, blocks, (kept.low_down_PR,), call.weight_TK, None, (parts["down_proj"].b_SOr,), transposed=False)
    of_gated = passes.gated_backward(inputs, dy_TD @ base.down_DF, call.weight_TK, low_dy, parts)
    dx_TD = torch.mm(combine_assignments(of_gated.gate_PF, None, blocks.order), base.gate_FD)
    dx_TD.addmm_(combine_assignments(of_gated.up_PF, None, blocks.order), base.up_FD)
    of_input = {"gate_proj": of_gated.gate_PF, "up_proj": of_gated.up_PF}
    names = [name for name in INPUTS if name in pairs]
    if names:
        keep = None if dropout is None else dropout.gate_up
        dlows, of_a = zip(*(_low_gradients(of_input[name], blocks, pairs[name]) for name in names), strict=True)
        if trains_a:
            passes.outer(x_TD, blocks, of_a, None, keep, tuple(parts[name].a_SrI for name in names), transposed=True)
        terms = tuple(LowRankTerm(dlow, pairs[name].a_SrI.transpose(1, 2)) for dlow, name in zip(dlows, names, strict=True))
        dx_TD = combine_assignments(passes.expand(terms, blocks, keep), None, blocks.order, dx_TD)
    sums_SC = passes.sum_chunks(all_parts, blocks, call.pairs.matrices[0].dtype)
    if call.pairs.b_for_a or not trains_a:
        sums_SC = _of_what_trains(sums_SC, written, call.pairs)
    return [dx_TD, of_gated.weight_TK, sums_SC]


def _gradients(call: MixloraCall, found: list[Tensor]) -> dict[str, Any]:
    dx_TD, dweight_TK, of_pairs_SC = found
    of_pairs = call.pairs.gradients(split_like(of_pairs_SC, call.pairs.trained))
    return {"x_TD": dx_TD, "weight_TK": dweight_TK, "pairs.matrices": of_pairs}


mixlora_operator = DifferentiableOperator("mixlora_ffn", _forward, _backward, _gradients)


def _low_gradients(dout_PN: Tensor, blocks: AssignmentBlocks, pair: LowRankPairs) -> tuple[Tensor, Tensor]:
    """Return the gradients of A x of gate or up, [P, R]: those that x's gradient comes from, and those that A's does."""
    if pair.b_for_a_SOr is None:
        (dlow_PR,) = passes.shrink(dout_PN, blocks, (pair.b_SOr,), (pair.scale,), None, gather=False)
        return dlow_PR, dlow_PR
    dlow_PR, of_a_PR = passes.shrink(dout_PN, blocks, (pair.b_SOr, pair.b_for_a_SOr), (pair.scale, pair.scale), None, gather=False)
    return dlow_PR, of_a_PR


def _side_by_side(down: LowRankPairs, b_for_a_SOr: Tensor) -> LowRankPairs:
    """Return a pair of twice the rank for the backward pass: B beside what stands for it in A's gradient, and A above zeros.

    The gradient of h is then that of the pair as it is, and of A's gradient the second half is the one that A gets.
    """
    zeros = torch.zeros_like(down.a_SrI)
    return replace(down, a_SrI=torch.cat([down.a_SrI, zeros], dim=1), b_SOr=torch.cat([down.b_SOr, b_for_a_SOr], dim=2))


def _of_what_trains(sums_SC: Tensor, written: Mapping[str, LowRankPairs], pairs: PackedPairs) -> Tensor:
    """Return the gradients of what trains, [S, C'], from those of the pairs `written`, whose A may have more rows, or none."""
    sums = iter(split_like(sums_SC, [matrix for of in written.values() for matrix in (of.a_SrI, of.b_SOr)]))
    found = []
    for a_SrI in pairs.matrices[0::2]:
        da, db = next(sums), next(sums)
        found += [da[:, -a_SrI.shape[1] :].flatten(1)] if pairs.trains_a else []
        found.append(db.flatten(1))
    return torch.cat(found, dim=1)


def _block_sizes(call: MixloraCall) -> Mapping[str, int]:
    """Return the rows of a tile and of a chunk."""
    return config_for("mixlora_rows", _widest(call.pairs), call.x_TD).blocks


def _widest(pairs: PackedPairs) -> int:
    """Return the columns of the widest matrix that the passes multiply with: of B and what stands for it in A's gradient side by side."""
    return max(a_SrI.shape[1] for a_SrI in pairs.matrices[0::2]) * (2 if pairs.b_for_a else 1)


def _gated_inputs(call: MixloraCall, kept: MixloraKept, blocks: AssignmentBlocks, dropout: FfnDropout | None) -> GatedInputs:
    pairs, lows = call.pairs.unpacked(), (kept.low_gate_PR, kept.low_up_PR)
    gate, up = (LowRankTerm(low, pairs[name].b_SOr) if name in pairs else None for low, name in zip(lows, INPUTS, strict=True))
    a_down_SFR = pairs["down_proj"].a_SrI.transpose(1, 2) if "down_proj" in pairs else None
    keep = None if dropout is None else dropout.down
    return GatedInputs(kept.gate_TF, kept.up_TF, blocks, gate, up, a_down_SFR, keep, call.base.activation)


def _shrink_inputs(
    x_TD: Tensor, blocks: AssignmentBlocks, pairs: dict[str, LowRankPairs], dropout: FfnDropout | None
) -> tuple[Tensor, Tensor]:
    """Return the inputs of gate and up multiplied by A; a tensor of rank 0 for a projection without a pair."""
    of = {name: pairs[name] for name in INPUTS if name in pairs}
    lows: dict[str, Tensor] = {}
    if of:
        matrices, scales = tuple(each.a_SrI.transpose(1, 2) for each in of.values()), tuple(each.scale for each in of.values())
        keep = None if dropout is None else dropout.gate_up
        lows = dict(zip(of, passes.shrink(x_TD, blocks, matrices, scales, keep, gather=True), strict=True))
    low_gate, low_up = (lows[name] if name in lows else x_TD.new_empty((blocks.order.num_assignments, 0)) for name in INPUTS)
    return low_gate, low_up
