"""The MixLoRA feed-forward over a shared frozen FFN in Triton, as a forward and a backward operator for autograd and torch.compile.

torch computes the six large GEMMs, which have T rows. Between them run the passes of `hecate.kernels.mixlora.passes`, on assignments
sorted by slot. The backward pass recomputes all values of an assignment from G = x Wg', U = x Wu' and its inputs multiplied by A. Nothing
waits for the device.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, P = T·K places of the sorted assignments, S slots, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks, RoutedTokens, fake_order, num_tiles_bound
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.dropout import Dropout, FfnDropout
from hecate.kernels.common.ffn import FfnBase
from hecate.kernels.common.low_rank import MAX_RANK, LowRankPairs, LowRankTerm, row_factors, scaled_rows
from hecate.kernels.common.operators import (
    DifferentiableOperator,
    Operator,
    gradients_of_pairs,
    keep_for_backward,
    kept_for_backward,
    pack_pairs,
    split_like,
    unpack_pairs,
)
from hecate.kernels.common.sorting import blocks_of, dropout_numbers, sorted_assignments, words_dropout, words_width
from hecate.kernels.mixlora import passes
from hecate.kernels.mixlora.passes import GatedInputs, config_for

INPUTS = ("gate_proj", "up_proj")
"""the projections of x"""


def mixlora_ffn_triton(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs], *, dropout: Dropout | None = None) -> Tensor:
    """As `hecate.kernels.mixlora.torch_path.mixlora_ffn`, on CUDA tensors, or on the CPU under TRITON_INTERPRET=1; not in float64.

    Ranks are 1 to 256 and may differ by projection. Slots whose ranks differ share matrices of the largest, the rest zeros: such rows of A
    and columns of B stay zero, since the gradient of either is a product with the other.
    """
    y_TD, *_ = mixlora_operator(*forward_arguments(routed, base, pairs, dropout))
    return y_TD


def forward_arguments(
    routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs], dropout: Dropout | None = None
) -> tuple[Any, ...]:
    """Return the arguments of the forward operator."""
    assert len(pairs) > 0, "a MixLoRA layer without adapters is its base FFN"
    assert routed.x_TD.dtype.itemsize <= 4, routed.x_TD.dtype
    widest = max(_widest(of.a_SrI.shape[1], of.eta) for of in pairs.values())
    assert widest <= MAX_RANK, f"the kernels take ranks to {MAX_RANK}, with the rule row_norm half of that"
    return (
        routed.x_TD.contiguous(),
        routed.weight_TK.contiguous(),
        [base.gate_FD, base.up_FD, base.down_DF],
        base.activation,
        *pack_pairs(pairs, dropout),
        0 if dropout is None else dropout.dropped_levels,
        routed.slot_TK,
        *dropout_numbers(dropout, routed),
        routed.places,
    )


def forward_passes(
    x_TD: Tensor,
    weight_TK: Tensor,
    base: Sequence[Tensor],
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
    slot_TK: Tensor,
    numbers: Sequence[Tensor],
    key: int,
    places: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # a schema is made of this
    """Return y [T, D], and for the backward pass G and U [T, F], the inputs of gate, up and down multiplied by A, [P, R], dropout's words
    (`sorted_assignments`), and the tensors of the `AssignmentBlocks`.

    Args:
        matrices, projections, scales, etas, trains_a: the results of `pack_pairs`.
        dropped_levels: of dropout; 0: nothing is dropped.
        numbers, key: the results of `dropout_numbers`.
        places: see `RoutedTokens`.
    """
    (gate_FD, up_FD, down_DF), pairs = base, unpack_pairs(matrices, projections, scales, etas)
    order, words = sorted_assignments(slot_TK, matrices[0].shape[0], numbers, key, places)
    sizes = _block_sizes(x_TD, matrices, etas)
    blocks, dropout = blocks_of(order, sizes["ROWS"], sizes["CHUNK_ROWS"]), words_dropout(words, dropped_levels)
    gate_TF, up_TF = x_TD @ gate_FD.T, x_TD @ up_FD.T
    low_gate, low_up = _shrink_inputs(x_TD, blocks, pairs, dropout)
    inputs = _gated_inputs(gate_TF, up_TF, blocks, (low_gate, low_up), pairs, dropout, activation)
    down = pairs.get("down_proj")
    h_PF, low_down = passes.gated(inputs, 0.0 if down is None else down.scale)
    y_TD = combine_assignments(h_PF, weight_TK, order) @ down_DF.T
    if low_down is not None and down is not None:
        y_TD = combine_assignments(passes.expand((LowRankTerm(low_down, down.b_SOr),), blocks, None), weight_TK, order, y_TD)
    low_down = _no_rank(x_TD, blocks) if low_down is None else low_down
    return y_TD, gate_TF, up_TF, low_gate, low_up, low_down, words, *blocks.tensors()


mixlora_forward = torch.library.custom_op("hecate::mixlora_ffn", forward_passes, mutates_args=())


@mixlora_forward.register_fake
def _(
    x_TD: Tensor,
    weight_TK: Tensor,
    base: Sequence[Tensor],
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
    slot_TK: Tensor,
    numbers: Sequence[Tensor],
    key: int,
    places: int,
) -> tuple[Any, ...]:
    pairs = unpack_pairs(matrices, projections, scales, etas)
    wide = [x_TD.new_empty((x_TD.shape[0], base[0].shape[0])) for _ in range(2)]
    ranks = [pairs[name].a_SrI.shape[1] if name in pairs else 0 for name in (*INPUTS, "down_proj")]
    lows = [x_TD.new_empty((places, rank)) for rank in ranks]
    words = slot_TK.new_empty((2, words_width(slot_TK.numel()) if numbers else 0), dtype=torch.int32)
    sizes, num_slots = _block_sizes(x_TD, matrices, etas), matrices[0].shape[0]
    tiles, chunks = (words.new_empty((num_tiles_bound(places, num_slots, sizes[name]), 3)) for name in ("ROWS", "CHUNK_ROWS"))
    return (
        torch.empty_like(x_TD),
        *wide,
        *lows,
        words,
        *fake_order(slot_TK, num_slots, places),
        tiles,
        chunks,
        words.new_empty(num_slots + 1),
    )


def backward_passes(
    dy_TD: Tensor,
    kept: Sequence[Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    base: Sequence[Tensor],
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
) -> list[Tensor]:
    """Return the gradients of x and the weights, then those of the pairs, [S, C]: A and B side by side in the order of `matrices`.

    Without those of A where A does not train.

    Args:
        kept: the results of the forward operator other than y, in one list.
    """
    (gate_FD, up_FD, down_DF), pairs = base, unpack_pairs(matrices, projections, scales, etas)
    gate_TF, up_TF, low_gate, low_up, low_down, words, *of_blocks = kept
    blocks = AssignmentBlocks.of_tensors(_block_sizes(x_TD, matrices, etas)["ROWS"], of_blocks)
    dropout = words_dropout(words, dropped_levels)
    inputs = _gated_inputs(gate_TF, up_TF, blocks, (low_gate, low_up), pairs, dropout, activation)
    factors = {name: row_factors(of.a_SrI, of.b_SOr, of.eta) for name, of in pairs.items()}
    written = {name: of if trains_a or name == "down_proj" else replace(of, a_SrI=of.a_SrI[:, :0]) for name, of in pairs.items()}
    low_dy, down = None, pairs.get("down_proj")
    if down is not None and factors["down_proj"] is not None:
        down = _side_by_side(down, factors["down_proj"])
        written["down_proj"] = replace(pairs["down_proj"], a_SrI=down.a_SrI)
        inputs = replace(inputs, a_down_SFR=down.a_SrI.transpose(1, 2))
    all_parts, parts = passes.chunk_parts(blocks, written)
    if down is not None:
        (low_dy,) = passes.shrink(dy_TD, blocks, (down.b_SOr,), (down.scale,), None, gather=True)
        passes.outer(dy_TD, blocks, (low_down,), weight_TK, None, (parts["down_proj"].b_SOr,), transposed=False)
    of_gated = passes.gated_backward(inputs, dy_TD @ down_DF, weight_TK, low_dy, parts)
    dx_TD = torch.mm(combine_assignments(of_gated.gate_PF, None, blocks.order), gate_FD)
    dx_TD.addmm_(combine_assignments(of_gated.up_PF, None, blocks.order), up_FD)
    of_input = {"gate_proj": of_gated.gate_PF, "up_proj": of_gated.up_PF}
    names = [name for name in INPUTS if name in pairs]
    if names:
        keep = None if dropout is None else dropout.gate_up
        dlows, of_a = zip(*(_low_gradients(of_input[name], blocks, pairs[name], factors[name]) for name in names), strict=True)
        if trains_a:
            passes.outer(x_TD, blocks, of_a, None, keep, tuple(parts[name].a_SrI for name in names), transposed=True)
        terms = tuple(LowRankTerm(dlow, pairs[name].a_SrI.transpose(1, 2)) for dlow, name in zip(dlows, names, strict=True))
        dx_TD = combine_assignments(passes.expand(terms, blocks, keep), None, blocks.order, dx_TD)
    sums_SC = passes.sum_chunks(all_parts, blocks, matrices[0].dtype)
    if any(etas) or not trains_a:
        sums_SC = _of_what_trains(sums_SC, written, pairs, factors, trains_a)
    return [dx_TD, of_gated.weight_TK, sums_SC]


def _low_gradients(dout_PN: Tensor, blocks: AssignmentBlocks, pair: LowRankPairs, factor_SO: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of A x of gate or up, [P, R]: those that x's gradient comes from, and those that A's does."""
    if factor_SO is None:
        (dlow_PR,) = passes.shrink(dout_PN, blocks, (pair.b_SOr,), (pair.scale,), None, gather=False)
        return dlow_PR, dlow_PR
    both = (pair.b_SOr, scaled_rows(pair.b_SOr, factor_SO))
    dlow_PR, of_a_PR = passes.shrink(dout_PN, blocks, both, (pair.scale, pair.scale), None, gather=False)
    return dlow_PR, of_a_PR


