"""Grouped GEMM: rows sorted by slot times their slot's weights, plus a low-rank term.

One kernel serves every product of an expert's feed-forward whose result has a row per pair: forward, transposed for the gradients
of inputs, and the narrow ones that shrink to a LoRA pair's rank. Each program owns one tile of the result and sums in a fixed order.
A result may have two halves (gate and up), each with its own part of the inputs, weights and low-rank columns.

Shapes: P pairs sorted by slot (`PairOrder`), S slots, N outputs and K inputs of a half, R rank as padded, H halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.device_functions import dropout_keep
from hecate.kernels.kernel_launch import Launch
from hecate.kernels.launch_config import LaunchConfig, Rule, choose, sm_of
from hecate.kernels.pair_order import PairOrder
from hecate.kernels.slot_weights import SlotWeights
from hecate.kernels.tile_map import tile_map

WIDE_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=80, max_rank=64, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=4), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}), min_sm=0),
)
"""of results as wide as a layer"""
DROPOUT_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, num_warps=8, num_stages=3), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 32, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    WIDE_RULES[-1],
)
"""of wide results with dropout: its mask of a wider block would not fit the registers"""
NARROW_RULES: tuple[Rule, ...] = (
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 128, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=90, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80, itemsizes=(2,)),
    Rule(LaunchConfig({"BM": 64, "BN": 32, "BK": 16, "GROUP": 8}, num_warps=4, num_stages=3), min_sm=80),
    Rule(LaunchConfig({"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}), min_sm=0),
)
"""of results as wide as a LoRA pair's rank"""
MAX_RANK = 256
"""in the tables; the low-rank term is added BK columns at a time, so blocks need not fear higher ones"""
_NARROW = 64
"""results up to this width are narrow"""


@dataclass(frozen=True)
class LowRank:
    """scale_h · low_h b_h', added to each half h of a product."""

    low_PR: Tensor
    """[P, H·R]"""
    b: Tensor
    """contiguous [S, H·N, R]; for a transposed product [S, R, N]"""
    rank: int
    """R, of a half; as padded"""
    scales: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class RowDropout:
    """Which elements of each pair's row are dropped."""

    dropped_levels: int
    """of `Dropout`"""
    row_P: Tensor
    """int32 [P], of `Dropout.rows`, in the order of the pairs"""


@triton.jit
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
    num_pairs,
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
            b_low = tl.load(low + place_M.to(tl.int64)[:, None] * stride_low + o_r[None, :])
            if TRANSPOSED:
                b_b = tl.load(b + o_r[:, None] * stride_b + o_n[None, :], mask=m_n[None, :], other=0.0)
            else:
                b_b = tl.trans(tl.load(b + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_b + o_r[None, :]))
            acc = tl.dot(b_low, b_b, acc, input_precision=PRECISION)
        acc *= scale
        if DROP_LOW:
            acc = tl.where(dropout_keep(keep_M, o_n, dropped_levels), acc, 0.0)

    if X_DESCRIPTOR:
        x_rows = tl.make_tensor_descriptor(x, shape=[num_pairs, K], strides=[stride_x, 1], block_shape=[BM, BK])
    if W_DESCRIPTOR:
        if TRANSPOSED:
            w_slot = tl.make_tensor_descriptor(w, shape=[K, N], strides=[stride_w, 1], block_shape=[BK, BN])
        else:
            w_slot = tl.make_tensor_descriptor(w, shape=[N, K], strides=[stride_w, 1], block_shape=[BN, BK])
    for k0 in tl.range(0, K, BK):
        m_k = k0 + o_k < K
        if X_DESCRIPTOR:
            b_x = x_rows.load([first_row, k0])
        elif K % BK == 0:
            b_x = tl.load(x + row_M[:, None] * stride_x + (k0 + o_k)[None, :])
        else:
            b_x = tl.load(x + row_M[:, None] * stride_x + (k0 + o_k)[None, :], mask=m_k[None, :], other=0.0)
        if DROP_X:
            b_x = tl.where(dropout_keep(keep_M, k0 + o_k, dropped_levels), b_x, 0.0)
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
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)

    if SCALE_RESULT:
        acc *= scale
    p_y = y + place_M.to(tl.int64)[:, None] * stride_y + o_n[None, :]
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=(o_m < num_rows)[:, None] & m_n[None, :])


