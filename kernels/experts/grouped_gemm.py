"""A grouped GEMM: rows sorted by slot, each multiplied by its slot's weights, plus a low-rank term.

One kernel computes every product of an expert's feed-forward whose result has a row for each assignment: the forward products, the
transposed ones for the gradients of inputs, and the narrow ones with A of a low-rank pair. Each program computes one tile of the result
and sums in a fixed order. A result may have two halves (gate and up), each with its own part of the inputs, weights and low-rank columns.

Shapes: P places of the sorted assignments (`AssignmentOrder`), S slots, N outputs and K inputs of a half, R rank as padded, H halves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.device_functions import dropout_keep
from hecate.kernels.common.dropout import RowDropout
from hecate.kernels.common.kernel_launch import Launch, begins_aligned
from hecate.kernels.common.launch_config import NARROW, LaunchConfig, Rule, choose, num_blocks, sm_of
from hecate.kernels.common.low_rank import MAX_RANK, LowRankTerm
from hecate.kernels.common.sorting import kept_tile_map
from hecate.kernels.experts.slot_weights import SlotWeights

WIDE_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=80, max_rank=64, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=4), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}), min_sm=0),
)
"""the configurations for results as wide as a layer"""
DROPOUT_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 32, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    WIDE_RULES[-1],
)
"""the configurations for wide results with dropout, whose mask would not fit the registers in a wider block"""
NARROW_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 128, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 32, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}), min_sm=0),
)
"""the configurations for results as wide as a LoRA pair's rank"""


@dataclass(frozen=True)
class GemmOptions:
    """The options of a grouped product beyond x times weights.

    With two halves, the weights' outputs are split in two, each with its own columns of the low-rank term. With two transposed halves,
    each half of x's columns is multiplied by its half of the weights' rows: y_p = [W_0' x_p0, W_1' x_p1].
    """

    gather: bool = False
    """whether each assignment uses its token's row of x"""
    transposed: bool = False
    """whether to compute W_s' x_p instead of W_s x_p"""
    halves: int = 1
    low_rank: LowRankTerm | None = None
    """the term added to the product: low [P, H·R], with R padded, and matrix [S, H·N, R], whose last stride is 1, or the one before it if
    transposed; a transposed term has no halves"""
    scales: tuple[float, float] | None = None
    """the scale of each half's low-rank term, or of its product if there is no term; None: 1"""
    drop_x: RowDropout | None = None
    """the dropout of x before the product, without its scale, with a row for each of the sorted assignments"""
    drop_low: RowDropout | None = None
    """the dropout of only the low-rank term, without its scale"""

    def __post_init__(self) -> None:
        assert self.drop_x is None or self.drop_low is None
        assert self.low_rank is None or self.halves == 1 or not self.transposed


_PLAIN = GemmOptions()


