"""The Triton kernels of the MixLoRA feed-forward. Rows are assignments, a token with one of its experts, in the order of their slots.

A program works on rows of one slot, which it reads off a tile map (`hecate.kernels.common.sorting.kept_tile_map`): int32 [tiles, 3] of
slot, first row, number of rows. Tiles without rows are surplus: the grid is for the least favourable sizes of groups, which the host does
not know. Sums are taken in float32 and in a fixed order, and there are no atomics, so results have the same bits in every run. Rows of
assignments that are computed elsewhere are neither read nor written.

Grammar: i_ program ids, o_ offsets, p_ pointers, m_ masks, b_ loaded blocks, s_ strides in elements; capitals are sizes. M rows, N columns,
C columns that are summed over, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hecate.kernels.common.device_functions import activate, activate_with_derivative, dropout_keep


@triton.jit
def _load_low(p_low, row_M, m_M, R, BR: tl.constexpr):
    """[M, BR] of a shrunk input [rows, R]; zero beyond."""
    o_R = tl.arange(0, BR)
    return tl.load(p_low + row_M[:, None] * R + o_R[None, :], mask=m_M[:, None] & (o_R < R)[None, :], other=0.0)


@triton.jit
def _load_matrix(p_matrix, slot, o_N, m_N, R, s_slot, s_n, s_r, BR: tl.constexpr, dtype: tl.constexpr):
    """[N, BR], columns of a slot's matrix [N, R] and zero beyond, in `dtype`."""
    o_R = tl.arange(0, BR)
    at = p_matrix + slot.to(tl.int64) * s_slot + o_N[:, None] * s_n + o_R[None, :] * s_r
    return tl.load(at, mask=m_N[:, None] & (o_R < R)[None, :], other=0.0).to(dtype)


@triton.jit
def _store_outer(p_out, b_out, o_N, N, R, TRANSPOSED: tl.constexpr, BR: tl.constexpr):
    """Store [N, BR] of a result [N, R], or [R, N] if TRANSPOSED."""
    o_R = tl.arange(0, BR)
    at = o_R[None, :] * N + o_N[:, None] if TRANSPOSED else o_N[:, None] * R + o_R[None, :]
    tl.store(p_out + at, b_out, mask=(o_N < N)[:, None] & (o_R < R)[None, :])


@triton.jit
def shrink_kernel(
    p_x,
    p_source,
    p_tile,
    p_keep,
    p_a1,
    p_a2,
    p_low1,
    p_low2,
    C,
    R1,
    R2,
    s_slot1,
    s_r1,
    s_c1,
    s_slot2,
    s_r2,
    s_c2,
    scale1,
    scale2,
    dropped_levels,
    GATHER: tl.constexpr,
    DROPOUT: tl.constexpr,
    TWO: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR1: tl.constexpr,
    BR2: tl.constexpr,
):
    """low_j[p, r] = scale_j · sum_c drop(x)[source[p], c] · A_j[slot, r, c], for one or two matrices in one read of x."""
    i_tile = tl.program_id(0)
    slot, first, rows = tl.load(p_tile + 3 * i_tile), tl.load(p_tile + 3 * i_tile + 1), tl.load(p_tile + 3 * i_tile + 2)
    if rows > 0:
        m_M = tl.arange(0, BM) < rows
        row_M = (first + tl.arange(0, BM)).to(tl.int64)
        source_M = tl.load(p_source + row_M, mask=m_M, other=0).to(tl.int64) if GATHER else row_M
        if DROPOUT:
            key_M = tl.load(p_keep + row_M, mask=m_M, other=0)
        b_low1 = tl.zeros((BM, BR1), tl.float32)
        if TWO:
            b_low2 = tl.zeros((BM, BR2), tl.float32)
        for c in range(0, C, BC):
            o_C = c + tl.arange(0, BC)
            m_C = o_C < C
            b_x = tl.load(p_x + source_M[:, None] * C + o_C[None, :], mask=m_M[:, None] & m_C[None, :], other=0.0)
            if DROPOUT:
                b_x = tl.where(dropout_keep(key_M, o_C, dropped_levels), b_x, 0.0).to(b_x.dtype)
            b_a1 = _load_matrix(p_a1, slot, o_C, m_C, R1, s_slot1, s_c1, s_r1, BR1, b_x.dtype)
            b_low1 = tl.dot(b_x, b_a1, b_low1, input_precision="ieee")  # [BM, BC] x [BC, BR1]
            if TWO:
                b_a2 = _load_matrix(p_a2, slot, o_C, m_C, R2, s_slot2, s_c2, s_r2, BR2, b_x.dtype)
                b_low2 = tl.dot(b_x, b_a2, b_low2, input_precision="ieee")
        o_R1 = tl.arange(0, BR1)
        m_low1 = m_M[:, None] & (o_R1 < R1)[None, :]
        tl.store(p_low1 + row_M[:, None] * R1 + o_R1[None, :], (b_low1 * scale1).to(p_low1.dtype.element_ty), mask=m_low1)
        if TWO:
            o_R2 = tl.arange(0, BR2)
            m_low2 = m_M[:, None] & (o_R2 < R2)[None, :]
            tl.store(p_low2 + row_M[:, None] * R2 + o_R2[None, :], (b_low2 * scale2).to(p_low2.dtype.element_ty), mask=m_low2)


