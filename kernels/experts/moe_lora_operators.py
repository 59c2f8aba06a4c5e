"""The feed-forward of frozen experts with low-rank pairs on grouped Triton kernels, as a forward and a backward operator for torch.compile.

It computes what `torch_path.moe_lora_ffn` does, on assignments sorted by slot. Nothing waits for the device, and a layer has about a
dozen launches, whatever the number of experts. A layer keeps x and, for each assignment, the gate and up outputs and A x. Sums always
have the same order and use no atomics.

Ranks are padded to sizes that tensor cores multiply. The padded pairs of gate and up are adjacent, in copies that live for one pass only,
because the pairs themselves are replicas, which are freed and gathered between passes.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, S slots, P places of the sorted assignments, r rank, R as padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder, RoutedTokens
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.dropout import Dropout, FfnDropout, RowDropout
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.launch_config import padded_rank
from hecate.kernels.common.low_rank import LowRankPairs, LowRankTerm, PackedPairs, separate_gate_and_up
from hecate.kernels.common.operands import Operands
from hecate.kernels.common.operators import DifferentiableOperator
from hecate.kernels.common.sorting import Unsorted, sorted_assignments, words_dropout
from hecate.kernels.experts.gated import gate, gate_backward
from hecate.kernels.experts.grouped_gemm import GemmOptions, grouped_gemm
from hecate.kernels.experts.grouped_wgrad import grouped_wgrad
from hecate.kernels.experts.slot_weights import SlotWeights, separate_weights, stacked_weights


def moe_lora_ffn_triton(
    routed: RoutedTokens,
    frozen_S: Sequence[Tensor],
    pairs: dict[str, LowRankPairs],
    shape: FfnShape,
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """As `torch_path.moe_lora_ffn`, in float32, bfloat16 or float16; differentiable once."""
    assert len(pairs) > 0, "frozen experts without adapters have nothing to train"
    packed = PackedPairs.of(separate_gate_and_up(pairs), dropout)
    call = MoeLoraCall(routed.x_TD, routed.weight_TK, list(frozen_S), shape, packed)
    return moe_lora_operator(call, Unsorted.of(routed, dropout if frozen_S else None))


@dataclass(frozen=True)
class MoeLoraCall(Operands):
    """What both passes take."""

    x_TD: Tensor
    weight_TK: Tensor
    frozen_S: Sequence[Tensor]
    """the flat chunk of each slot, as `shape` lays it out"""
    shape: FfnShape
    pairs: PackedPairs


@dataclass(frozen=True)
class MoeLoraKept(Operands):
    """What the forward pass keeps for the backward pass."""

    gate_up_P: Tensor
    """[P, 2F], the gate and up outputs of each assignment"""
    low_P: Tensor
    """[P, 2R], each assignment's inputs multiplied by A of gate and of up; [P, 0] if neither has a pair"""
    words: Tensor
    """the words of dropout, see `sorted_assignments`"""
    order: AssignmentOrder


def _forward(call: MoeLoraCall, unsorted: Unsorted) -> tuple[Tensor, MoeLoraKept]:
    x_TD, shape = call.x_TD.contiguous(), call.shape
    order, words = sorted_assignments(unsorted, len(call.frozen_S))
    inputs, down_pair = _padded(call.pairs.unpacked(), x_TD.dtype)
    if not call.frozen_S:
        gate_up_P = x_TD.new_empty((order.num_assignments, 2 * shape.ffn))
        low_P = x_TD.new_empty((order.num_assignments, 0 if inputs is None else 2 * inputs.rank))
        return torch.zeros_like(x_TD), MoeLoraKept(gate_up_P, low_P, words, order)
    gate_up, down = _frozen_weights(call)
    drop_in, drop_down = _of_inputs(words_dropout(words, call.pairs.dropped_levels))
    if inputs is None:
        low_P = x_TD.new_empty((order.num_assignments, 0))
        gate_up_P = grouped_gemm(x_TD, gate_up, order, GemmOptions(gather=True))
    else:
        low_P = grouped_gemm(x_TD, stacked_weights(inputs.a), order, GemmOptions(gather=True, drop_x=drop_in))
        term = LowRankTerm(low_P, inputs.b)
        gate_up_P = grouped_gemm(x_TD, gate_up, order, GemmOptions(gather=True, halves=2, low_rank=term, scales=inputs.scales))
    h_PF = gate(gate_up_P, order, shape.activation)
    if down_pair is None:
        y_PD = grouped_gemm(h_PF, down, order)
    else:
        low_h_P = grouped_gemm(h_PF, stacked_weights(down_pair.a), order, GemmOptions(drop_x=drop_down))
        y_PD = grouped_gemm(h_PF, down, order, GemmOptions(low_rank=LowRankTerm(low_h_P, down_pair.b), scales=down_pair.scales))
    return combine_assignments(y_PD, call.weight_TK.contiguous(), order), MoeLoraKept(gate_up_P, low_P, words, order)


