"""The feed-forward of frozen experts under LoRA pairs as two operators that torch.compile takes as they are: forward and backward.

Ranks are padded to what tensor cores multiply, and the pairs of gate and up lie side by side, in copies that last one pass: the pairs
themselves are the experts' replicas, which come and go between passes.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, P pairs sorted by slot, r rank, R as padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.combine import combine
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.full_ops import fake_order
from hecate.kernels.gated import gate, gate_backward
from hecate.kernels.grouped_gemm import LowRank, RowDropout, grouped_gemm
from hecate.kernels.grouped_wgrad import grouped_wgrad
from hecate.kernels.launch_config import padded_rank
from hecate.kernels.pair_order import PairOrder, pair_order
from hecate.kernels.slot_weights import SlotWeights, separate_weights, stacked_weights


@dataclass(frozen=True)
class _Pairs:
    """LoRA pairs that share their input, padded and side by side, in the type that is computed in."""

    a: Tensor
    """[S, H·R, inputs]"""
    b: Tensor
    """[S, H·outputs, R]"""
    rank: int
    """R"""
    halves: int
    """H"""
    scales: tuple[float, float]


@torch.library.custom_op("hecate::lora_experts", mutates_args=())
def lora_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    pairs: Sequence[Tensor],
    frozen_S: Sequence[Tensor],
    keep_in_TK: Tensor | None,
    keep_down_TK: Tensor | None,
    has_gate: bool,
    has_up: bool,
    has_down: bool,
    scales: Sequence[float],
    dropped_levels: int,
    hidden: int,
    ffn: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], and what the backward pass needs: gate and up of each pair [P, 2F], its shrunk x, the four tensors of the `PairOrder`.

    Args:
        pairs: A [S, r, inputs] and B [S, outputs, r] of each projection that has an adapter, in the order gate, up, down.
        keep_in_TK, keep_down_TK: of dropout, the words of each pair's row (`Dropout.rows`) as input of gate and up, and of down; int32.
        scales: of gate, up and down, dropout's included.
    """
    order = pair_order(slot_TK, len(frozen_S))
    inputs, down_pair = _padded(pairs, (has_gate, has_up, has_down), scales, x_TD.dtype)
    if not frozen_S:
        gate_up_P, low_P = x_TD.new_empty((order.num_pairs, 2 * ffn)), x_TD.new_empty((order.num_pairs, _low_width(inputs)))
        return torch.zeros_like(x_TD), gate_up_P, low_P, order.order_P, order.token_P, order.place_TK, order.starts
    x_TD = x_TD.contiguous()
    gate_up, down = _matrices(frozen_S, FfnShape(hidden, ffn, activation))
    drop_in, drop_down = _dropped(keep_in_TK, order, dropped_levels), _dropped(keep_down_TK, order, dropped_levels)
    if inputs is None:
        low_P = x_TD.new_empty((order.num_pairs, 0))
        gate_up_P = grouped_gemm(x_TD, gate_up, order, gather=True)
    else:
        low_P = grouped_gemm(x_TD, stacked_weights(inputs.a), order, gather=True, drop_x=drop_in)
        lora = LowRank(low_P, inputs.b, inputs.rank, inputs.scales)
        gate_up_P = grouped_gemm(x_TD, gate_up, order, gather=True, halves=2, lora=lora)
    h_PF = gate(gate_up_P, order, activation)
    if down_pair is None:
        y_PD = grouped_gemm(h_PF, down, order)
    else:
        low_h_P = grouped_gemm(h_PF, stacked_weights(down_pair.a), order, drop_x=drop_down)
        y_PD = grouped_gemm(h_PF, down, order, lora=LowRank(low_h_P, down_pair.b, down_pair.rank, down_pair.scales))
    y_TD = combine(y_PD, weight_TK.contiguous(), order)
    return y_TD, gate_up_P, low_P, order.order_P, order.token_P, order.place_TK, order.starts