@triton.jit
def expand_kernel(
    p_tile,
    p_keep,
    p_low1,
    p_low2,
    p_b1,
    p_b2,
    p_out,
    N,
    R1,
    R2,
    s_slot1,
    s_n1,
    s_r1,
    s_slot2,
    s_n2,
    s_r2,
    dropped_levels,
    DROPOUT: tl.constexpr,
    TWO: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR1: tl.constexpr,
    BR2: tl.constexpr,
):
    """out[p, n] = drop(sum_j low_j[p] · B_j[slot, n]), for one or two matrices; dropout without its scale."""
    i_tile = tl.program_id(0)
    slot, first, rows = tl.load(p_tile + 3 * i_tile), tl.load(p_tile + 3 * i_tile + 1), tl.load(p_tile + 3 * i_tile + 2)
    if rows > 0:
        m_M = tl.arange(0, BM) < rows
        row_M = (first + tl.arange(0, BM)).to(tl.int64)
        o_N = tl.program_id(1) * BN + tl.arange(0, BN)
        m_N = o_N < N
        b_low1 = _load_low(p_low1, row_M, m_M, R1, BR1)
        b_b1 = _load_matrix(p_b1, slot, o_N, m_N, R1, s_slot1, s_n1, s_r1, BR1, b_low1.dtype)
        b_out = tl.dot(b_low1, tl.trans(b_b1), input_precision="ieee")  # [BM, BR1] x [BR1, BN]
        if TWO:
            b_low2 = _load_low(p_low2, row_M, m_M, R2, BR2)
            b_b2 = _load_matrix(p_b2, slot, o_N, m_N, R2, s_slot2, s_n2, s_r2, BR2, b_low2.dtype)
            b_out = tl.dot(b_low2, tl.trans(b_b2), b_out, input_precision="ieee")
        if DROPOUT:
            key_M = tl.load(p_keep + row_M, mask=m_M, other=0)
            b_out = tl.where(dropout_keep(key_M, o_N, dropped_levels), b_out, 0.0)
        tl.store(p_out + row_M[:, None] * N + o_N[None, :], b_out.to(p_out.dtype.element_ty), mask=m_M[:, None] & m_N[None, :])


