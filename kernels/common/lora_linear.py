"""A frozen linear layer with one low-rank pair in Triton: dropout's mask is hashed inside the products, and never lies in memory.

The products with the frozen weight, and with B in the forward pass, are torch's. Sums are in float32 and in a fixed order, and there
are no atomics.

Shapes: T tokens, I inputs, O outputs, C columns that are summed over, N other columns, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.device_functions import dropout_keep, dropout_word
from hecate.kernels.common.dropout import TokenDropout
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, num_blocks, padded_rank
from hecate.kernels.common.low_rank import LowRankPairs

CHUNK_ROWS = 1024
"""the tokens whose part of the gradients of A and B one program sums"""
_FP32 = (4,)
# Products of float32 use no tensor cores and more registers, so their blocks are smaller.
RULES: dict[str, tuple[Rule, ...]] = {
    "lora_shrink": (
        Rule(LaunchConfig({"BM": 32, "BC": 32}, 4, 3), max_rank=64, itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 16, "BC": 32}, 8, 2), itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 32, "BC": 64}, 4, 4), max_rank=64),
        Rule(LaunchConfig({"BM": 32, "BC": 32}, 8, 3)),
        Rule(LaunchConfig({"BM": 16, "BC": 32}, 4, 1), min_sm=0),
    ),
    "lora_add": (
        Rule(LaunchConfig({"BM": 32, "BN": 64}, 4, 1), max_rank=16, itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 16, "BN": 64}, 8, 1), itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 64, "BN": 128}, 4, 1), max_rank=64),
        Rule(LaunchConfig({"BM": 32, "BN": 64}, 8, 1)),
        Rule(LaunchConfig({"BM": 16, "BN": 32}, 4, 1), min_sm=0),
    ),
    "lora_outer": (
        Rule(LaunchConfig({"BM": 32, "BN": 64}, 4, 2), max_rank=16, itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 32, "BN": 32}, 8, 2), max_rank=64, itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 16, "BN": 32}, 8, 2), itemsizes=_FP32),
        Rule(LaunchConfig({"BM": 64, "BN": 64}, 4, 3), max_rank=64),
        Rule(LaunchConfig({"BM": 32, "BN": 32}, 8, 2)),
        Rule(LaunchConfig({"BM": 16, "BN": 32}, 4, 1), min_sm=0),
    ),
}


@triton.jit(do_not_specialize=["num_tokens", "key", "dropout_stream"])
def lora_shrink_kernel(
    p_x,
    p_token,
    p_a,
    p_low,
    num_tokens,
    C,
    R,
    s_r,
    s_c,
    scale,
    key,
    dropout_stream,
    dropped_levels,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """low[t, r] = scale · sum_c drop(x)[t, c] · A[r, c]."""
    o_M = tl.program_id(0) * BM + tl.arange(0, BM)
    m_M = o_M < num_tokens
    o_R = tl.arange(0, BR)
    m_R = o_R < R
    row_M = o_M.to(tl.int64)
    if DROPOUT:
        word_M = dropout_word(tl.load(p_token + o_M, mask=m_M, other=0), dropout_stream, key)
    b_low = tl.zeros((BM, BR), tl.float32)
    for c in range(0, C, BC):
        o_C = c + tl.arange(0, BC)
        m_C = o_C < C
        b_x = tl.load(p_x + row_M[:, None] * C + o_C[None, :], mask=m_M[:, None] & m_C[None, :], other=0.0)  # [BM, BC]
        if DROPOUT:
            b_x = tl.where(dropout_keep(word_M, o_C, dropped_levels), b_x, 0.0).to(b_x.dtype)
        # [BC, BR]
        b_a = tl.load(p_a + o_C[:, None] * s_c + o_R[None, :] * s_r, mask=m_C[:, None] & m_R[None, :], other=0.0).to(b_x.dtype)
        b_low = tl.dot(b_x, b_a, b_low, input_precision="ieee")  # [BM, BR]
    tl.store(p_low + row_M[:, None] * R + o_R[None, :], (b_low * scale).to(p_low.dtype.element_ty), mask=m_M[:, None] & m_R[None, :])


@triton.jit(do_not_specialize=["num_tokens", "key", "dropout_stream"])
def lora_add_kernel(
    p_out,
    p_token,
    p_low,
    p_a,
    num_tokens,
    N,
    R,
    key,
    dropout_stream,
    dropped_levels,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, n] += drop(sum_r low[t, r] · A[r, n]); dropout without its scale."""
    o_M = tl.program_id(0) * BM + tl.arange(0, BM)
    o_N = tl.program_id(1) * BN + tl.arange(0, BN)
    o_R = tl.arange(0, BR)
    m_M, m_N, m_R = o_M < num_tokens, o_N < N, o_R < R
    row_M = o_M.to(tl.int64)
    b_low = tl.load(p_low + row_M[:, None] * R + o_R[None, :], mask=m_M[:, None] & m_R[None, :], other=0.0)
    b_a = tl.load(p_a + o_R[:, None] * N + o_N[None, :], mask=m_R[:, None] & m_N[None, :], other=0.0).to(b_low.dtype)
    b_out = tl.dot(b_low, b_a, input_precision="ieee")  # [BM, BR] x [BR, BN]
    if DROPOUT:
        word_M = dropout_word(tl.load(p_token + o_M, mask=m_M, other=0), dropout_stream, key)
        b_out = tl.where(dropout_keep(word_M, o_N, dropped_levels), b_out, 0.0)
    at, m_MN = p_out + row_M[:, None] * N + o_N[None, :], m_M[:, None] & m_N[None, :]
    tl.store(at, (tl.load(at, mask=m_MN, other=0.0).to(tl.float32) + b_out).to(p_out.dtype.element_ty), mask=m_MN)


