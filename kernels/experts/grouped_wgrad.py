"""The gradients of per-slot weights: dW_s is the sum over the slot's assignments of the outer products of two rows.

Each program computes one tile of the result and adds its slot's rows in their order, so the result is deterministic and needs no atomics.
A slot without assignments gets zeros.

Shapes: P places of the sorted assignments (`AssignmentOrder`), S slots, N x K a slot's gradient, M rows of a step.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.device_functions import dropout_keep
from hecate.kernels.common.dropout import RowDropout
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import NARROW, LaunchConfig, Rule, choose, num_blocks

RULES = (
    Rule(LaunchConfig({"BN": 128, "BK": 256, "BM": 64}, num_warps=8, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BN": 128, "BK": 128, "BM": 32}, num_warps=8, num_stages=4), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BN": 64, "BK": 64, "BM": 16}, num_warps=4, num_stages=3), min_sm=80),
    Rule(LaunchConfig({"BN": 32, "BK": 32, "BM": 16}), min_sm=0),
)


@triton.jit
def grouped_wgrad_kernel(
    left,
    left_token_P,
    right,
    right_token_P,
    keep_P,
    out,
    starts,
    stride_left,
    stride_right,
    stride_out_slot,
    stride_out,
    scale,
    dropped_levels,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    DROP_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
):
    """out[slot] [N, K] = scale · sum over the slot's p of left[row(p)] [N] x right[row(p)] [K]."""
    blocks_n: tl.constexpr = (N + BN - 1) // BN
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    # A slot's programs are neighbours, and read its rows at the same time.
    i = tl.program_id(0)
    k0 = i % blocks_k * BK
    n0 = i // blocks_k % blocks_n * BN
    slot = i // (blocks_k * blocks_n)
    start = tl.load(starts + slot)
    end = tl.load(starts + slot + 1)
    out += slot.to(tl.int64) * stride_out_slot

    o_n = n0 + tl.arange(0, BN)
    o_k = k0 + tl.arange(0, BK)
    m_n = o_n < N
    m_k = o_k < K
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for row in range(start, end, BM):
        o_m = row + tl.arange(0, BM)
        m_m = o_m < end
        if GATHER_LEFT:
            left_M = tl.load(left_token_P + o_m, mask=m_m, other=0).to(tl.int64)
        else:
            left_M = o_m.to(tl.int64)
        if GATHER_RIGHT:
            right_M = tl.load(right_token_P + o_m, mask=m_m, other=0).to(tl.int64)
        else:
            right_M = o_m.to(tl.int64)
        # [BM, BN] and [BM, BK]; rows behind the slot's last are zeros, which add nothing to the sum over rows.
        b_left = tl.load(left + left_M[:, None] * stride_left + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_right = tl.load(right + right_M[:, None] * stride_right + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROP_RIGHT:
            keep_M = tl.load(keep_P + o_m, mask=m_m, other=0)
            b_right = tl.where(dropout_keep(keep_M, o_k, dropped_levels), b_right, 0.0)
        acc = tl.dot(tl.trans(b_left), b_right, acc, input_precision=PRECISION)  # [BN, BM] x [BM, BK]
    acc *= scale
    p_out = out + o_n.to(tl.int64)[:, None] * stride_out + o_k[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


def grouped_wgrad(
    left: Tensor,
    right: Tensor,
    order: AssignmentOrder,
    out_SNK: Tensor,
    *,
    gather: Literal["left", "right"] | None = None,
    scale: float = 1.0,
    drop_right: RowDropout | None = None,
) -> Tensor:
    """Write each slot's sum of the outer products of its assignments' rows into `out_SNK`, and return it.

    Args:
        left: [P, N] with contiguous rows.
        right: [P, K] with contiguous rows.
        gather: the operand that is [T, ...], of which each assignment uses its token's row.
        out_SNK: [S, N, K] of any type and strides; the last stride is 1.
        drop_right: the dropout of the right operand, without its scale.
    """
    assert all(operand.stride(-1) == 1 or operand.shape[-1] == 1 for operand in (left, right, out_SNK))
    assert left.dtype == right.dtype
    num_slots, rows, columns = out_SNK.shape
    assert (left.shape[1], right.shape[1]) == (rows, columns), (left.shape, right.shape, out_SNK.shape)
    name = f"grouped_wgrad{'' if min(rows, columns) > NARROW else '_narrow'}"
    config = choose(name, RULES, rank=0, itemsize=left.element_size(), device=left.device)
    blocks = dict(config.blocks)
    blocks["BN"] = min(blocks["BN"], max(16, triton.next_power_of_2(rows)))
    blocks["BK"] = min(blocks["BK"], max(16, triton.next_power_of_2(columns)))
    Launch(
        kernel=grouped_wgrad_kernel,
        grid=(num_slots * num_blocks(rows, blocks["BN"]) * num_blocks(columns, blocks["BK"]),),
        args={
            "left": left,
            "left_token_P": order.token_P if gather == "left" else None,
            "right": right,
            "right_token_P": order.token_P if gather == "right" else None,
            "keep_P": None if drop_right is None else drop_right.word_R,
            "out": out_SNK,
            "starts": order.starts,
            "stride_left": left.stride(0),
            "stride_right": right.stride(0),
            "stride_out_slot": out_SNK.stride(0),
            "stride_out": out_SNK.stride(1),
            "scale": scale,
            "dropped_levels": 0 if drop_right is None else drop_right.dropped_levels,
        },
        constants={
            "N": rows,
            "K": columns,
            "GATHER_LEFT": gather == "left",
            "GATHER_RIGHT": gather == "right",
            "DROP_RIGHT": drop_right is not None,
            "PRECISION": "ieee" if left.dtype == torch.float32 else "tf32",
            **blocks,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    ).run()
    return out_SNK