# P, the number of assignments, changes from batch to batch, and must not compile anew.
@triton.jit(do_not_specialize=["P"])
def gated_kernel(
    p_gate,
    p_up,
    p_token,
    p_tile,
    p_keep,
    p_low_gate,
    p_low_up,
    p_b_gate,
    p_b_up,
    p_a_down,
    p_h,
    p_partial,
    P,
    F,
    R_GATE,
    R_UP,
    R_DOWN,
    s_slot_gate,
    s_n_gate,
    s_r_gate,
    s_slot_up,
    s_n_up,
    s_r_up,
    s_slot_down,
    s_n_down,
    s_r_down,
    dropped_levels,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    BR_GATE: tl.constexpr,
    BR_UP: tl.constexpr,
    BR_DOWN: tl.constexpr,
):
    """h[p] = act(G[token] + low_gate[p] B_gate') · (U[token] + low_up[p] B_up') in STEPS blocks of columns.

    Of those columns also the share partial[program, p] of drop(h) A_down'. A block rank BR_* of 0: that projection has no adapter.
    """
    i_tile, i_columns = tl.program_id(0), tl.program_id(1)
    slot, first, rows = tl.load(p_tile + 3 * i_tile), tl.load(p_tile + 3 * i_tile + 1), tl.load(p_tile + 3 * i_tile + 2)
    if rows > 0:
        m_M = tl.arange(0, BM) < rows
        row_M = (first + tl.arange(0, BM)).to(tl.int64)
        token_M = tl.load(p_token + row_M, mask=m_M, other=0).to(tl.int64)
        if DROPOUT:
            key_M = tl.load(p_keep + row_M, mask=m_M, other=0)
        if BR_GATE > 0:
            b_low_gate = _load_low(p_low_gate, row_M, m_M, R_GATE, BR_GATE)
        if BR_UP > 0:
            b_low_up = _load_low(p_low_up, row_M, m_M, R_UP, BR_UP)
        if BR_DOWN > 0:
            b_low_down = tl.zeros((BM, BR_DOWN), tl.float32)
        for step in range(STEPS):
            o_N = (i_columns * STEPS + step) * BN + tl.arange(0, BN)
            m_N = o_N < F
            m_MN = m_M[:, None] & m_N[None, :]
            at = token_M[:, None] * F + o_N[None, :]
            b_gate = tl.load(p_gate + at, mask=m_MN, other=0.0).to(tl.float32)
            b_up = tl.load(p_up + at, mask=m_MN, other=0.0).to(tl.float32)
            if BR_GATE > 0:
                b_b = _load_matrix(p_b_gate, slot, o_N, m_N, R_GATE, s_slot_gate, s_n_gate, s_r_gate, BR_GATE, b_low_gate.dtype)
                b_gate = tl.dot(b_low_gate, tl.trans(b_b), b_gate, input_precision="ieee")  # [BM, BR_GATE] x [BR_GATE, BN]
            if BR_UP > 0:
                b_b = _load_matrix(p_b_up, slot, o_N, m_N, R_UP, s_slot_up, s_n_up, s_r_up, BR_UP, b_low_up.dtype)
                b_up = tl.dot(b_low_up, tl.trans(b_b), b_up, input_precision="ieee")
            b_h = (activate(b_gate, ACTIVATION) * b_up).to(p_h.dtype.element_ty)
            # h is stored without dropout: the base's down projection takes it whole, and only the pair's input is dropped.
            tl.store(p_h + row_M[:, None] * F + o_N[None, :], b_h, mask=m_MN)
            if BR_DOWN > 0:
                if DROPOUT:
                    b_h = tl.where(dropout_keep(key_M, o_N, dropped_levels), b_h, 0.0).to(b_h.dtype)
                b_a = _load_matrix(p_a_down, slot, o_N, m_N, R_DOWN, s_slot_down, s_n_down, s_r_down, BR_DOWN, b_h.dtype)
                b_low_down = tl.dot(b_h, b_a, b_low_down, input_precision="ieee")  # [BM, BN] x [BN, BR_DOWN]
        if BR_DOWN > 0:
            # The programs of a tile's columns each store a part, which a second launch adds up in their order.
            o_R = tl.arange(0, BR_DOWN)
            p_out = p_partial + (i_columns.to(tl.int64) * P + row_M)[:, None] * R_DOWN + o_R[None, :]
            tl.store(p_out, b_low_down, mask=m_M[:, None] & (o_R < R_DOWN)[None, :])


