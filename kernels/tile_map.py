"""Which rows of which slot each program of a grouped kernel works on, made on the device without waiting for it.

Shapes: P pairs sorted by slot, S slots, N tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hecate.kernels.pair_order import PairOrder


def tile_map(order: PairOrder, rows: int) -> Tensor:
    """int32 [N, 3]: slot, first row (a place of the order) and number of rows of each tile; a tile has one slot and `rows` rows at most.

    Tiles come in the order of their rows. N is the most that any group sizes could need; the surplus tiles at the end have slot 0 and no
    rows. Made once for an order.
    """
    if rows not in order.tile_maps:
        order.tile_maps[rows] = _tile_map(order, rows)
    return order.tile_maps[rows]


def num_tiles_bound(num_pairs: int, num_slots: int, rows: int) -> int:
    """Tiles of `rows` rows that `num_pairs` pairs in `num_slots` groups may need: only a group's last tile may not be full."""
    return num_pairs // rows + min(num_slots, num_pairs) if num_slots else 0


def _tile_map(order: PairOrder, rows: int) -> Tensor:
    num_slots = order.num_slots
    num_tiles = num_tiles_bound(order.num_pairs, num_slots, rows)
    tile = torch.arange(num_tiles, dtype=torch.int32, device=order.starts.device)
    if num_tiles == 0:
        return torch.stack((tile, tile, tile), dim=1)
    tiles_S = (order.sizes_S + (rows - 1)).div(rows, rounding_mode="floor")
    ends_S = tiles_S.cumsum(0, dtype=torch.int32)
    slot = torch.searchsorted(ends_S, tile, right=True, out_int32=True)
    used = slot < num_slots
    slot = torch.where(used, slot, 0)
    first = order.starts[slot] + (tile - ends_S[slot] + tiles_S[slot]) * rows
    size = torch.where(used, (order.starts[slot + 1] - first).clamp(max=rows), 0)
    return torch.stack((slot, torch.where(used, first, 0), size), dim=1)
