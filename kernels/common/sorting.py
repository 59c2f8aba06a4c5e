"""The order of assignments, and the tiles that it is cut into, in one Triton launch each.

`hecate.kernels.common.assignments` says what they are. In torch that takes about fifty small operators, which a GPU finishes sooner than
the host starts them (tests/kernels/plain_orders.py). Dropout's words are hashed in the launch that sorts.

Shapes: T tokens, K assignments of a token, P = T·K places of the sorted assignments, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks, AssignmentOrder, RoutedTokens, num_tiles_bound
from hecate.kernels.common.device_functions import dropout_word
from hecate.kernels.common.dropout import Dropout, FfnDropout, RowDropout
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, num_blocks
from hecate.kernels.common.operands import Operands

SORT_RULES = (Rule(LaunchConfig({"BP": 2048}, num_warps=8, num_stages=2), min_sm=80), Rule(LaunchConfig({"BP": 32}), min_sm=0))
CUT_RULES = (
    Rule(LaunchConfig({"BT": 64, "BS": 64}, num_warps=4, num_stages=1), min_sm=80),
    Rule(LaunchConfig({"BT": 16, "BS": 4}), min_sm=0),
)


@dataclass(frozen=True)
class Unsorted(Operands):
    """What assignments are sorted by, and what the words of their dropout are hashed from."""

    slot_TK: Tensor
    """int64; -1: that assignment is computed elsewhere"""
    places: int
    """see `RoutedTokens.places`"""
    numbers: Sequence[Tensor] = ()
    """int64: the global numbers of the tokens [T], and those of the experts in the slots [S]; nothing: there is no dropout"""
    key: int = 0
    """the key of the dropout"""

    @staticmethod
    def of(routed: RoutedTokens, dropout: Dropout | None = None) -> Unsorted:
        """With dropout, `routed` must have `token_T` and `expert_S`."""
        if dropout is None or dropout.dropped_levels == 0:
            return Unsorted(routed.slot_TK, routed.places)
        assert routed.token_T is not None, "dropout needs the tokens' numbers"
        return Unsorted(routed.slot_TK, routed.places, [routed.token_T, routed.experts_in_slots], dropout.key)


# How many assignments and slots there are changes from batch to batch and with placements, and must not compile anew.
@triton.jit(do_not_specialize=["num_assignments", "num_slots", "s_token", "s_choice", "s_word", "key"])
def sort_kernel(
    p_slot,
    p_token,
    p_expert,
    p_order,
    p_token_P,
    p_place,
    p_starts,
    p_words,
    num_assignments,
    num_slots,
    s_token,
    s_choice,
    s_word,
    key,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    BP: tl.constexpr,
):
    """Program s writes the places of slot s; the last one those of the assignments that are computed elsewhere, behind all others.

    The earlier assignment comes first. `p_words`, two rows, are dropout's words of each place, of x and of the hidden state.
    """
    # Each program counts for itself the assignments of lower slots: to hand a count from program to program would need a second launch,
    # or atomics.
    slot = tl.program_id(0)
    o_P = tl.arange(0, BP)
    lower_P = tl.zeros((BP,), tl.int32)
    for first in range(0, num_assignments, BP):
        at_P = first + o_P
        m_P = at_P < num_assignments
        slot_P = tl.load(p_slot + at_P // TOP_K * s_token + at_P % TOP_K * s_choice, mask=m_P, other=-1)
        lower_P += (m_P & (slot_P >= 0) & (slot_P < slot)).to(tl.int32)
    place = tl.sum(lower_P)
    tl.store(p_starts + slot, place)
    if DROPOUT:
        expert = tl.load(p_expert + slot, mask=slot < num_slots, other=0)
    for first in range(0, num_assignments, BP):
        at_P = first + o_P
        m_P = at_P < num_assignments
        token_P = at_P // TOP_K
        slot_P = tl.load(p_slot + token_P * s_token + at_P % TOP_K * s_choice, mask=m_P, other=-1)
        own_P = m_P & (tl.where(slot_P < 0, num_slots, slot_P) == slot)
        # Places by a running sum and not by an atomic counter, so that the order is that of the assignments in every run.
        place_P = place + tl.cumsum(own_P.to(tl.int32), 0) - 1
        tl.store(p_order + place_P, at_P.to(tl.int64), mask=own_P)
        tl.store(p_token_P + place_P, token_P, mask=own_P)
        tl.store(p_place + at_P, tl.where(slot < num_slots, place_P, -1), mask=own_P)
        if DROPOUT:
            number_P = tl.load(p_token + token_P, mask=own_P, other=0)
            tl.store(p_words + place_P, dropout_word(number_P, expert * 2, key), mask=own_P)
            tl.store(p_words + s_word + place_P, dropout_word(number_P, expert * 2 + 1, key), mask=own_P)
        place += tl.sum(own_P.to(tl.int32))


@triton.jit
def _cut_block(
    p_starts, p_tiles, p_first_tile, i_block, num_slots, num_tiles, rows, FIRSTS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr
):
    """BT tiles of a map of tiles of at most `rows` places; block 0 also writes the first tile of each slot."""
    o_T = i_block * BT + tl.arange(0, BT)
    slot_T = tl.zeros((BT,), tl.int32)
    before_T = tl.zeros((BT,), tl.int32)
    total = 0
    for first in range(0, num_slots, BS):
        o_S = first + tl.arange(0, BS)
        m_S = o_S < num_slots
        size_S = tl.load(p_starts + o_S + 1, mask=m_S, other=0) - tl.load(p_starts + o_S, mask=m_S, other=0)
        tiles_S = (size_S + rows - 1) // rows
        end_S = total + tl.cumsum(tiles_S, 0)
        if FIRSTS:  # noqa: SIM102 - a constant, and a value on the device
            if i_block == 0:
                tl.store(p_first_tile + o_S + 1, end_S, mask=m_S)
        # Slots whose tiles all come before tile t.
        past = (end_S[None, :] <= o_T[:, None]) & m_S[None, :]
        slot_T += tl.sum(past.to(tl.int32), 1)
        before_T += tl.sum(tl.where(past, tiles_S[None, :], 0), 1)
        total += tl.sum(tiles_S)
    if FIRSTS:  # noqa: SIM102
        if i_block == 0:
            tl.store(p_first_tile, 0)
    m_T = o_T < num_tiles
    used_T = m_T & (slot_T < num_slots)
    first_T = tl.load(p_starts + slot_T, mask=used_T, other=0) + (o_T - before_T) * rows
    size_T = tl.minimum(tl.load(p_starts + slot_T + 1, mask=used_T, other=0) - first_T, rows)
    tl.store(p_tiles + 3 * o_T, tl.where(used_T, slot_T, 0), mask=m_T)
    tl.store(p_tiles + 3 * o_T + 1, tl.where(used_T, first_T, 0), mask=m_T)
    tl.store(p_tiles + 3 * o_T + 2, tl.where(used_T, size_T, 0), mask=m_T)


@triton.jit(do_not_specialize=["num_slots", "num_tiles", "num_chunks", "tile_blocks"])
def cut_kernel(
    p_starts,
    p_tiles,
    p_chunks,
    p_first_chunk,
    num_slots,
    num_tiles,
    num_chunks,
    tile_blocks,
    rows,
    chunk_rows,
    CHUNKS: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """tiles[t] = slot, first place and number of places of tile t; with CHUNKS another map of larger tiles, and each slot's first."""
    i = tl.program_id(0)
    if i < tile_blocks:
        _cut_block(p_starts, p_tiles, None, i, num_slots, num_tiles, rows, False, BT, BS)
    elif CHUNKS:
        _cut_block(p_starts, p_chunks, p_first_chunk, i - tile_blocks, num_slots, num_chunks, chunk_rows, True, BT, BS)