@triton.jit(do_not_specialize=["P"])
def gated_backward_kernel(
    p_gate,
    p_up,
    p_dhidden,
    p_order,
    p_token,
    p_chunk,
    p_weight,
    p_keep,
    p_low_gate,
    p_low_up,
    p_low_dy,
    p_b_gate,
    p_b_up,
    p_a_down,
    p_dgate,
    p_dup,
    p_dweight,
    p_db_gate,
    p_db_up,
    p_da_down,
    P,
    F,
    R_GATE,
    R_UP,
    R_DOWN,
    s_slot_gate,
    s_n_gate,
    s_r_gate,
    s_slot_up,
    s_n_up,
    s_r_up,
    s_slot_down,
    s_n_down,
    s_r_down,
    s_chunk,
    dropped_levels,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR_GATE: tl.constexpr,
    BR_UP: tl.constexpr,
    BR_DOWN: tl.constexpr,
):
    """A block of F columns of a chunk of a slot's rows, recomputed from G, U and the shrunk inputs, and all that comes of it.

    dh = D[token] + drop(low_dy A_down); dweight[program, p] = <dh, h>, its share of these columns; dgate and dup, times the weight of
    the assignment;
    this chunk's shares of dB_gate = dgate' low_gate, [F, R], of dB_up, and of dA_down = (weight · low_dy)' drop(h), [R, F]. Those of the
    next chunk are s_chunk elements further.
    """
    i_chunk, i_columns = tl.program_id(0), tl.program_id(1)
    slot, first, rows = tl.load(p_chunk + 3 * i_chunk), tl.load(p_chunk + 3 * i_chunk + 1), tl.load(p_chunk + 3 * i_chunk + 2)
    if rows > 0:
        o_N = i_columns * BN + tl.arange(0, BN)
        m_N = o_N < F
        dtype = p_dgate.dtype.element_ty
        if BR_GATE > 0:
            b_b_gate = _load_matrix(p_b_gate, slot, o_N, m_N, R_GATE, s_slot_gate, s_n_gate, s_r_gate, BR_GATE, dtype)
            b_db_gate = tl.zeros((BN, BR_GATE), tl.float32)
        if BR_UP > 0:
            b_b_up = _load_matrix(p_b_up, slot, o_N, m_N, R_UP, s_slot_up, s_n_up, s_r_up, BR_UP, dtype)
            b_db_up = tl.zeros((BN, BR_UP), tl.float32)
        if BR_DOWN > 0:
            b_a_down = _load_matrix(p_a_down, slot, o_N, m_N, R_DOWN, s_slot_down, s_n_down, s_r_down, BR_DOWN, dtype)
            b_da_down = tl.zeros((BN, BR_DOWN), tl.float32)
        for m in range(0, rows, BM):
            o_M = m + tl.arange(0, BM)
            m_M = o_M < rows
            row_M = (first + o_M).to(tl.int64)
            m_MN = m_M[:, None] & m_N[None, :]
            at = tl.load(p_token + row_M, mask=m_M, other=0).to(tl.int64)[:, None] * F + o_N[None, :]
            weight_M = tl.load(p_weight + tl.load(p_order + row_M, mask=m_M, other=0), mask=m_M, other=0.0).to(tl.float32)
            b_gate = tl.load(p_gate + at, mask=m_MN, other=0.0).to(tl.float32)
            b_up = tl.load(p_up + at, mask=m_MN, other=0.0).to(tl.float32)
            b_dh = tl.load(p_dhidden + at, mask=m_MN, other=0.0).to(tl.float32)
            if BR_GATE > 0:
                b_low_gate = _load_low(p_low_gate, row_M, m_M, R_GATE, BR_GATE)
                b_gate = tl.dot(b_low_gate, tl.trans(b_b_gate), b_gate, input_precision="ieee")  # [BM, BR_GATE] x [BR_GATE, BN]
            if BR_UP > 0:
                b_low_up = _load_low(p_low_up, row_M, m_M, R_UP, BR_UP)
                b_up = tl.dot(b_low_up, tl.trans(b_b_up), b_up, input_precision="ieee")
            b_act, b_slope = activate_with_derivative(b_gate, ACTIVATION)
            b_h = (b_act * b_up).to(dtype)  # rounded as the forward pass has stored it, so that gradients are those of what was computed
            if BR_DOWN > 0:
                b_low_dy = _load_low(p_low_dy, row_M, m_M, R_DOWN, BR_DOWN)
                if DROPOUT:
                    keep = dropout_keep(tl.load(p_keep + row_M, mask=m_M, other=0), o_N, dropped_levels)
                    b_dh += tl.where(keep, tl.dot(b_low_dy, tl.trans(b_a_down), input_precision="ieee"), 0.0)
                    b_h_dropped = tl.where(keep, b_h, 0.0).to(dtype)
                else:
                    b_dh = tl.dot(b_low_dy, tl.trans(b_a_down), b_dh, input_precision="ieee")
                    b_h_dropped = b_h
                b_weighted = (b_low_dy.to(tl.float32) * weight_M[:, None]).to(dtype)
                b_da_down = tl.dot(tl.trans(b_h_dropped), b_weighted, b_da_down, input_precision="ieee")  # [BN, BM] x [BM, BR_DOWN]
            # Before dh is weighted: the weight's gradient is <dh, h> of the unweighted one.
            tl.store(p_dweight + i_columns.to(tl.int64) * P + row_M, tl.sum(b_dh * b_h.to(tl.float32), axis=1), mask=m_M)
            b_dh *= weight_M[:, None]
            b_dup = (b_dh * b_act).to(dtype)
            b_dgate = (b_dh * b_up * b_slope).to(dtype)
            out = row_M[:, None] * F + o_N[None, :]
            tl.store(p_dgate + out, b_dgate, mask=m_MN)
            tl.store(p_dup + out, b_dup, mask=m_MN)
            if BR_GATE > 0:
                b_db_gate = tl.dot(tl.trans(b_dgate), b_low_gate, b_db_gate, input_precision="ieee")  # [BN, BM] x [BM, BR_GATE]
            if BR_UP > 0:
                b_db_up = tl.dot(tl.trans(b_dup), b_low_up, b_db_up, input_precision="ieee")
        chunk = i_chunk.to(tl.int64) * s_chunk
        if BR_GATE > 0:
            _store_outer(p_db_gate + chunk, b_db_gate, o_N, F, R_GATE, False, BR_GATE)
        if BR_UP > 0:
            _store_outer(p_db_up + chunk, b_db_up, o_N, F, R_UP, False, BR_UP)
        if BR_DOWN > 0:
            _store_outer(p_da_down + chunk, b_da_down, o_N, F, R_DOWN, True, BR_DOWN)


