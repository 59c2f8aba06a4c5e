"""Device functions that several Triton kernels call: activations with their derivatives, and dropout's mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), float32; ACTIVATION is one of `hecate.kernels.common.ffn.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 x (1 + tanh(u)) is x sigmoid(2 u), without the cancellation where tanh is near -1.
        return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x), float32."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        act = x * sigmoid
        return act, sigmoid + act * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        act = x * sigmoid
        return act, sigmoid + act * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def mix64(x):
    """The bijection of int64 words that `hecate.kernels.common.dropout` hashes with."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def dropout_word(token, stream, key):
    """The word of a row's dropout, int32: as `Dropout.rows`, bit for bit. All three are integers; `token` is int64."""
    return (mix64(mix64(token ^ tl.cast(key, tl.int64)) ^ tl.cast(stream, tl.int64)) | 1).to(tl.int32)


@triton.jit
def dropout_keep(row_M, o_N, dropped_levels):
    """Which elements [M, N] dropout keeps: as `RowDropout.keep_into`, bit for bit.

    Args:
        row_M: int32 [M], `RowDropout.word_R`.
        o_N: int [N], the columns.
        dropped_levels: of 65536, `RowDropout.dropped_levels`.
    """
    word_N = (mix64((o_N // 2).to(tl.int64) + 1) | 1).to(tl.int32)
    bits = row_M[:, None] * word_N[None, :]
    bits = (bits ^ (bits >> 15)) * -0x61C88647
    # Of the two elements that a word decides, the even column has the lower half.
    half = (bits << (16 - 16 * (o_N % 2))[None, :].to(tl.int32)) >> 16
    return half >= dropped_levels - 32768
