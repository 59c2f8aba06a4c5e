"""Assignments: which expert each token is routed to, and in what order and pieces kernels work on them.

An assignment is a token with one of its top-k experts, so a token has k of them. Kernels take them sorted by slot, the place of an
expert's weights on this rank, so that neighbouring rows are multiplied by the same weights. `assignment_order` sorts on the device without
waiting for it, so every size known to the host is an upper bound; `assignment_tiles` reads the group sizes back, for the torch path.

Shapes: T tokens, K assignments of a token, P = T·K places of the sorted assignments, S slots, D hidden, m assignments of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one layer that are on this rank, and the slots and weights that the router gave them."""

    x_TD: Tensor
    slot_TK: Tensor
    """int64, the slot of each assignment; -1: that assignment is computed elsewhere and adds nothing to the result"""
    weight_TK: Tensor
    """the router's weights"""
    token_T: Tensor | None = None
    """int64, the global number of each token; needed with dropout"""
    expert_S: Tensor | None = None
    """int64, the number of the expert in each slot; needed with dropout"""

    @property
    def expert_TK(self) -> Tensor:
        """int64, the expert of each assignment; of the last slot where it is computed elsewhere. Needs `expert_S`."""
        assert self.expert_S is not None, "the experts in the slots are not given"
        return self.expert_S.to(self.slot_TK.device)[self.slot_TK]


@dataclass(frozen=True)
class AssignmentOrder:
    """The assignments sorted by slot. Within a slot the earlier token comes first, so sums over a slot have one order.

    There are always P = T·K places. Assignments that are computed elsewhere (slot -1) take the last of them, from `starts[-1]` on.
    """

    order_P: Tensor
    """int64 [P], the assignment at each place, an index into the flattened [T, K]"""
    token_P: Tensor
    """int32 [P], its token"""
    place_TK: Tensor
    """int32 [T, K], the place of each assignment; -1 where it is computed elsewhere"""
    starts: Tensor
    """int32 [S + 1], the first place of each slot, then the number of assignments that are computed on this rank"""
    tile_maps: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """what `tile_map` made of it, by rows of a tile"""

    @property
    def num_assignments(self) -> int:
        """P, those elsewhere included."""
        return self.order_P.numel()

    @property
    def num_slots(self) -> int:
        return self.starts.numel() - 1

    @property
    def sizes_S(self) -> Tensor:
        """int32 [S], the number of assignments of each slot."""
        return self.starts.diff()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an operator is given or returns; `of_tensors` puts it together again."""
        return self.order_P, self.token_P, self.place_TK, self.starts

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> AssignmentOrder:
        """What `tensors` took apart."""
        order_P, token_P, place_TK, starts = tensors
        return AssignmentOrder(order_P, token_P, place_TK, starts)


def assignment_order(slot_TK: Tensor, num_slots: int) -> AssignmentOrder:
    """The assignments of `slot_TK` (integers [T, K], each in -1 … num_slots - 1) in the order of their slots."""
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


def fake_order(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes and types of an `AssignmentOrder`'s, for an operator's fake implementation."""
    num_assignments = slot_TK.numel()
    return (
        slot_TK.new_empty(num_assignments, dtype=torch.int64),
        slot_TK.new_empty(num_assignments, dtype=torch.int32),
        slot_TK.new_empty(slot_TK.shape, dtype=torch.int32),
        slot_TK.new_empty(num_slots + 1, dtype=torch.int32),
    )


def tile_map(order: AssignmentOrder, rows: int) -> Tensor:
    """int32 [tiles, 3]: slot, first row (a place of the order) and number of rows of each tile, which has one slot and at most `rows` rows.

    A program of a grouped kernel works on the rows of one tile. Tiles come in the order of their rows. There are as many as any group
    sizes could need; the surplus tiles at the end have slot 0 and no rows. A map is made once for an order.
    """
    if rows not in order.tile_maps:
        order.tile_maps[rows] = _tile_map(order, rows)
    return order.tile_maps[rows]


def num_tiles_bound(num_assignments: int, num_slots: int, rows: int) -> int:
    """Tiles of `rows` rows that so many assignments in `num_slots` groups may need: only a group's last tile may not be full."""
    return num_assignments // rows + min(num_slots, num_assignments) if num_slots else 0


def _tile_map(order: AssignmentOrder, rows: int) -> Tensor:
    num_slots = order.num_slots
    num_tiles = num_tiles_bound(order.num_assignments, num_slots, rows)
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


@dataclass(frozen=True)
class AssignmentBlocks:
    """An order with the two maps (see `tile_map`) of what programs work on: tiles, and chunks over which gradients are summed first."""

    order: AssignmentOrder
    rows: int
    """of a tile at most"""
    tiles: Tensor
    """int32 [tiles, 3]"""
    chunks: Tensor
    """int32 [chunks, 3]; a hot slot's gradients are summed by many programs, each over one chunk, and then over the chunks in turn"""
    first_chunk: Tensor
    """int32 [S + 1]: the chunks of slot s are first_chunk[s] … first_chunk[s + 1] - 1"""

    def tensors(self) -> tuple[Tensor, ...]:
        """What an operator is given; `of_tensors` puts it together again."""
        return *self.order.tensors(), self.tiles, self.chunks, self.first_chunk

    @staticmethod
    def of_tensors(rows: int, tensors: Sequence[Tensor]) -> AssignmentBlocks:
        """What `tensors` took apart."""
        *order, tiles, chunks, first_chunk = tensors
        return AssignmentBlocks(AssignmentOrder.of_tensors(order), rows, tiles, chunks, first_chunk)


def assignment_blocks(order: AssignmentOrder, rows: int, chunk_rows: int) -> AssignmentBlocks:
    """Cut into tiles of at most `rows` and chunks of at most `chunk_rows` assignments, without waiting for the device."""
    chunks_S = (order.sizes_S + (chunk_rows - 1)).div(chunk_rows, rounding_mode="floor")
    first_chunk = F.pad(chunks_S.cumsum(0, dtype=torch.int32), (1, 0))
    return AssignmentBlocks(order, rows, tile_map(order, rows), tile_map(order, chunk_rows), first_chunk)


@dataclass(frozen=True)
class Tile:
    """Assignments of one slot, for the torch path."""

    slot: int
    token: Tensor
    """int64 [m]"""
    assignment: Tensor
    """int64 [m], index into the flattened [T, K]"""
    span: slice
    """where they lie among all assignments of the tiles"""
    first: bool
    """whether it is the first tile of its slot"""


def assignment_tiles(slot_TK: Tensor, rows: int) -> tuple[list[Tile], Tensor]:
    """The tiles, of at most `rows` assignments, and the assignments (int64, indices into the flattened [T, K]) in their order.

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
