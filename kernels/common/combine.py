"""Combine the results of the assignments: the weighted sum of each token's rows, in the order of its assignments.

Shapes: P places of the assignments sorted by slot (`AssignmentOrder`), T tokens, K assignments of a token, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, num_blocks

RULES = (
    Rule(LaunchConfig({"BM": 1, "BD": 1024}, num_warps=4, num_stages=1), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BD": 64}), min_sm=0),
)


# How many tokens there are changes from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    v,
    weight_TK,
    place_TK,
    base,
    y,
    num_tokens,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BASED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """y[t] = base[t] + sum_k weight[t, k] v[place[t, k]], assignments that are computed elsewhere (-1) left out."""
    o_t = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_t = o_t < num_tokens
    m_d = (o_d < D)[None, :]
    at = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    if BASED:
        acc = tl.load(base + at, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BM, BD), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        place_M = tl.load(place_TK + o_t * TOP_K + k, mask=m_t, other=-1)
        served = (place_M >= 0)[:, None]
        # [BM, BD]; a token's rows are added in the order of its assignments, so a sum has the same bits in every run.
        b_v = tl.load(v + place_M.to(tl.int64)[:, None] * D + o_d[None, :], mask=served & m_d, other=0.0).to(tl.float32)
        if WEIGHTED:
            b_v *= tl.load(weight_TK + o_t * TOP_K + k, mask=m_t, other=0.0).to(tl.float32)[:, None]
        acc += b_v
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=m_t[:, None] & m_d)


def combine_assignments(v_PD: Tensor, weight_TK: Tensor | None, order: AssignmentOrder, base_TD: Tensor | None = None) -> Tensor:
    """Return each token's weighted sum of its assignments' rows, plus `base_TD` if given, [T, D] of v's type.

    Without weights, rows are summed unweighted. Sums are in float32, in the order of the token's assignments. Not differentiable.
    """
    assert v_PD.is_contiguous()
    assert weight_TK is None or weight_TK.is_contiguous()
    assert base_TD is None or base_TD.is_contiguous()
    config = choose("combine", RULES, rank=0, itemsize=v_PD.element_size(), device=v_PD.device)
    num_tokens, top_k = order.place_TK.shape
    y_TD = v_PD.new_empty((num_tokens, v_PD.shape[1]))
    Launch.configured(
        kernel=combine_kernel,
        grid=(num_blocks(num_tokens, config.blocks["BM"]), num_blocks(v_PD.shape[1], config.blocks["BD"])),
        args={"v": v_PD, "weight_TK": weight_TK, "place_TK": order.place_TK, "base": base_TD, "y": y_TD, "num_tokens": num_tokens},
        constants={
            "D": v_PD.shape[1],
            "TOP_K": top_k,
            "WEIGHTED": weight_TK is not None,
            "BASED": base_TD is not None,
        },
        config=config,
    ).run()
    return y_TD