def grouped_gemm(
    x: Tensor,
    weights: SlotWeights,
    order: PairOrder,
    *,
    gather: bool = False,
    transposed: bool = False,
    halves: int = 1,
    lora: LowRank | None = None,
    scales: tuple[float, float] | None = None,
    drop_x: RowDropout | None = None,
    drop_low: RowDropout | None = None,
) -> Tensor:
    """Each pair's row of x times its slot's weights: y_p = W_s x_p, or W_s' x_p.

    With two halves, W's outputs are split in two, each with its own columns of `lora.low_PR`; transposed, each half of x's columns meets
    its half of W's rows: y_p = [W_0' x_p0, W_1' x_p1].

    Args:
        x: [P, H·K or K], or with `gather` [T, ...], of which each pair takes its token's row. Rows contiguous, elements of W's type.
        weights: [N·H, K] per slot; transposed [K·H, N].
        lora: added to the product; a transposed one has no halves.
        scales: of each half's product; not with `lora`, which brings its own.
        drop_x: dropout of x before the product, without its scale.
        drop_low: dropout of `lora`'s term alone, without its scale.

    Returns:
        [P, H·N], x's type. Rows of pairs that are computed elsewhere are not written.
    """
    y = x.new_empty((order.num_pairs, halves * _half_width(weights, halves, transposed)))
    launch = gemm_launch(
        x,
        weights,
        order,
        y,
        gather=gather,
        transposed=transposed,
        halves=halves,
        lora=lora,
        scales=scales,
        drop_x=drop_x,
        drop_low=drop_low,
    )
    launch.run()
    return y


def _half_width(weights: SlotWeights, halves: int, transposed: bool) -> int:
    return weights.columns if transposed else weights.rows // halves


def gemm_launch(
    x: Tensor,
    weights: SlotWeights,
    order: PairOrder,
    y: Tensor,
    *,
    gather: bool = False,
    transposed: bool = False,
    halves: int = 1,
    lora: LowRank | None = None,
    scales: tuple[float, float] | None = None,
    drop_x: RowDropout | None = None,
    drop_low: RowDropout | None = None,
    sm: int | None = None,
) -> Launch:
    """The launch of `grouped_gemm` into `y`; `sm` stands in for the number of its device."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    assert x.dtype == weights.base.dtype == y.dtype, (x.dtype, weights.base.dtype, y.dtype)
    assert lora is None or scales is None
    assert drop_x is None or drop_low is None
    assert lora is None or halves == 1 or not transposed
    width = _half_width(weights, halves, transposed)
    inner = weights.rows // halves if transposed else weights.columns
    assert x.shape[1] == inner * (halves if transposed else 1), (x.shape, weights.rows, weights.columns, halves)
    rank = lora.rank if lora is not None else 0
    drop = drop_x or drop_low
    if width <= _NARROW and lora is None:
        name, rules = "grouped_gemm_narrow", NARROW_RULES
    else:
        name, rules = ("grouped_gemm", WIDE_RULES) if drop is None else ("grouped_gemm_dropout", DROPOUT_RULES)
    config = choose(name, rules, rank=min(rank, MAX_RANK), itemsize=x.element_size(), device=x.device)
    blocks = dict(config.blocks)
    blocks["BN"] = min(blocks["BN"], max(16, triton.next_power_of_2(width)))
    tiles = tile_map(order, blocks["BM"])
    # In float32, products without tensor cores take all the time there is, and the registers that descriptors would need.
    descriptors = (sm_of(x.device) if sm is None else sm) >= 90 and x.element_size() == 2
    x_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and (inner * x.element_size() % 16 == 0 or halves == 1)
    half_rows = weights.rows // halves * weights.row_stride
    first, second = lora.scales if lora is not None else scales or (1.0, 1.0)
    return Launch(
        kernel=grouped_gemm_kernel,
        grid=(len(tiles) * halves * triton.cdiv(width, blocks["BN"]),),
        args={
            "x": x,
            "token_P": order.token_P if gather else None,
            "w": weights.base,
            "w_offset_S": weights.offset_S,
            "low": lora.low_PR if lora is not None else None,
            "b": lora.b if lora is not None else None,
            "keep_P": drop.row_P if drop is not None else None,
            "y": y,
            "tiles": tiles,
            "num_tiles": len(tiles),
            "num_pairs": order.num_pairs,
            "stride_x": x.stride(0),
            "stride_w_slot": weights.stride,
            "stride_w": weights.row_stride,
            "stride_low": lora.low_PR.stride(0) if lora is not None else 0,
            "stride_b_slot": lora.b.stride(0) if lora is not None else 0,
            "stride_b": lora.b.stride(1) if lora is not None else 0,
            "stride_y": y.stride(0),
            "half_x": inner if transposed else 0,
            "half_w": half_rows,
            "half_low": rank,
            "half_b": width * rank,
            "half_y": width,
            "scale_0": first,
            "scale_1": second,
            "dropped_levels": drop.dropped_levels if drop is not None else 0,
        },
        constants={
            "N": width,
            "K": inner,
            "RANK": rank,
            "HALVES": halves,
            "GATHER": gather,
            "TRANSPOSED": transposed,
            "STACKED": weights.offset_S is None,
            "ALIGNED": weights.aligned,
            "SCALE_RESULT": scales is not None,
            "DROP_X": drop_x is not None,
            "DROP_LOW": drop_low is not None,
            "X_DESCRIPTOR": descriptors and not gather and x_aligned,
            "W_DESCRIPTOR": descriptors and weights.takes_descriptors and half_rows * x.element_size() % 16 == 0,
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            **blocks,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