def _side_by_side(down: LowRankPairs, factor_SO: Tensor | None) -> LowRankPairs:
    """Return a pair of twice the rank for the backward pass under the rule: B beside the B with scaled rows, and A above zeros.

    The gradient of h is then that of the pair as it is, and of A's gradient the second half is the one that A gets.
    """
    zeros = torch.zeros_like(down.a_SrI)
    return replace(
        down, a_SrI=torch.cat([down.a_SrI, zeros], dim=1), b_SOr=torch.cat([down.b_SOr, scaled_rows(down.b_SOr, factor_SO)], dim=2)
    )


def _of_what_trains(
    sums_SC: Tensor,
    written: Mapping[str, LowRankPairs],
    pairs: Mapping[str, LowRankPairs],
    factors: Mapping[str, Tensor | None],
    trains_a: bool,
) -> Tensor:
    """Return the gradients of what trains, [S, C'], from those of the pairs `written`, whose A may have more rows, or none."""
    sums = iter(split_like(sums_SC, [matrix for name, of in written.items() for matrix in (of.a_SrI, pairs[name].b_SOr)]))
    found = []
    for name, of in pairs.items():
        da, db = next(sums), next(sums)
        found += [da[:, -of.a_SrI.shape[1] :].flatten(1)] if trains_a else []
        found.append(scaled_rows(db, factors[name]).flatten(1))
    return torch.cat(found, dim=1)