def _backward(dy_TD: Tensor, call: MoeLoraCall, kept: MoeLoraKept) -> list[Tensor]:
    """Return the gradients of x, of the weights and of what trains of the pairs."""
    packed, order = call.pairs, kept.order
    if not call.frozen_S:
        return [torch.zeros_like(tensor) for tensor in (call.x_TD, call.weight_TK, *packed.trained)]
    pairs = packed.unpacked()
    inputs, down_pair = _padded(pairs, call.x_TD.dtype)
    x_TD, dy_TD = call.x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _frozen_weights(call)
    drop_in, drop_down = _of_inputs(words_dropout(kept.words, packed.dropped_levels))
    gradients = [matrix.new_empty(matrix.shape) for matrix in packed.trained]
    each = iter(packed.gradients(gradients))
    of: _OfPairs = dict(zip(packed.projections.split(), zip(each, each, strict=True), strict=True))  # type: ignore[arg-type]

    dh_PF, low_dy_P = _hidden_gradient(dy_TD, down, down_pair, order, drop_down)
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(kept.gate_up_P, dh_PF, call.weight_TK.contiguous(), order, call.shape.activation)
    del dh_PF  # its memory, [P, F], serves what follows, as that of `weighted_h_PF` does below
    if down_pair is not None and low_dy_P is not None:
        da, db = of["down_proj"]
        if da is not None:
            if packed.b_for_a:
                low_dy_P = _shrunk_gradient(dy_TD, replace(down_pair, b=_padded_b_for_a([pairs["down_proj"]], down_pair)), order)
            grouped_wgrad(low_dy_P[:, : da.shape[1]], weighted_h_PF, order, da, drop_right=drop_down)
        low_h_P = grouped_gemm(weighted_h_PF, stacked_weights(down_pair.a), order, GemmOptions(drop_x=drop_down, scales=down_pair.scales))
        grouped_wgrad(dy_TD, low_h_P[:, : db.shape[2]], order, db, gather="left")
    del weighted_h_PF

    if inputs is None:
        dx_PD = grouped_gemm(dgate_up_P, gate_up, order, GemmOptions(transposed=True))
    else:
        options = GemmOptions(transposed=True, halves=2, scales=inputs.scales)
        dlow_P = of_a_P = grouped_gemm(dgate_up_P, stacked_weights(inputs.b), order, options)
        term = LowRankTerm(dlow_P, inputs.a.transpose(1, 2))
        dx_PD = grouped_gemm(dgate_up_P, gate_up, order, GemmOptions(transposed=True, low_rank=term, drop_low=drop_in))
        if packed.b_for_a:
            b_for_a = _padded_b_for_a([pairs.get(name) for name in _HALVES], inputs)
            of_a_P = grouped_gemm(dgate_up_P, stacked_weights(b_for_a), order, options)
        _input_gradients(of, inputs, _InputRows(of_a_P, x_TD, drop_in, kept.low_P, dgate_up_P), order)
    return [combine_assignments(dx_PD, None, order), dweight_TK, *gradients]


def _gradients(call: MoeLoraCall, found: list[Tensor]) -> dict[str, Any]:
    dx_TD, dweight_TK, *of_pairs = found
    return {"x_TD": dx_TD, "weight_TK": dweight_TK, "pairs.matrices": call.pairs.gradients(of_pairs)}


moe_lora_operator = DifferentiableOperator("moe_lora_ffn", _forward, _backward, _gradients)


_OfPairs = dict[str, tuple[Tensor | None, Tensor]]
"""the gradients of A and B by projection; None: A does not train"""


