"""The feed-forward of fully trained experts on grouped Triton kernels, as a forward and a backward operator for torch.compile.

It computes what `torch_path.full_ffn` does, on assignments sorted by slot. Nothing waits for the device, and a layer has about a dozen
launches, whatever the number of experts. A layer keeps x and the gate and up outputs of each assignment. Sums always have the same order
and use no atomics.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, S slots, C elements of an expert's chunk, P places of the sorted
assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder, RoutedTokens
from hecate.kernels.common.combine import combine_assignments
from hecate.kernels.common.ffn import FfnShape, gradient_dtype
from hecate.kernels.common.operands import Operands
from hecate.kernels.common.operators import DifferentiableOperator
from hecate.kernels.common.sorting import Unsorted, sorted_assignments
from hecate.kernels.experts.gated import gate, gate_backward
from hecate.kernels.experts.grouped_gemm import GemmOptions, grouped_gemm
from hecate.kernels.experts.grouped_wgrad import grouped_wgrad
from hecate.kernels.experts.slot_weights import SlotWeights, stacked_weights


def full_ffn_triton(routed: RoutedTokens, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """As `torch_path.full_ffn`, in float32, bfloat16 or float16; differentiable once."""
    return full_operator(FullCall(routed.x_TD, routed.weight_TK, experts_SC, shape), Unsorted.of(routed))


@dataclass(frozen=True)
class FullCall(Operands):
    """What both passes take."""

    x_TD: Tensor
    weight_TK: Tensor
    experts_SC: Tensor
    shape: FfnShape


@dataclass(frozen=True)
class FullKept(Operands):
    """What the forward pass keeps for the backward pass."""

    gate_up_P: Tensor
    """[P, 2F], the gate and up outputs of each assignment"""
    order: AssignmentOrder


def _forward(call: FullCall, unsorted: Unsorted) -> tuple[Tensor, FullKept]:
    order, _ = sorted_assignments(unsorted, call.experts_SC.shape[0])
    gate_up, down = _expert_weights(call)
    gate_up_P = grouped_gemm(call.x_TD.contiguous(), gate_up, order, GemmOptions(gather=True))
    y_PD = grouped_gemm(gate(gate_up_P, order, call.shape.activation), down, order)
    return combine_assignments(y_PD, call.weight_TK.contiguous(), order), FullKept(gate_up_P, order)


def _backward(dy_TD: Tensor, call: FullCall, kept: FullKept) -> list[Tensor]:
    """Return the gradients of x, of the weights and of the experts, these in float32 at least."""
    order, experts_SC = kept.order, call.experts_SC
    x_TD, dy_TD = call.x_TD.contiguous(), dy_TD.contiguous()
    gate_up, down = _expert_weights(call)
    dexperts_SC = experts_SC.new_empty(experts_SC.shape, dtype=gradient_dtype(experts_SC))
    dgate_up_S, ddown_S = call.shape.stacked_matrices(dexperts_SC)
    dh_PF = grouped_gemm(dy_TD, down, order, GemmOptions(gather=True, transposed=True))
    dgate_up_P, weighted_h_PF, dweight_TK = gate_backward(kept.gate_up_P, dh_PF, call.weight_TK.contiguous(), order, call.shape.activation)
    grouped_wgrad(dy_TD, weighted_h_PF, order, ddown_S, gather="left")
    grouped_wgrad(dgate_up_P, x_TD, order, dgate_up_S, gather="right")
    dx_PD = grouped_gemm(dgate_up_P, gate_up, order, GemmOptions(transposed=True))
    return [combine_assignments(dx_PD, None, order), dweight_TK, dexperts_SC]


def _gradients(call: FullCall, found: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("x_TD", "weight_TK", "experts_SC"), found, strict=True))


full_operator = DifferentiableOperator("full_ffn", _forward, _backward, _gradients)


def _expert_weights(call: FullCall) -> tuple[SlotWeights, SlotWeights]:
    gate_up_S, down_S = call.shape.stacked_matrices(call.experts_SC.to(call.x_TD.dtype))
    return stacked_weights(gate_up_S), stacked_weights(down_S)
