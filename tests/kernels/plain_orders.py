"""The order of assignments, and the tiles that it is cut into, in plain torch: what `hecate.kernels.common.sorting` is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks, AssignmentOrder, num_tiles_bound


def assignment_order(slot_TK: Tensor, num_slots: int) -> AssignmentOrder:
    """Return the assignments of `slot_TK` (integers [T, K], each in -1 … num_slots - 1) sorted by slot."""
    slot = slot_TK.flatten()
    # A radix sort takes a pass for each few bits of its keys.
    key = torch.where(slot < 0, num_slots, slot).to(torch.int16 if num_slots < 2**15 else torch.int32)
    key_P, order_P = torch.sort(key, stable=True)
    bounds = torch.arange(num_slots + 1, dtype=key.dtype, device=key.device)
    starts = torch.searchsorted(key_P, bounds, out_int32=True)
    place = torch.empty_like(order_P, dtype=torch.int32)
    place.scatter_(0, order_P, torch.arange(slot.numel(), dtype=torch.int32, device=slot.device))
    token_P = (order_P // slot_TK.shape[1]).to(torch.int32)
    return AssignmentOrder(order_P, token_P, torch.where(slot < 0, -1, place).view(slot_TK.shape), starts)


def tile_map(order: AssignmentOrder, rows: int) -> Tensor:
    """Cut an order into tiles of at most `rows` rows of one slot. A program of a grouped kernel works on one tile.

    There are as many tiles as the least favourable group sizes would need; surplus tiles, at the end, have slot 0 and no rows. The map
    of an order is made once and then reused.

    Returns:
        int32 [tiles, 3]: each tile's slot, its first row (a place of the order) and its number of rows, in the order of the rows.
    """
    if rows not in order.tile_maps:
        order.tile_maps[rows] = _tile_map(order, rows)
    return order.tile_maps[rows]


def _tile_map(order: AssignmentOrder, rows: int) -> Tensor:
    num_slots = order.num_slots
    num_tiles = num_tiles_bound(order.num_assignments, num_slots, rows)
    tile = torch.arange(num_tiles, dtype=torch.int32, device=order.starts.device)
    if num_tiles == 0:
        return torch.stack((tile, tile, tile), dim=1)
    tiles_S = (order.starts.diff() + (rows - 1)).div(rows, rounding_mode="floor")
    ends_S = tiles_S.cumsum(0, dtype=torch.int32)
    slot = torch.searchsorted(ends_S, tile, right=True, out_int32=True)
    used = slot < num_slots
    slot = torch.where(used, slot, 0)
    first = order.starts[slot] + (tile - ends_S[slot] + tiles_S[slot]) * rows
    size = torch.where(used, (order.starts[slot + 1] - first).clamp(max=rows), 0)
    return torch.stack((slot, torch.where(used, first, 0), size), dim=1)


def assignment_blocks(order: AssignmentOrder, rows: int, chunk_rows: int) -> AssignmentBlocks:
    """Cut an order into tiles of at most `rows` and chunks of at most `chunk_rows` assignments, without waiting for the device."""
    chunks_S = (order.starts.diff() + (chunk_rows - 1)).div(chunk_rows, rounding_mode="floor")
    first_chunk = F.pad(chunks_S.cumsum(0, dtype=torch.int32), (1, 0))
    return AssignmentBlocks(order, rows, tile_map(order, rows), tile_map(order, chunk_rows), first_chunk)