def _words_width(num_assignments: int) -> int:
    """Return how many words of dropout there is room for: kernels are compiled for rows that begin at multiples of 16 bytes."""
    return -(-num_assignments // 4) * 4


def sorted_assignments(unsorted: Unsorted, num_slots: int) -> tuple[AssignmentOrder, Tensor]:
    """Return the assignments sorted by slot, and dropout's words at each place, of x and of the gated hidden state, int32 [2, T·K or more].

    Without dropout, or without slots, there are no words, [2, 0]. Those of assignments that are computed elsewhere mean nothing.
    """
    slot_TK, num_assignments = unsorted.slot_TK, unsorted.slot_TK.numel()
    token_T, expert_S = unsorted.numbers if unsorted.numbers and num_slots else (None, None)
    order = AssignmentOrder(
        slot_TK.new_empty(num_assignments, dtype=torch.int64),
        slot_TK.new_empty(num_assignments, dtype=torch.int32),
        slot_TK.new_empty(slot_TK.shape, dtype=torch.int32),
        slot_TK.new_empty(num_slots + 1, dtype=torch.int32),
    )
    words = slot_TK.new_empty((2, 0 if token_T is None else _words_width(num_assignments)), dtype=torch.int32)
    config = choose("sort", SORT_RULES, rank=0, itemsize=4, device=slot_TK.device)
    Launch.configured(
        kernel=sort_kernel,
        grid=(num_slots + 1,),
        args={
            "p_slot": slot_TK,
            "p_token": None if token_T is None else token_T.contiguous(),
            "p_expert": expert_S,
            "p_order": order.order_P,
            "p_token_P": order.token_P,
            "p_place": order.place_TK,
            "p_starts": order.starts,
            "p_words": None if token_T is None else words,
            "num_assignments": num_assignments,
            "num_slots": num_slots,
            "s_token": slot_TK.stride(0),
            "s_choice": slot_TK.stride(1),
            "s_word": words.stride(0),
            "key": unsorted.key,
        },
        constants={
            "TOP_K": slot_TK.shape[1],
            "DROPOUT": token_T is not None,
        },
        config=config,
    ).run()
    return AssignmentOrder(order.order_P[: unsorted.places], order.token_P[: unsorted.places], order.place_TK, order.starts), words


def words_dropout(words: Tensor, dropped_levels: int) -> FfnDropout | None:
    """Return the dropout of the assignments whose words `sorted_assignments` has hashed; None if there was none to hash for."""
    return FfnDropout(RowDropout(words[0], dropped_levels), RowDropout(words[1], dropped_levels)) if dropped_levels else None


def kept_tile_map(order: AssignmentOrder, rows: int) -> Tensor:
    """Cut an order into tiles of at most `rows` rows of one slot. A program of a grouped kernel works on one tile.

    There are as many tiles as the least favourable group sizes would need; surplus tiles, at the end, have slot 0 and no rows. The map
    of an order is computed once and then reused.

    Returns:
        int32 [tiles, 3]: each tile's slot, its first row (a place of the order) and its number of rows, in the order of the rows.
    """
    if rows not in order.tile_maps:
        order.tile_maps[rows] = _cut(order, rows, None)[0]
    return order.tile_maps[rows]


def blocks_of(order: AssignmentOrder, rows: int, chunk_rows: int) -> AssignmentBlocks:
    """Cut an order into tiles of at most `rows` and chunks of at most `chunk_rows` assignments, without waiting for the device."""
    return AssignmentBlocks(order, rows, *_cut(order, rows, chunk_rows))


def _cut(order: AssignmentOrder, rows: int, chunk_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map of tiles, that of chunks, and each slot's first chunk; nothing is written to the last two without `chunk_rows`."""
    num_tiles, num_chunks = (
        0 if size is None else num_tiles_bound(order.num_assignments, order.num_slots, size) for size in (rows, chunk_rows)
    )
    tiles, chunks = (order.starts.new_empty((number, 3)) for number in (num_tiles, num_chunks))
    first_chunk = order.starts.new_empty(order.num_slots + 1)
    config = choose("cut", CUT_RULES, rank=0, itemsize=4, device=tiles.device)
    tile_blocks = num_blocks(num_tiles, config.blocks["BT"])
    # One program for chunks at least, which writes the first chunks of slots without assignments.
    chunk_blocks = 0 if chunk_rows is None else max(1, num_blocks(num_chunks, config.blocks["BT"]))
    Launch.configured(
        kernel=cut_kernel,
        grid=(tile_blocks + chunk_blocks,),
        args={
            "p_starts": order.starts,
            "p_tiles": tiles,
            "p_chunks": None if chunk_rows is None else chunks,
            "p_first_chunk": None if chunk_rows is None else first_chunk,
            "num_slots": order.num_slots,
            "num_tiles": num_tiles,
            "num_chunks": num_chunks,
            "tile_blocks": tile_blocks,
            "rows": rows,
            "chunk_rows": chunk_rows or 1,
        },
        constants={
            "CHUNKS": chunk_rows is not None,
        },
        config=config,
    ).run()
    return tiles, chunks, first_chunk