@triton.jit
def outer_kernel(
    p_x,
    p_source,
    p_order,
    p_chunk,
    p_weight,
    p_keep,
    p_low1,
    p_low2,
    p_out1,
    p_out2,
    N,
    R1,
    R2,
    s_chunk,
    dropped_levels,
    WEIGHTED: tl.constexpr,
    DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TWO: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR1: tl.constexpr,
    BR2: tl.constexpr,
):
    """out_j[chunk, n, r] = sum_p drop(x)[source[p], n] · low_j[p, r] (· weight[assignment]) over a chunk of a slot's rows.

    A chunk's result is [N, R], or [R, N] if TRANSPOSED; that of the next chunk is s_chunk elements further.
    """
    i_chunk = tl.program_id(0)
    first, rows = tl.load(p_chunk + 3 * i_chunk + 1), tl.load(p_chunk + 3 * i_chunk + 2)
    if rows > 0:
        o_N = tl.program_id(1) * BN + tl.arange(0, BN)
        m_N = o_N < N
        b_out1 = tl.zeros((BN, BR1), tl.float32)
        if TWO:
            b_out2 = tl.zeros((BN, BR2), tl.float32)
        for m in range(0, rows, BM):
            o_M = m + tl.arange(0, BM)
            m_M = o_M < rows
            row_M = (first + o_M).to(tl.int64)
            source_M = tl.load(p_source + row_M, mask=m_M, other=0).to(tl.int64)
            b_x = tl.load(p_x + source_M[:, None] * N + o_N[None, :], mask=m_M[:, None] & m_N[None, :], other=0.0)
            if DROPOUT:
                key_M = tl.load(p_keep + row_M, mask=m_M, other=0)
                b_x = tl.where(dropout_keep(key_M, o_N, dropped_levels), b_x, 0.0).to(b_x.dtype)
            b_low1 = _load_low(p_low1, row_M, m_M, R1, BR1)
            if WEIGHTED:
                weight_M = tl.load(p_weight + tl.load(p_order + row_M, mask=m_M, other=0), mask=m_M, other=0.0).to(tl.float32)
                b_low1 = (b_low1.to(tl.float32) * weight_M[:, None]).to(b_x.dtype)
            b_out1 = tl.dot(tl.trans(b_x), b_low1, b_out1, input_precision="ieee")  # [BN, BM] x [BM, BR1]
            if TWO:
                b_low2 = _load_low(p_low2, row_M, m_M, R2, BR2)
                b_out2 = tl.dot(tl.trans(b_x), b_low2, b_out2, input_precision="ieee")
        chunk = i_chunk.to(tl.int64) * s_chunk
        _store_outer(p_out1 + chunk, b_out1, o_N, N, R1, TRANSPOSED, BR1)
        if TWO:
            _store_outer(p_out2 + chunk, b_out2, o_N, N, R2, TRANSPOSED, BR2)