@triton.jit
def _outer_block(
    p_low,
    p_x,
    p_token,
    first,
    rows,
    o_N,
    N,
    R,
    key,
    dropout_stream,
    dropped_levels,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """[BN, BR], the sum of drop(x)[t, n] · low[t, r] over `rows` tokens from `first` on."""
    o_R = tl.arange(0, BR)
    m_N, m_R = o_N < N, o_R < R
    b_out = tl.zeros((BN, BR), tl.float32)
    for m in range(0, rows, BM):
        o_M = m + tl.arange(0, BM)
        m_M = o_M < rows
        row_M = (first + o_M).to(tl.int64)
        b_x = tl.load(p_x + row_M[:, None] * N + o_N[None, :], mask=m_M[:, None] & m_N[None, :], other=0.0)
        if DROPOUT:
            word_M = dropout_word(tl.load(p_token + row_M, mask=m_M, other=0), dropout_stream, key)
            b_x = tl.where(dropout_keep(word_M, o_N, dropped_levels), b_x, 0.0).to(b_x.dtype)
        b_low = tl.load(p_low + row_M[:, None] * R + o_R[None, :], mask=m_M[:, None] & m_R[None, :], other=0.0)
        b_out = tl.dot(tl.trans(b_x), b_low, b_out, input_precision="ieee")  # [BN, BM] x [BM, BR]
    return b_out


@triton.jit(do_not_specialize=["num_tokens", "key", "dropout_stream"])
def lora_outer_kernel(
    p_dlow,
    p_x,
    p_low,
    p_dy,
    p_token,
    p_out,
    num_tokens,
    I,  # noqa: E741 - the inputs
    O,  # noqa: E741 - the outputs
    R,
    key,
    dropout_stream,
    dropped_levels,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """The part of a chunk of ROWS tokens in the gradients of A [R, I] and B [O, R], which lie one behind the other in out[chunk].

    dA[r, n] = sum_t dlow[t, r] · drop(x)[t, n]; dB[n, r] = sum_t dy[t, n] · low[t, r].
    """
    # Each chunk's part lies by itself and torch adds the parts: with atomics the sums would come in another order in each run.
    first = tl.program_id(0) * ROWS
    rows = tl.minimum(num_tokens - first, ROWS)
    o_R = tl.arange(0, BR)
    p_chunk = p_out + tl.program_id(0).to(tl.int64) * R * (I + O)
    blocks_of_a = tl.cdiv(I, BN)
    i_block = tl.program_id(1)
    if i_block < blocks_of_a:
        o_N = i_block * BN + tl.arange(0, BN)
        b_a = _outer_block(p_dlow, p_x, p_token, first, rows, o_N, I, R, key, dropout_stream, dropped_levels, DROPOUT, BM, BN, BR)
        tl.store(p_chunk + o_R[None, :] * I + o_N[:, None], b_a, mask=(o_N < I)[:, None] & (o_R < R)[None, :])
    else:
        o_N = (i_block - blocks_of_a) * BN + tl.arange(0, BN)
        b_b = _outer_block(p_low, p_dy, p_token, first, rows, o_N, O, R, key, dropout_stream, dropped_levels, False, BM, BN, BR)
        tl.store(p_chunk + R * I + o_N[:, None] * R + o_R[None, :], b_b, mask=(o_N < O)[:, None] & (o_R < R)[None, :])


def lora_linear_triton(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, pair: LowRankPairs, dropout: TokenDropout | None = None
) -> Tensor:
    """As `hecate.kernels.common.low_rank.lora_linear`, on CUDA tensors, or on the CPU under TRITON_INTERPRET=1; not in float64.

    Ranks are 1 to 256.
    """
    return _TritonLoraLinear.apply(x_TI.contiguous(), weight_OI, bias_O, pair.scale, dropout, *pair.matrices)


class _TritonLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scale: float, dropout: TokenDropout | None, *pair: Any
    ) -> Tensor:
        a_rI, b_Or, _ = pair
        ctx.dropout, ctx.scale = dropout, scale * (1.0 if dropout is None else dropout.dropout.scale)
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        low_Tr = _shrink(x_TI, a_rI, ctx.scale, dropout)
        y_TO.addmm_(low_Tr, b_Or.to(x_TI.dtype).T)
        ctx.save_for_backward(x_TI, weight_OI, low_Tr, *pair)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, low_Tr, a_rI, b_Or, b_for_a_Or = ctx.saved_tensors
        dy_TO, trains_a = grads[0].contiguous(), ctx.needs_input_grad[5]
        dlow_Tr = of_a_Tr = _shrink(dy_TO, b_Or.T, ctx.scale, None)
        if b_for_a_Or is not None and trains_a:
            of_a_Tr = _shrink(dy_TO, b_for_a_Or.T, ctx.scale, None)
        da_rI, db_Or = _pair_gradients(of_a_Tr if trains_a else None, x_TI, low_Tr, dy_TO, ctx.dropout, a_rI.dtype)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ weight_OI
            _add(dx_TI, dlow_Tr, a_rI, ctx.dropout)
        return dx_TI, None, None, None, None, da_rI, db_Or, None


def _shrink(x_TC: Tensor, matrix_rC: Tensor, scale: float, dropout: TokenDropout | None) -> Tensor:
    """Return scale · drop(x) M' in x's type, [T, r]; the matrix is a view of any strides and type."""
    (rank, width), tokens = matrix_rC.shape, x_TC.shape[0]
    low_Tr = x_TC.new_empty((tokens, rank))
    config = _config("lora_shrink", rank, x_TC)
    Launch.configured(
        lora_shrink_kernel,
        (num_blocks(tokens, config.blocks["BM"]),),
        {
            "p_x": x_TC,
            "p_a": matrix_rC,
            "p_low": low_Tr,
            "num_tokens": tokens,
            "C": width,
            "R": rank,
            "s_r": matrix_rC.stride(0),
            "s_c": matrix_rC.stride(1),
            "scale": scale,
            **_numbers(dropout),
        },
        {
            "DROPOUT": dropout is not None,
            "BR": padded_rank(rank),
        },
        config,
    ).run()
    return low_Tr


def _add(out_TN: Tensor, low_Tr: Tensor, a_rN: Tensor, dropout: TokenDropout | None) -> None:
    """Add drop(low A) to `out`."""
    (rank, width), tokens = a_rN.shape, out_TN.shape[0]
    config = _config("lora_add", rank, out_TN)
    Launch.configured(
        lora_add_kernel,
        (num_blocks(tokens, config.blocks["BM"]), num_blocks(width, config.blocks["BN"])),
        {
            "p_out": out_TN,
            "p_low": low_Tr,
            "p_a": a_rN.contiguous(),
            "num_tokens": tokens,
            "N": width,
            "R": rank,
            **_numbers(dropout),
        },
        {
            "DROPOUT": dropout is not None,
            "BR": padded_rank(rank),
        },
        config,
    ).run()


def _pair_gradients(
    dlow_Tr: Tensor | None, x_TI: Tensor, low_Tr: Tensor, dy_TO: Tensor, dropout: TokenDropout | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Return dlow' drop(x), [r, I], or None without dlow, and dy' low, [O, r]."""
    # Without A's gradient there are no blocks of inputs, and no program reads dlow; but the kernel compiles with a pointer only.
    (tokens, rank), inputs, outputs = low_Tr.shape, 0 if dlow_Tr is None else x_TI.shape[1], dy_TO.shape[1]
    config = _config("lora_outer", rank, x_TI)
    chunks = num_blocks(tokens, CHUNK_ROWS)
    parts = x_TI.new_empty((chunks, rank * (inputs + outputs)), dtype=torch.float32)
    Launch.configured(
        lora_outer_kernel,
        (chunks, num_blocks(inputs, config.blocks["BN"]) + num_blocks(outputs, config.blocks["BN"])),
        {
            "p_dlow": low_Tr if dlow_Tr is None else dlow_Tr,
            "p_x": x_TI,
            "p_low": low_Tr,
            "p_dy": dy_TO,
            "p_out": parts,
            "num_tokens": tokens,
            "I": inputs,
            "O": outputs,
            "R": rank,
            **_numbers(dropout),
        },
        {
            "DROPOUT": dropout is not None,
            "ROWS": CHUNK_ROWS,
            "BR": padded_rank(rank),
        },
        config,
    ).run()
    da, db = parts.sum(0).to(dtype).split_with_sizes((rank * inputs, rank * outputs))
    return None if dlow_Tr is None else da.view(rank, inputs), db.view(outputs, rank)


def _config(name: str, rank: int, like: Tensor) -> LaunchConfig:
    return choose(name, RULES[name], rank=padded_rank(rank), itemsize=like.element_size(), device=like.device)


def _numbers(dropout: TokenDropout | None) -> dict[str, Tensor | int | None]:
    """Return the arguments that dropout's words are hashed from."""
    if dropout is None:
        return {"p_token": None, "key": 0, "dropout_stream": 0, "dropped_levels": 0}
    how = dropout.dropout
    return {"p_token": dropout.token_T.contiguous(), "key": how.key, "dropout_stream": dropout.stream, "dropped_levels": how.dropped_levels}