@lora_experts.register_fake
def _(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    pairs: Sequence[Tensor],
    frozen_S: Sequence[Tensor],
    keep_in_TK: Tensor | None,
    keep_down_TK: Tensor | None,
    has_gate: bool,
    has_up: bool,
    has_down: bool,
    scales: Sequence[float],
    dropped_levels: int,
    hidden: int,
    ffn: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_pairs = slot_TK.numel()
    ranks = [pairs[2 * index].shape[1] for index in range(has_gate + has_up)]
    low = x_TD.new_empty((num_pairs, 2 * padded_rank(max(ranks)) if ranks else 0))
    return (x_TD.new_empty(x_TD.shape), x_TD.new_empty((num_pairs, 2 * ffn)), low, *fake_order(slot_TK, len(frozen_S)))


@torch.library.custom_op("hecate::lora_experts_backward", mutates_args=())
def lora_experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    pairs: Sequence[Tensor],
    frozen_S: Sequence[Tensor],
    keep_in_TK: Tensor | None,
    keep_down_TK: Tensor | None,
    gate_up_P: Tensor,
    low_P: Tensor,
    order_P: Tensor,
    token_P: Tensor,
    place_TK: Tensor,
    starts: Tensor,
    has_gate: bool,
    has_up: bool,
    has_down: bool,
    scales: Sequence[float],
    dropped_levels: int,
    hidden: int,
    ffn: int,
    activation: str,
) -> list[Tensor]:
    """The gradients of x, of the weights and of the pairs in their order."""
    if not frozen_S:
        return [torch.zeros_like(x_TD), torch.zeros_like(weight_TK), *(torch.zeros_like(pair) for pair in pairs)]
    order = PairOrder(order_P, token_P, place_TK, starts)
    inputs, down_pair = _padded(pairs, (has_gate, has_up, has_down), scales, x_TD.dtype)
    x_TD, dy_TD = x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _matrices(frozen_S, FfnShape(hidden, ffn, activation))
    drop_in, drop_down = _dropped(keep_in_TK, order, dropped_levels), _dropped(keep_down_TK, order, dropped_levels)
    gradients = [pair.new_empty(pair.shape) for pair in pairs]

    if down_pair is None:
        dh_PF = grouped_gemm(dy_TD, down, order, gather=True, transposed=True)
    else:
        low_dy_P = grouped_gemm(dy_TD, stacked_weights(down_pair.b), order, gather=True, transposed=True, scales=down_pair.scales)
        lora = LowRank(low_dy_P, down_pair.a, down_pair.rank)
        dh_PF = grouped_gemm(dy_TD, down, order, gather=True, transposed=True, lora=lora, drop_low=drop_down)
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(gate_up_P, dh_PF, weight_TK.contiguous(), order, activation)
    del dh_PF
    if down_pair is not None:
        da, db = gradients[-2:]
        grouped_wgrad(low_dy_P[:, : da.shape[1]], weighted_h_PF, order, da, drop_right=drop_down)
        low_h_P = grouped_gemm(weighted_h_PF, stacked_weights(down_pair.a), order, drop_x=drop_down, scales=down_pair.scales)
        grouped_wgrad(dy_TD, low_h_P[:, : db.shape[2]], order, db, gather_left=True)
    del weighted_h_PF

    if inputs is None:
        dx_PD = grouped_gemm(dgate_up_P, gate_up, order, transposed=True)
    else:
        b = stacked_weights(inputs.b)
        dlow_P = grouped_gemm(dgate_up_P, b, order, transposed=True, halves=2, scales=inputs.scales)
        lora = LowRank(dlow_P, inputs.a, 2 * inputs.rank)
        dx_PD = grouped_gemm(dgate_up_P, gate_up, order, transposed=True, lora=lora, drop_low=drop_in)
        # One pass over x for both.
        da_in = grouped_wgrad(dlow_P, x_TD, order, torch.empty_like(inputs.a, dtype=pairs[0].dtype), gather_right=True, drop_right=drop_in)
        halves = [half for half, there in enumerate((has_gate, has_up)) if there]
        for half, da, db in zip(halves, gradients[0::2], gradients[1::2], strict=False):
            rank = da.shape[1]
            start = half * inputs.rank
            da.copy_(da_in[:, start : start + rank])
            dout_PF = dgate_up_P[:, half * ffn : (half + 1) * ffn]
            grouped_wgrad(dout_PF, low_P[:, start : start + rank], order, db, scale=inputs.scales[half])
    return [combine(dx_PD, None, order), dweight_TK, *gradients]


