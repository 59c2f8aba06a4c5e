"""The feed-forward of fully trained experts on grouped Triton kernels, as a forward and a backward operator for torch.compile.

It computes what `torch_path.full_ffn` does, on assignments sorted by slot. Nothing waits for the device, and a layer has about a dozen
launches, whatever the number of experts. A layer keeps x and the gate and up outputs of each assignment. Sums always have the same order
and use no atomics.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, S slots, C elements of an expert's chunk, P places of the sorted
assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder, RoutedTokens, fake_order
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.ffn import FfnShape, gradient_dtype
from hecate.kernels.common.operators import DifferentiableOperator, Operator, keep_for_backward, kept_for_backward
from hecate.kernels.common.sorting import sorted_assignments
from hecate.kernels.experts.gated import gate, gate_backward
from hecate.kernels.experts.grouped_gemm import GemmOptions, grouped_gemm
from hecate.kernels.experts.grouped_wgrad import grouped_wgrad
from hecate.kernels.experts.slot_weights import SlotWeights, stacked_weights


def full_ffn_triton(routed: RoutedTokens, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """As `torch_path.full_ffn`, in float32, bfloat16 or float16; differentiable once."""
    sizes = shape.hidden, shape.ffn, shape.activation
    y_TD, *_ = full_operator(routed.x_TD, routed.slot_TK, routed.weight_TK, experts_SC, *sizes, routed.places)
    return y_TD


def forward_passes(
    x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, hidden: int, ffn: int, activation: str, places: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, D], and for the backward pass gate and up of each assignment [P, 2F] and the four tensors of the `AssignmentOrder`."""
    order, _ = sorted_assignments(slot_TK, len(experts_SC), places=places)
    gate_up, down = _expert_weights(experts_SC, x_TD.dtype, FfnShape(hidden, ffn, activation))
    gate_up_P = grouped_gemm(x_TD.contiguous(), gate_up, order, GemmOptions(gather=True))
    y_PD = grouped_gemm(gate(gate_up_P, order, activation), down, order)
    return combine_assignments(y_PD, weight_TK.contiguous(), order), gate_up_P, *order.tensors()


full_forward = torch.library.custom_op("hecate::full_ffn", forward_passes, mutates_args=())


@full_forward.register_fake
def _(
    x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, hidden: int, ffn: int, activation: str, places: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (x_TD.new_empty(x_TD.shape), x_TD.new_empty((places, 2 * ffn)), *fake_order(slot_TK, experts_SC.shape[0], places))


def backward_passes(
    dy_TD: Tensor,
    kept: Sequence[Tensor],
    x_TD: Tensor,
    weight_TK: Tensor,
    experts_SC: Tensor,
    hidden: int,
    ffn: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the weights and of the experts, these in float32 at least.

    Args:
        kept: the results of the forward operator other than y.
    """
    gate_up_P, *order_tensors = kept
    order = AssignmentOrder.of_tensors(order_tensors)
    shape = FfnShape(hidden, ffn, activation)
    x_TD, dy_TD = x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _expert_weights(experts_SC, x_TD.dtype, shape)
    dexperts_SC = experts_SC.new_empty(experts_SC.shape, dtype=gradient_dtype(experts_SC))
    dgate_up_S, ddown_S = shape.stacked_matrices(dexperts_SC)
    dh_PF = grouped_gemm(dy_TD, down, order, GemmOptions(gather=True, transposed=True))
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(gate_up_P, dh_PF, weight_TK.contiguous(), order, activation)
    grouped_wgrad(dy_TD, weighted_h_PF, order, ddown_S, gather="left")
    grouped_wgrad(dgate_up_P, x_TD, order, dgate_up_S, gather="right")
    dx_PD = grouped_gemm(dgate_up_P, gate_up, order, GemmOptions(transposed=True))
    return combine_assignments(dx_PD, None, order), dweight_TK, dexperts_SC


full_backward = torch.library.custom_op("hecate::full_ffn_backward", backward_passes, mutates_args=())


@full_backward.register_fake
def _(
    dy_TD: Tensor, kept: Sequence[Tensor], x_TD: Tensor, weight_TK: Tensor, experts_SC: Tensor, hidden: int, ffn: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_TK.new_empty(weight_TK.shape), torch.empty_like(experts_SC, dtype=gradient_dtype(experts_SC))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, *rest, _ = inputs
    keep_for_backward(ctx, [list(output[1:]), x_TD, *rest])


def _gradients(backward: Callable[..., Any], ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 8
    dx_TD, dweight_TK, dexperts_SC = backward(dy_TD, *kept_for_backward(ctx))
    return dx_TD, None, dweight_TK, dexperts_SC, None, None, None, None


full_operator = DifferentiableOperator(Operator(full_forward, forward_passes), Operator(full_backward, backward_passes), _setup, _gradients)


def _expert_weights(experts_SC: Tensor, dtype: torch.dtype, shape: FfnShape) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = shape.stacked_matrices(experts_SC.to(dtype))
    return stacked_weights(gate_up_S), stacked_weights(down_S)