mixlora_backward = torch.library.custom_op("hecate::mixlora_ffn_backward", backward_passes, mutates_args=())


@mixlora_backward.register_fake
def _(
    dy_TD: Tensor,
    kept: Sequence[Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    base: Sequence[Tensor],
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
) -> list[Tensor]:
    numel = sum(math.prod(matrix.shape[1:]) for matrix in (matrices if trains_a else matrices[1::2]))
    return [torch.empty_like(x_TD), torch.empty_like(weight_TK), matrices[0].new_empty((len(matrices[0]), numel))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    *arguments, _slot, numbers, _key, _places = inputs
    ctx.num_numbers = len(numbers)
    keep_for_backward(ctx, [kept, *arguments])


def _gradients(backward: Callable[..., list[Tensor]], ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    assert dy_TD is not None, "the operator's other results are not differentiable"
    kept, *arguments = kept_for_backward(ctx)
    dx_TD, dweight_TK, dpairs_SC = backward(dy_TD.contiguous(), kept, *arguments)
    matrices, trains_a = arguments[4], arguments[8]
    dmatrices = gradients_of_pairs(split_like(dpairs_SC, matrices if trains_a else matrices[1::2]), of_a=trains_a)
    # The gradient of an argument that is a list is a list.
    no_base, no_numbers = [None] * len(arguments[2]), [None] * ctx.num_numbers
    return dx_TD, dweight_TK, no_base, None, dmatrices, None, None, None, None, None, None, no_numbers, None, None


mixlora_operator = DifferentiableOperator(
    Operator(mixlora_forward, forward_passes), Operator(mixlora_backward, backward_passes), _setup_context, _gradients
)


def _block_sizes(x_TD: Tensor, matrices: Sequence[Tensor], etas: Sequence[float]) -> Mapping[str, int]:
    """Return the rows of a tile and of a chunk."""
    return config_for("mixlora_rows", max(_widest(a.shape[1], eta) for a, eta in zip(matrices[0::2], etas, strict=True)), x_TD).blocks


def _widest(rank: int, eta: float | None) -> int:
    """Return the columns of the widest matrix that the passes multiply with for a pair: the rule row_norm puts two side by side."""
    return 2 * rank if eta else rank


def _gated_inputs(
    gate_TF: Tensor,
    up_TF: Tensor,
    blocks: AssignmentBlocks,
    lows: tuple[Tensor, Tensor],
    pairs: dict[str, LowRankPairs],
    dropout: FfnDropout | None,
    activation: str,
) -> GatedInputs:
    gate, up = (LowRankTerm(low, pairs[name].b_SOr) if name in pairs else None for low, name in zip(lows, INPUTS, strict=True))
    a_down_SFR = pairs["down_proj"].a_SrI.transpose(1, 2) if "down_proj" in pairs else None
    return GatedInputs(gate_TF, up_TF, blocks, gate, up, a_down_SFR, None if dropout is None else dropout.down, activation)


def _no_rank(x_TD: Tensor, blocks: AssignmentBlocks) -> Tensor:
    return x_TD.new_empty((blocks.order.num_assignments, 0))


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
    low_gate, low_up = (lows[name] if name in lows else _no_rank(x_TD, blocks) for name in INPUTS)
    return low_gate, low_up