@lora_experts_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, weight_TK: Tensor, pairs: Sequence[Tensor], frozen_S: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x_TD, weight_TK, *pairs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, pairs, frozen_S, keep_in_TK, keep_down_TK, *ctx.options = inputs
    # Without this, a missing gradient of what is only kept would be made up of zeros.
    ctx.set_materialize_grads(False)
    ctx.num_pairs, ctx.num_slots = len(pairs), len(frozen_S)
    ctx.save_for_backward(x_TD, weight_TK, *pairs, *frozen_S, keep_in_TK, keep_down_TK, *output[1:])


def _backward(ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    num_pairs, num_slots = ctx.num_pairs, ctx.num_slots
    if dy_TD is None:
        return (None, None, None, [None] * num_pairs, [None] * num_slots, *[None] * (2 + len(ctx.options)))
    x_TD, weight_TK, *rest = ctx.saved_tensors
    pairs, frozen_S, kept = rest[:num_pairs], rest[num_pairs : num_pairs + num_slots], rest[num_pairs + num_slots :]
    dx_TD, dweight_TK, *dpairs = lora_experts_backward(dy_TD, x_TD, weight_TK, pairs, frozen_S, *kept, *ctx.options)
    return (dx_TD, None, dweight_TK, dpairs, [None] * num_slots, *[None] * (2 + len(ctx.options)))


lora_experts.register_autograd(_backward, setup_context=_setup)


def _matrices(frozen_S: Sequence[Tensor], shape: FfnShape) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = zip(*(shape.matrices(flat) for flat in frozen_S), strict=True)
    return separate_weights(gate_up_S), separate_weights(down_S)


def _dropped(keep_TK: Tensor | None, order: PairOrder, dropped_levels: int) -> RowDropout | None:
    return None if keep_TK is None else RowDropout(dropped_levels, keep_TK.flatten()[order.order_P])


def _padded(
    pairs: Sequence[Tensor], has: tuple[bool, bool, bool], scales: Sequence[float], dtype: torch.dtype
) -> tuple[_Pairs | None, _Pairs | None]:
    """Those of gate and up, and that of down; None without any."""
    of: list[tuple[Tensor, Tensor] | None] = []
    left = list(pairs)
    for there in has:
        of.append((left.pop(0), left.pop(0)) if there else None)
    gate_scale, up_scale, down_scale = scales
    return _side_by_side(of[:2], (gate_scale, up_scale), dtype), _side_by_side(of[2:], (down_scale, down_scale), dtype)


def _side_by_side(of: Sequence[tuple[Tensor, Tensor] | None], scales: tuple[float, float], dtype: torch.dtype) -> _Pairs | None:
    there = [pair for pair in of if pair is not None]
    if not there:
        return None
    rank = padded_rank(max(a.shape[1] for a, _ in there))
    num_slots, _, num_inputs = there[0][0].shape
    num_outputs = there[0][1].shape[1]
    a_SHRI = there[0][0].new_zeros((num_slots, len(of), rank, num_inputs), dtype=dtype)
    b_SHOR = there[0][0].new_zeros((num_slots, len(of), num_outputs, rank), dtype=dtype)
    for half, pair in enumerate(of):
        if pair is not None:
            a_SrI, b_SOr = pair
            a_SHRI[:, half, : a_SrI.shape[1]] = a_SrI
            b_SHOR[:, half, :, : a_SrI.shape[1]] = b_SOr
    return _Pairs(a_SHRI.flatten(1, 2), b_SHOR.flatten(1, 2), rank, len(of), scales)


def _low_width(inputs: _Pairs | None) -> int:
    return 0 if inputs is None else 2 * inputs.rank
