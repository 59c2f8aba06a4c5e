"""Pairs sorted by slot, with the two ways in which grouped kernels cut them: tiles, and chunks over which gradients are summed first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.pair_order import PairOrder
from hecate.kernels.tile_map import tile_map


@dataclass(frozen=True)
class PairBlocks:
    """A permutation of pairs and the maps (see `tile_map`) of its tiles and chunks."""

    order: PairOrder
    rows: int
    """of a tile at most"""
    tiles: Tensor
    """int32 [tiles, 3]"""
    chunks: Tensor
    """int32 [chunks, 3]; a hot slot's gradients are summed by many programs, each over one chunk, and then over the chunks in turn"""
    first_chunk: Tensor
    """int32 [S + 1]: the chunks of slot s are first_chunk[s] … first_chunk[s + 1] - 1"""

    def tensors(self) -> tuple[Tensor, ...]:
        order = self.order
        return order.order_P, order.token_P, order.place_TK, order.starts, self.tiles, self.chunks, self.first_chunk

    @staticmethod
    def of_tensors(rows: int, tensors: tuple[Tensor, ...]) -> PairBlocks:
        """What `tensors` took apart."""
        order_P, token_P, place_TK, starts, tiles, chunks, first_chunk = tensors
        return PairBlocks(PairOrder(order_P, token_P, place_TK, starts), rows, tiles, chunks, first_chunk)


def pair_blocks(order: PairOrder, rows: int, chunk_rows: int) -> PairBlocks:
    """Cut into tiles of `rows` and chunks of `chunk_rows` pairs at most, without waiting for the device."""
    chunks_S = (order.sizes_S + (chunk_rows - 1)).div(chunk_rows, rounding_mode="floor")
    first_chunk = F.pad(chunks_S.cumsum(0, dtype=torch.int32), (1, 0))
    return PairBlocks(order, rows, tile_map(order, rows), tile_map(order, chunk_rows), first_chunk)