# What changes from batch to batch must not compile anew.
@triton.jit(do_not_specialize=["num_tiles", "num_assignments"])
def grouped_gemm_kernel(
    x,
    token_P,
    w,
    w_offset_S,
    low,
    b,
    keep_P,
    y,
    tiles,
    num_tiles,
    num_assignments,
    stride_x,
    stride_w_slot,
    stride_w,
    stride_low,
    stride_b_slot,
    stride_b,
    stride_y,
    half_x,
    half_w,
    half_low,
    half_b,
    half_y,
    scale_0,
    scale_1,
    dropped_levels,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    HALVES: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALE_RESULT: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_LOW: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[p, n] = sum_k x[row(p), k] W[slot(p), n, k] + scale_h sum_r low[p, r] b[slot(p), n, r]; half 1's operands lie half_* further on."""
    # GROUP tiles share the weights that they read while those are in the L2 cache.
    blocks_n: tl.constexpr = HALVES * ((N + BN - 1) // BN)
    i = tl.program_id(0)
    first_tile = i // (GROUP * blocks_n) * GROUP
    group = tl.minimum(num_tiles - first_tile, GROUP)
    i_tile = first_tile + i % (GROUP * blocks_n) % group
    i_block = i % (GROUP * blocks_n) // group
    num_rows = tl.load(tiles + i_tile * 3 + 2)
    if num_rows == 0:
        return
    slot = tl.load(tiles + i_tile * 3).to(tl.int64)
    first_row = tl.load(tiles + i_tile * 3 + 1)
    half = i_block // (blocks_n // HALVES)
    n0 = i_block % (blocks_n // HALVES) * BN
    scale = tl.where(half == 0, scale_0, scale_1)

    if STACKED:
        w += slot * stride_w_slot
    elif ALIGNED:
        w += tl.multiple_of(tl.load(w_offset_S + slot), 16 * 8 // w.dtype.element_ty.primitive_bitwidth)
    else:
        w += tl.load(w_offset_S + slot)
    x += half * half_x
    w += half * half_w
    y += half * half_y

    o_m = tl.arange(0, BM)
    o_n = n0 + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n = o_n < N
    # Rows behind the tile's last are those of the last, so that no load needs a mask for them; they are not stored.
    place_M = first_row + tl.minimum(o_m, num_rows - 1)
    if GATHER:
        row_M = tl.load(token_P + place_M).to(tl.int64)
    else:
        row_M = place_M.to(tl.int64)
    if DROP_X or DROP_LOW:
        keep_M = tl.load(keep_P + place_M)

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if RANK > 0:
        # First of all, so that scale and mask need no second accumulator.
        RB: tl.constexpr = min(RANK, BK)
        low += half * half_low
        b += slot * stride_b_slot + half * half_b
        for r0 in tl.range(0, RANK, RB, num_stages=1):
            o_r = r0 + tl.arange(0, RB)
            b_low = tl.load(low + place_M.to(tl.int64)[:, None] * stride_low + o_r[None, :])  # [BM, RB]
            if TRANSPOSED:
                b_b = tl.load(b + o_r[:, None] * stride_b + o_n[None, :], mask=m_n[None, :], other=0.0)
            else:
                b_b = tl.trans(tl.load(b + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_b + o_r[None, :]))
            acc = tl.dot(b_low, b_b, acc, input_precision=PRECISION)  # [BM, RB] x [RB, BN]
        acc *= scale
        if DROP_LOW:
            acc = tl.where(dropout_keep(keep_M, o_n, dropped_levels), acc, 0.0)

    if X_DESCRIPTOR:
        # TMA copies blocks of neighbouring rows, so not those of gathered tokens. Behind the tile it reads rows of the next slot, whose
        # products are not stored, and behind the last row zeros.
        x_rows = tl.make_tensor_descriptor(x, shape=[num_assignments, K], strides=[stride_x, 1], block_shape=[BM, BK])
    if W_DESCRIPTOR:
        if TRANSPOSED:
            w_slot = tl.make_tensor_descriptor(w, shape=[K, N], strides=[stride_w, 1], block_shape=[BK, BN])
        else:
            w_slot = tl.make_tensor_descriptor(w, shape=[N, K], strides=[stride_w, 1], block_shape=[BN, BK])
    for k0 in tl.range(0, K, BK):
        m_k = k0 + o_k < K
        # b_x [BM, BK]
        if X_DESCRIPTOR:
            b_x = x_rows.load([first_row, k0])
        elif K % BK == 0:
            b_x = tl.load(x + row_M[:, None] * stride_x + (k0 + o_k)[None, :])
        else:
            b_x = tl.load(x + row_M[:, None] * stride_x + (k0 + o_k)[None, :], mask=m_k[None, :], other=0.0)
        if DROP_X:
            b_x = tl.where(dropout_keep(keep_M, k0 + o_k, dropped_levels), b_x, 0.0)
        # b_w [BK, BN]
        if W_DESCRIPTOR:
            if TRANSPOSED:
                b_w = w_slot.load([k0, n0])
            else:
                b_w = tl.trans(w_slot.load([n0, k0]))
        elif TRANSPOSED:
            b_w = tl.load(w + (k0 + o_k).to(tl.int64)[:, None] * stride_w + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0)
        elif K % BK == 0:
            b_w = tl.trans(tl.load(w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_w + (k0 + o_k)[None, :]))
        else:
            p_w = w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_w + (k0 + o_k)[None, :]
            b_w = tl.trans(tl.load(p_w, mask=m_k[None, :], other=0.0))
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)  # [BM, BN]

    if SCALE_RESULT:
        acc *= scale
    p_y = y + place_M.to(tl.int64)[:, None] * stride_y + o_n[None, :]
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=(o_m < num_rows)[:, None] & m_n[None, :])


def grouped_gemm(x: Tensor, weights: SlotWeights, order: AssignmentOrder, options: GemmOptions = _PLAIN) -> Tensor:
    """Multiply each assignment's row of x by its slot's weights: y_p = W_s x_p, or W_s' x_p.

    Args:
        x: [P, H·K or K], or with `gather` [T, ...], with contiguous rows and of W's type.
        weights: [N·H, K] per slot; transposed [K·H, N].

    Returns:
        [P, H·N] of x's type. Rows of assignments that other ranks compute are not written.
    """
    y = x.new_empty((order.num_assignments, options.halves * _half_width(weights, options)))
    gemm_launch(x, weights, order, y, options).run()
    return y


def _half_width(weights: SlotWeights, options: GemmOptions) -> int:
    return weights.columns if options.transposed else weights.rows // options.halves


def _configured(width: int, rank: int, x: Tensor, options: GemmOptions) -> LaunchConfig:
    """Return the configuration for a result of this width, with blocks no wider than the result needs."""
    if width <= NARROW and options.low_rank is None:
        name, rules = "grouped_gemm_narrow", NARROW_RULES
    elif options.drop_x is None and options.drop_low is None:
        name, rules = "grouped_gemm", WIDE_RULES
    else:
        name, rules = "grouped_gemm_dropout", DROPOUT_RULES
    # The low-rank term is added BK columns at a time, so ranks above those of the tables need no other blocks.
    config = choose(name, rules, rank=min(rank, MAX_RANK), itemsize=x.element_size(), device=x.device)
    return replace(config, blocks={**config.blocks, "BN": min(config.blocks["BN"], max(16, triton.next_power_of_2(width)))})


def _low_rank_arguments(options: GemmOptions, rank: int, width: int) -> dict[str, Tensor | int | None]:
    term = options.low_rank
    if term is None:
        return {"low": None, "b": None, "stride_low": 0, "stride_b_slot": 0, "stride_b": 0, "half_low": 0, "half_b": 0}
    return {
        "low": term.low_PR,
        "b": term.matrix_SNR,
        "stride_low": term.low_PR.stride(0),
        "stride_b_slot": term.matrix_SNR.stride(0),
        "stride_b": term.matrix_SNR.stride(2 if options.transposed else 1),
        "half_low": rank,
        "half_b": width * rank,
    }


def _takes_descriptors(x: Tensor, inner: int, halves: int) -> bool:
    """Return whether TMA can address x's rows, and each half of them."""
    itemsize = x.element_size()
    return begins_aligned(x) and x.stride(0) * itemsize % 16 == 0 and (halves == 1 or inner * itemsize % 16 == 0)


def gemm_launch(x: Tensor, weights: SlotWeights, order: AssignmentOrder, y: Tensor, options: GemmOptions = _PLAIN) -> Launch:
    """Return the launch of `grouped_gemm` into `y`."""
    halves, transposed, term = options.halves, options.transposed, options.low_rank
    assert x.dtype == weights.base.dtype == y.dtype, (x.dtype, weights.base.dtype, y.dtype)
    width, inner = _half_width(weights, options), weights.rows // halves if transposed else weights.columns
    assert x.stride(1) == 1 or x.shape[1] == 1
    assert x.shape[1] == inner * (halves if transposed else 1), (x.shape, weights.rows, weights.columns, halves)
    rank = 0 if term is None else term.low_PR.shape[1] // halves
    config = _configured(width, rank, x, options)
    tiles = kept_tile_map(order, config.blocks["BM"])
    # In float32, products without tensor cores take most of the time, and the registers that descriptors would need.
    descriptors = sm_of(x.device) >= 90 and x.element_size() == 2
    half_rows = weights.rows // halves * weights.row_stride
    drop = options.drop_x or options.drop_low
    return Launch(
        kernel=grouped_gemm_kernel,
        grid=(tiles.shape[0] * halves * num_blocks(width, config.blocks["BN"]),),
        args={
            "x": x,
            "token_P": order.token_P if options.gather else None,
            "w": weights.base,
            "w_offset_S": weights.offset_S,
            "keep_P": None if drop is None else drop.word_R,
            "y": y,
            "tiles": tiles,
            "num_tiles": tiles.shape[0],
            "num_assignments": order.num_assignments,
            "stride_x": x.stride(0),
            "stride_w_slot": weights.stride,
            "stride_w": weights.row_stride,
            "stride_y": y.stride(0),
            "half_x": inner if transposed else 0,
            "half_w": half_rows,
            "half_y": width,
            **_low_rank_arguments(options, rank, width),
            **dict(zip(("scale_0", "scale_1"), options.scales or (1.0, 1.0), strict=True)),
            "dropped_levels": 0 if drop is None else drop.dropped_levels,
        },
        constants={
            "N": width,
            "K": inner,
            "RANK": rank,
            "HALVES": halves,
            "GATHER": options.gather,
            "TRANSPOSED": transposed,
            "STACKED": weights.offset_S is None,
            "ALIGNED": weights.aligned,
            "SCALE_RESULT": options.scales is not None and term is None,
            "DROP_X": options.drop_x is not None,
            "DROP_LOW": options.drop_low is not None,
            "X_DESCRIPTOR": descriptors and not options.gather and _takes_descriptors(x, inner, halves),
            "W_DESCRIPTOR": descriptors and weights.takes_descriptors and half_rows * x.element_size() % 16 == 0,
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            **config.blocks,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
