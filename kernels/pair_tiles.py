"""(token, choice) pairs sorted by the expert they chose, cut into tiles that share one expert.

Shapes: T tokens, K choices, P pairs that are here, m pairs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Pairs of one slot."""

    slot: int
    token: Tensor
    """int64 [m]"""
    pair: Tensor
    """int64 [m], index into the flattened [T, K]"""
    span: slice
    """where they lie among the P"""
    first: bool
    """of its slot"""


def pair_tiles(slot_TK: Tensor, rows: int) -> tuple[list[Tile], Tensor]:
    """The tiles, of `rows` pairs at most, and the pairs (int64 [P], indices into the flattened [T, K]) in their order.

    Slot -1 is left out. On CUDA it reads the group sizes back to the host.
    """
    slot = slot_TK.flatten()
    elsewhere, *sizes = torch.bincount(slot + 1, minlength=1).tolist()
    order_P = torch.argsort(slot, stable=True)[elsewhere:]
    token_P = order_P // slot_TK.shape[1]
    tiles, start = [], 0
    for index, size in enumerate(sizes):
        end = start + size
        for at in range(start, end, rows):
            span = slice(at, min(at + rows, end))
            tiles.append(Tile(index, token_P[span], order_P[span], span, first=at == start))
        start = end
    return tiles, order_P
