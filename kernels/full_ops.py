"""The feed-forward of trained experts as two operators that torch.compile takes as they are: forward and backward.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, C elements of an expert's chunk, P pairs sorted by slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecate.kernels.combine import combine
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.gated import gate, gate_backward
from hecate.kernels.grouped_gemm import grouped_gemm
from hecate.kernels.grouped_wgrad import grouped_wgrad
from hecate.kernels.pair_order import PairOrder, pair_order
from hecate.kernels.slot_weights import SlotWeights, stacked_weights


@torch.library.custom_op("hecate::full_experts", mutates_args=())
def full_experts(
    x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, hidden: int, ffn: int, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], and what the backward pass needs: gate and up of each pair [P, 2F], and the four tensors of the `PairOrder`."""
    order = pair_order(slot_TK, len(experts_SC))
    gate_up, down = _matrices(experts_SC, x_TD.dtype, FfnShape(hidden, ffn, activation))
    gate_up_P = grouped_gemm(x_TD.contiguous(), gate_up, order, gather=True)
    y_PD = grouped_gemm(gate(gate_up_P, order, activation), down, order)
    return combine(y_PD, weight_TK.contiguous(), order), gate_up_P, order.order_P, order.token_P, order.place_TK, order.starts


@full_experts.register_fake
def _(
    x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, hidden: int, ffn: int, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (x_TD.new_empty(x_TD.shape), x_TD.new_empty((slot_TK.numel(), 2 * ffn)), *fake_order(slot_TK, experts_SC.shape[0]))


@torch.library.custom_op("hecate::full_experts_backward", mutates_args=())
def full_experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    experts_SC: Tensor,
    gate_up_P: Tensor,
    order_P: Tensor,
    token_P: Tensor,
    place_TK: Tensor,
    starts: Tensor,
    hidden: int,
    ffn: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the weights and of the experts."""
    order = PairOrder(order_P, token_P, place_TK, starts)
    shape = FfnShape(hidden, ffn, activation)
    x_TD, dy_TD = x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _matrices(experts_SC, x_TD.dtype, shape)
    dexperts_SC = experts_SC.new_empty(experts_SC.shape)
    dgate_up_S, ddown_S = shape.stacked_matrices(dexperts_SC)
    dh_PF = grouped_gemm(dy_TD, down, order, gather=True, transposed=True)
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(gate_up_P, dh_PF, weight_TK.contiguous(), order, activation)
    grouped_wgrad(dy_TD, weighted_h_PF, order, ddown_S, gather_left=True)
    grouped_wgrad(dgate_up_P, x_TD, order, dgate_up_S, gather_right=True)
    dx_PD = grouped_gemm(dgate_up_P, gate_up, order, transposed=True)
    return combine(dx_PD, None, order), dweight_TK, dexperts_SC


@full_experts_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    experts_SC: Tensor,
    gate_up_P: Tensor,
    order_P: Tensor,
    token_P: Tensor,
    place_TK: Tensor,
    starts: Tensor,
    hidden: int,
    ffn: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_TK.new_empty(weight_TK.shape), experts_SC.new_empty(experts_SC.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, experts_SC, *ctx.shape = inputs
    # Without this, a missing gradient of what is only kept would be made up of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_TK, experts_SC, *output[1:])


def _backward(ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 7
    dx_TD, dweight_TK, dexperts_SC = full_experts_backward(dy_TD, *ctx.saved_tensors, *ctx.shape)
    return dx_TD, None, dweight_TK, dexperts_SC, None, None, None


full_experts.register_autograd(_backward, setup_context=_setup)


def fake_order(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes and types of a `PairOrder`'s."""
    num_pairs = slot_TK.numel()
    return (
        slot_TK.new_empty(num_pairs, dtype=torch.int64),
        slot_TK.new_empty(num_pairs, dtype=torch.int32),
        slot_TK.new_empty(slot_TK.shape, dtype=torch.int32),
        slot_TK.new_empty(num_slots + 1, dtype=torch.int32),
    )


def _matrices(experts_SC: Tensor, dtype: torch.dtype, shape: FfnShape) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = shape.stacked_matrices(experts_SC.to(dtype))
    return stacked_weights(gate_up_S), stacked_weights(down_S)
