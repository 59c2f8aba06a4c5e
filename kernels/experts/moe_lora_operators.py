"""The feed-forward of frozen experts with low-rank pairs on grouped Triton kernels, as a forward and a backward operator for torch.compile.

It computes what `torch_path.moe_lora_ffn` does, on assignments sorted by slot. Nothing waits for the device, and a layer has about a
dozen launches, whatever the number of experts. A layer keeps x and, for each assignment, the gate and up outputs and A x. Sums always
have the same order and use no atomics.

Ranks are padded to sizes that tensor cores multiply. The padded pairs of gate and up are adjacent, in copies that live for one pass only,
because the pairs themselves are replicas, which are freed and gathered between passes.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, S slots, P places of the sorted assignments, r rank, R as padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder, RoutedTokens, fake_order
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.dropout import Dropout, FfnDropout, RowDropout
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.common.launch_config import padded_rank
from hecate.kernels.common.low_rank import LowRankPairs, LowRankTerm, row_factors, scaled_rows, separate_gate_and_up
from hecate.kernels.common.operators import (
    DifferentiableOperator,
    Operator,
    gradients_of_pairs,
    keep_for_backward,
    kept_for_backward,
    pack_pairs,
    unpack_pairs,
)
from hecate.kernels.common.sorting import dropout_numbers, sorted_assignments, words_dropout, words_width
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
    numbers, key = dropout_numbers(dropout, routed) if frozen_S else ([], 0)
    y_TD, *_ = moe_lora_operator(
        routed.x_TD,
        routed.slot_TK,
        routed.weight_TK,
        list(frozen_S),
        shape.hidden,
        shape.ffn,
        shape.activation,
        *pack_pairs(separate_gate_and_up(pairs), dropout),
        0 if dropout is None else dropout.dropped_levels,
        numbers,
        key,
        routed.places,
    )
    return y_TD


def forward_passes(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    hidden: int,
    ffn: int,
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
    numbers: Sequence[Tensor],
    key: int,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, D], and for the backward pass gate and up of each assignment [P, 2F], its A x, dropout's words (`sorted_assignments`),
    and the order's tensors.

    Args:
        matrices, projections, scales, etas, trains_a: the results of `pack_pairs`.
        dropped_levels: of dropout; 0: nothing is dropped.
        numbers, key: the results of `dropout_numbers`.
        places: see `RoutedTokens`.
    """
    order, words = sorted_assignments(slot_TK, len(frozen_S), numbers, key, places)
    inputs, down_pair = _padded(unpack_pairs(matrices, projections, scales, etas), x_TD.dtype)
    if not frozen_S:
        gate_up_P, low_P = x_TD.new_empty((order.num_assignments, 2 * ffn)), x_TD.new_empty((order.num_assignments, _low_width(inputs)))
        return torch.zeros_like(x_TD), gate_up_P, low_P, words, *order.tensors()
    x_TD = x_TD.contiguous()
    gate_up, down = _frozen_weights(frozen_S, FfnShape(hidden, ffn, activation))
    drop_in, drop_down = _of_inputs(words_dropout(words, dropped_levels))
    if inputs is None:
        low_P = x_TD.new_empty((order.num_assignments, 0))
        gate_up_P = grouped_gemm(x_TD, gate_up, order, GemmOptions(gather=True))
    else:
        low_P = grouped_gemm(x_TD, stacked_weights(inputs.a), order, GemmOptions(gather=True, drop_x=drop_in))
        term = LowRankTerm(low_P, inputs.b)
        gate_up_P = grouped_gemm(x_TD, gate_up, order, GemmOptions(gather=True, halves=2, low_rank=term, scales=inputs.scales))
    h_PF = gate(gate_up_P, order, activation)
    if down_pair is None:
        y_PD = grouped_gemm(h_PF, down, order)
    else:
        low_h_P = grouped_gemm(h_PF, stacked_weights(down_pair.a), order, GemmOptions(drop_x=drop_down))
        y_PD = grouped_gemm(h_PF, down, order, GemmOptions(low_rank=LowRankTerm(low_h_P, down_pair.b), scales=down_pair.scales))
    return combine_assignments(y_PD, weight_TK.contiguous(), order), gate_up_P, low_P, words, *order.tensors()