@triton.jit
def sum_chunks_kernel(
    p_partial,
    p_first,
    p_out,
    N,
    BN: tl.constexpr,
):
    """out[slot, n] = sum of partial[chunk, n] over the slot's chunks, first[slot] … first[slot + 1] - 1, ascending."""
    slot = tl.program_id(0)
    o_N = tl.program_id(1) * BN + tl.arange(0, BN)
    m_N = o_N < N
    b_sum = tl.zeros((BN,), tl.float32)
    for chunk in range(tl.load(p_first + slot), tl.load(p_first + slot + 1)):
        b_sum += tl.load(p_partial + tl.cast(chunk, tl.int64) * N + o_N, mask=m_N, other=0.0)
    tl.store(p_out + slot.to(tl.int64) * N + o_N, b_sum.to(p_out.dtype.element_ty), mask=m_N)


@triton.jit(do_not_specialize=["num_rows", "num_out"])
def sum_programs_kernel(
    p_partial,
    p_place,
    p_out,
    num_rows,
    num_out,
    R,
    scale,
    PROGRAMS: tl.constexpr,
    PLACED: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, r] = scale · sum over programs, ascending, of partial[program, m, r], or of row place[m]; 0 where place[m] is negative."""
    o_M = tl.program_id(0) * BM + tl.arange(0, BM)
    o_R = tl.arange(0, BR)
    m_M = o_M < num_out
    row_M = tl.load(p_place + o_M, mask=m_M, other=-1).to(tl.int64) if PLACED else o_M.to(tl.int64)
    m_MR = (m_M & (row_M >= 0))[:, None] & (o_R < R)[None, :]
    b_sum = tl.zeros((BM, BR), tl.float32)
    for program in range(PROGRAMS):
        at = (tl.cast(program, tl.int64) * num_rows + row_M)[:, None] * R + o_R[None, :]
        b_sum += tl.load(p_partial + at, mask=m_MR, other=0.0)
    at = o_M.to(tl.int64)[:, None] * R + o_R[None, :]
    tl.store(p_out + at, (b_sum * scale).to(p_out.dtype.element_ty), mask=m_M[:, None] & (o_R < R)[None, :])
