"""The gating of a feed-forward, act(gate) · up, and its backward pass over sorted assignments. Both are bound by memory bandwidth.

Shapes: P places of the assignments sorted by slot, F ffn hidden, T tokens, K assignments of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.device_functions import activate, activate_with_derivative
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, num_blocks

RULES = (
    Rule(LaunchConfig({"BM": 2, "BF": 512}, num_warps=4, num_stages=1), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BF": 64}), min_sm=0),
)


# How many slots there are changes with placements, and must not compile anew.
@triton.jit(do_not_specialize=["num_slots"])
def gate_kernel(gate_up, h, starts, num_slots, F: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """h[p] = act(gate[p]) · up[p] of the assignments that are computed on this rank."""
    num_served = tl.load(starts + num_slots)  # known on the device alone: the grid is for all places, and the rest is masked
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (o_m < num_served)[:, None] & (o_f < F)[None, :]
    at = o_m.to(tl.int64)[:, None] * (2 * F) + o_f[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=mask, other=0.0).to(tl.float32)
    value = activate(gate, ACTIVATION) * up
    tl.store(h + o_m.to(tl.int64)[:, None] * F + o_f[None, :], value.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_slots"])
def gate_backward_kernel(
    gate_up,
    dh,
    weight_TK,
    order_P,
    starts,
    dgate_up,
    weighted_h,
    dweight_TK,
    num_slots,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
):
    """Gradients of gate and up, w · h, and dw = <dh, h> of each assignment; w is its weight, dh the gradient of h before weighting."""
    num_served = tl.load(starts + num_slots)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < num_served
    assignment_M = tl.load(order_P + o_m, mask=m_m, other=0)
    w = tl.load(weight_TK + assignment_M, mask=m_m, other=0.0).to(tl.float32)[:, None]
    row = o_m.to(tl.int64)[:, None]
    # One program goes over all columns of its rows, so dw is summed in one order, without atomics.
    dweight_M = tl.zeros((BM,), dtype=tl.float32)
    for f0 in range(0, F, BF):
        o_f = f0 + tl.arange(0, BF)[None, :]
        mask = m_m[:, None] & (o_f < F)
        gate = tl.load(gate_up + row * (2 * F) + o_f, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * (2 * F) + F + o_f, mask=mask, other=0.0).to(tl.float32)
        b_dh = tl.load(dh + row * F + o_f, mask=mask, other=0.0).to(tl.float32)
        act, derivative = activate_with_derivative(gate, ACTIVATION)
        dweight_M += tl.sum(b_dh * act * up, axis=1)  # before dh is weighted: dw is <dh, h> of the unweighted gradient
        b_dh *= w
        tl.store(dgate_up + row * (2 * F) + o_f, (b_dh * up * derivative).to(dgate_up.dtype.element_ty), mask=mask)
        tl.store(dgate_up + row * (2 * F) + F + o_f, (b_dh * act).to(dgate_up.dtype.element_ty), mask=mask)
        tl.store(weighted_h + row * F + o_f, (w * act * up).to(weighted_h.dtype.element_ty), mask=mask)
    tl.store(dweight_TK + assignment_M, dweight_M.to(dweight_TK.dtype.element_ty), mask=m_m)


def gate(gate_up_P: Tensor, order: AssignmentOrder, activation: str) -> Tensor:
    """Return act(gate) · up, [P, F], from [P, 2F] with gate before up. Rows of assignments that other ranks compute are not written."""
    assert gate_up_P.is_contiguous()
    h_PF = gate_up_P.new_empty((gate_up_P.shape[0], gate_up_P.shape[1] // 2))
    config = choose("gate", RULES, rank=0, itemsize=gate_up_P.element_size(), device=gate_up_P.device)
    num_assignments, width = h_PF.shape
    Launch.configured(
        kernel=gate_kernel,
        grid=(num_blocks(num_assignments, config.blocks["BM"]), num_blocks(width, config.blocks["BF"])),
        args={"gate_up": gate_up_P, "h": h_PF, "starts": order.starts, "num_slots": order.num_slots},
        constants={
            "F": width,
            "ACTIVATION": activation,
        },
        config=config,
    ).run()
    return h_PF


def gate_backward(
    gate_up_P: Tensor, dh_PF: Tensor, weight_TK: Tensor, order: AssignmentOrder, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward pass of sum_p w_p <dh_p, act(gate_p) · up_p>, computing h again because it was not kept.

    Args:
        dh_PF: [P, F], the gradient of each assignment's h before the router's weight.
        weight_TK: [T, K], contiguous.

    Returns:
        [P, 2F] the gradients of gate and up; [P, F] w · h; [T, K] the gradient of the weights. For assignments that other ranks compute,
        the last is zero, and the rows of the other two are not written.
    """
    assert all(tensor.is_contiguous() for tensor in (gate_up_P, dh_PF, weight_TK))
    dgate_up_P, weighted_h_PF = torch.empty_like(gate_up_P), torch.empty_like(dh_PF)
    dweight_TK = torch.zeros_like(weight_TK)
    config = choose("gate_backward", RULES, rank=0, itemsize=gate_up_P.element_size(), device=gate_up_P.device)
    num_assignments, width = dh_PF.shape
    Launch.configured(
        kernel=gate_backward_kernel,
        grid=(num_blocks(num_assignments, config.blocks["BM"]),),
        args={
            "gate_up": gate_up_P,
            "dh": dh_PF,
            "weight_TK": weight_TK,
            "order_P": order.order_P,
            "starts": order.starts,
            "dgate_up": dgate_up_P,
            "weighted_h": weighted_h_PF,
            "dweight_TK": dweight_TK,
            "num_slots": order.num_slots,
        },
        constants={
            "F": width,
            "ACTIVATION": activation,
        },
        config=config,
    ).run()
    return dgate_up_P, weighted_h_PF, dweight_TK