moe_lora_forward = torch.library.custom_op("hecate::moe_lora_ffn", forward_passes, mutates_args=())


@moe_lora_forward.register_fake
def _(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    hidden: int,
    ffn: int,
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
    numbers: Sequence[Tensor],
    key: int,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = unpack_pairs(matrices, projections, scales, etas)
    ranks = [of.a_SrI.shape[1] for name, of in pairs.items() if name != "down_proj"]
    low = x_TD.new_empty((places, 2 * padded_rank(max(ranks)) if ranks else 0))
    words = slot_TK.new_empty((2, words_width(slot_TK.numel()) if numbers else 0), dtype=torch.int32)
    return (x_TD.new_empty(x_TD.shape), x_TD.new_empty((places, 2 * ffn)), low, words, *fake_order(slot_TK, len(frozen_S), places))


def backward_passes(
    dy_TD: Tensor,
    kept: Sequence[Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    hidden: int,
    ffn: int,
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
) -> list[Tensor]:
    """Return the gradients of x, of the weights and of `matrices` in their order.

    Args:
        kept: the results of the forward operator other than y.
        trains_a: whether A trains. Otherwise its gradients are left out.
    """
    if not frozen_S:
        return [torch.zeros_like(x_TD), torch.zeros_like(weight_TK), *(torch.zeros_like(matrix) for matrix in _trained(matrices, trains_a))]
    gate_up_P, low_P, words, *order_tensors = kept
    order = AssignmentOrder.of_tensors(order_tensors)
    pairs = unpack_pairs(matrices, projections, scales, etas)
    inputs, down_pair = _padded(pairs, x_TD.dtype)
    factors, scaled, of_a_down = _of_rule(pairs, x_TD.dtype) if any(etas) else ({}, inputs, down_pair)
    x_TD, dy_TD = x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _frozen_weights(frozen_S, FfnShape(hidden, ffn, activation))
    drop_in, drop_down = _of_inputs(words_dropout(words, dropped_levels))
    gradients = [matrix.new_empty(matrix.shape if trains_a or index % 2 else 0) for index, matrix in enumerate(matrices)]
    of = unpack_pairs(gradients, projections, scales, etas)

    dh_PF, low_dy_P = _hidden_gradient(dy_TD, down, down_pair, order, drop_down)
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(gate_up_P, dh_PF, weight_TK.contiguous(), order, activation)
    del dh_PF
    if down_pair is not None and low_dy_P is not None:
        da, db = of["down_proj"].a_SrI, of["down_proj"].b_SOr
        if trains_a:
            if of_a_down is not None and of_a_down is not down_pair:
                low_dy_P = _shrunk_gradient(dy_TD, of_a_down, order)
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
        da_in = torch.empty_like(inputs.a, dtype=matrices[0].dtype) if trains_a else None
        if da_in is not None:
            if scaled is not None and scaled is not inputs:
                of_a_P = grouped_gemm(dgate_up_P, stacked_weights(scaled.b), order, options)
            # One pass over x computes both.
            grouped_wgrad(of_a_P, x_TD, order, da_in, gather="right", drop_right=drop_in)
        for half, name in enumerate(_HALVES):
            if name in of:
                da, db = of[name].a_SrI, of[name].b_SOr
                span = slice(half * inputs.rank, half * inputs.rank + db.shape[2])
                if da_in is not None:
                    da.copy_(da_in[:, span])
                dout_PF = dgate_up_P[:, half * ffn : (half + 1) * ffn]
                grouped_wgrad(dout_PF, low_P[:, span], order, db, scale=inputs.scales[half])
    for name, factor_SO in factors.items():
        of[name].b_SOr.copy_(scaled_rows(of[name].b_SOr, factor_SO))
    return [combine_assignments(dx_PD, None, order), dweight_TK, *_trained(gradients, trains_a)]


def _trained(matrices: Sequence[Tensor], trains_a: bool) -> Sequence[Tensor]:
    return matrices if trains_a else matrices[1::2]


def _of_rule(
    pairs: dict[str, LowRankPairs], dtype: torch.dtype
) -> tuple[dict[str, Tensor | None], _PaddedPairs | None, _PaddedPairs | None]:
    """Return the factors of each pair's rows, and what `_padded` does with B scaled by them, from which A's gradients come."""
    factors = {name: row_factors(of.a_SrI, of.b_SOr, of.eta) for name, of in pairs.items()}
    return factors, *_padded({name: replace(of, b_SOr=scaled_rows(of.b_SOr, factors[name])) for name, of in pairs.items()}, dtype)


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


moe_lora_backward = torch.library.custom_op("hecate::moe_lora_ffn_backward", backward_passes, mutates_args=())


@moe_lora_backward.register_fake
def _(
    dy_TD: Tensor,
    kept: Sequence[Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    hidden: int,
    ffn: int,
    activation: str,
    matrices: Sequence[Tensor],
    projections: str,
    scales: Sequence[float],
    etas: Sequence[float],
    trains_a: bool,
    dropped_levels: int,
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x_TD, weight_TK, *_trained(matrices, trains_a))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, *rest, numbers, _, _ = inputs
    ctx.num_numbers = len(numbers)
    keep_for_backward(ctx, [list(output[1:]), x_TD, *rest])


def _gradients(backward: Callable[..., Any], ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    kept, *arguments = kept_for_backward(ctx)
    frozen_S, matrices = arguments[2], arguments[6]
    dx_TD, dweight_TK = None, None
    dmatrices: list[Tensor | None] = [None] * len(matrices)
    if dy_TD is not None:
        dx_TD, dweight_TK, *gradients = backward(dy_TD, kept, *arguments)
        dmatrices = gradients_of_pairs(gradients, of_a=arguments[10])
    # The gradient of an argument that is a list is a list.
    no_frozen, no_numbers = [None] * len(frozen_S), [None] * ctx.num_numbers
    return dx_TD, None, dweight_TK, no_frozen, None, None, None, dmatrices, None, None, None, None, None, no_numbers, None, None


moe_lora_operator = DifferentiableOperator(
    Operator(moe_lora_forward, forward_passes), Operator(moe_lora_backward, backward_passes), _setup, _gradients
)

_HALVES = ("gate_proj", "up_proj")
"""the halves of the gate and up outputs"""


@dataclass(frozen=True)
class _PaddedPairs:
    """Low-rank pairs that share their input, padded and side by side, in the type of the computation."""

    a: Tensor
    """[S, H·R, inputs]"""
    b: Tensor
    """[S, H·outputs, R]"""
    rank: int
    """R"""
    halves: int
    """H"""
    scales: tuple[float, float]


def _frozen_weights(frozen_S: Sequence[Tensor], shape: FfnShape) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = zip(*(shape.matrices(flat) for flat in frozen_S), strict=True)
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
    num_outputs = present[0].b_SOr.shape[1]
    a_SHRI = present[0].a_SrI.new_zeros((num_slots, len(pairs), rank, num_inputs), dtype=dtype)
    b_SHOR = present[0].a_SrI.new_zeros((num_slots, len(pairs), num_outputs, rank), dtype=dtype)
    for half, of in enumerate(pairs):
        if of is not None:
            a_SHRI[:, half, : of.a_SrI.shape[1]] = of.a_SrI
            b_SHOR[:, half, :, : of.a_SrI.shape[1]] = of.b_SOr
    first, *_, last = [0.0 if of is None else of.scale for of in pairs] * 2
    return _PaddedPairs(a_SHRI.flatten(1, 2), b_SHOR.flatten(1, 2), rank, len(pairs), (first, last))


def _low_width(inputs: _PaddedPairs | None) -> int:
    return 0 if inputs is None else 2 * inputs.rank