def _hidden_gradient(
    dy_TD: Tensor, down: SlotWeights, pair: _PaddedPairs | None, order: AssignmentOrder, dropout: RowDropout | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of each hidden state before the router's weight, [P, F], and with a pair scale · dy B_down, [P, R]."""
    if pair is None:
        return grouped_gemm(dy_TD, down, order, GemmOptions(gather=True, transposed=True)), None
    low_dy_P = _shrunk_gradient(dy_TD, pair, order)
    term = LowRankTerm(low_dy_P, pair.a.transpose(1, 2))
    return grouped_gemm(dy_TD, down, order, GemmOptions(gather=True, transposed=True, low_rank=term, drop_low=dropout)), low_dy_P


def _shrunk_gradient(dy_TD: Tensor, pair: _PaddedPairs, order: AssignmentOrder) -> Tensor:
    """Return scale · dy B_down of each assignment, [P, R]."""
    return grouped_gemm(dy_TD, stacked_weights(pair.b), order, GemmOptions(gather=True, transposed=True, scales=pair.scales))


@dataclass(frozen=True)
class _InputRows:
    """What the gradients of the pairs of gate and up come from."""

    of_a_P: Tensor
    """[P, 2R], the gradients of A x of gate and of up, as A is to see them"""
    x_TD: Tensor
    dropout: RowDropout | None
    """the dropout of x"""
    low_P: Tensor
    """[P, 2R], as `MoeLoraKept.low_P`"""
    dgate_up_P: Tensor
    """[P, 2F], the gradients of the gate and up outputs"""


def _input_gradients(of: _OfPairs, inputs: _PaddedPairs, rows: _InputRows, order: AssignmentOrder) -> None:
    """Write the gradients of the pairs of gate and up into `of`."""
    ffn, (some_da, some_db) = rows.dgate_up_P.shape[1] // 2, next(of[name] for name in _HALVES if name in of)
    da_in = None
    if some_da is not None:
        da_in = torch.empty_like(inputs.a, dtype=some_db.dtype)
        # One pass over x computes both.
        grouped_wgrad(rows.of_a_P, rows.x_TD, order, da_in, gather="right", drop_right=rows.dropout)
    for half, name in enumerate(_HALVES):
        if name in of:
            da, db = of[name]
            span = slice(half * inputs.rank, half * inputs.rank + db.shape[2])
            if da is not None and da_in is not None:
                da.copy_(da_in[:, span])
            dout_PF = rows.dgate_up_P[:, half * ffn : (half + 1) * ffn]
            grouped_wgrad(dout_PF, rows.low_P[:, span], order, db, scale=inputs.scales[half])


_HALVES = ("gate_proj", "up_proj")
"""the halves of the gate and up outputs"""


@dataclass(frozen=True)
class _PaddedPairs:
    """Low-rank pairs that share their input, padded and side by side, in the type of the computation."""

    a: Tensor
    """[S, H·R, inputs]: the matrices A"""
    b: Tensor
    """[S, H·outputs, R]: the matrices B"""
    rank: int
    """R, the padded rank"""
    scales: tuple[float, float]


def _frozen_weights(call: MoeLoraCall) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = zip(*(call.shape.matrices(flat) for flat in call.frozen_S), strict=True)
    return separate_weights(gate_up_S), separate_weights(down_S)


def _of_inputs(dropout: FfnDropout | None) -> tuple[RowDropout | None, RowDropout | None]:
    return (None, None) if dropout is None else (dropout.gate_up, dropout.down)


def _padded(pairs: dict[str, LowRankPairs], dtype: torch.dtype) -> tuple[_PaddedPairs | None, _PaddedPairs | None]:
    """Return the padded pairs of gate and up, and the padded pair of down; None for a part without pairs."""
    return _side_by_side([pairs.get(name) for name in _HALVES], dtype), _side_by_side([pairs.get("down_proj")], dtype)


def _side_by_side(pairs: Sequence[LowRankPairs | None], dtype: torch.dtype) -> _PaddedPairs | None:
    present = [of for of in pairs if of is not None]
    if not present:
        return None
    rank = padded_rank(max(of.a_SrI.shape[1] for of in present))
    num_slots, _, num_inputs = present[0].a_SrI.shape
    a_SHRI = present[0].a_SrI.new_zeros((num_slots, len(pairs), rank, num_inputs), dtype=dtype)
    for half, of in enumerate(pairs):
        if of is not None:
            a_SHRI[:, half, : of.a_SrI.shape[1]] = of.a_SrI
    first, *_, last = [0.0 if of is None else of.scale for of in pairs] * 2
    b = _padded_b([None if of is None else of.b_SOr for of in pairs], rank, dtype)
    return _PaddedPairs(a_SHRI.flatten(1, 2), b, rank, (first, last))


def _padded_b(b_H: Sequence[Tensor | None], rank: int, dtype: torch.dtype) -> Tensor:
    """[S, H·outputs, R]"""
    some = next(b for b in b_H if b is not None)
    b_SHOR = some.new_zeros((some.shape[0], len(b_H), some.shape[1], rank), dtype=dtype)
    for half, b in enumerate(b_H):
        if b is not None:
            b_SHOR[:, half, :, : b.shape[2]] = b
    return b_SHOR.flatten(1, 2)


def _padded_b_for_a(pairs: Sequence[LowRankPairs | None], padded: _PaddedPairs) -> Tensor:
    """What stands for B in A's gradient, as B lies in the padded pairs."""
    return _padded_b([None if of is None else of.b_for_a_SOr for of in pairs], padded.rank, padded.b.dtype)
