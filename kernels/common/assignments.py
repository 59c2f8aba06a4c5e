"""The assignments of tokens to experts, sorted and cut into the tiles that kernels work on.

An assignment is a token with one of its top-k experts, so a token has k of them. Kernels take assignments sorted by slot, the index of
an expert's weights on this rank, so that neighbouring rows are multiplied by the same weights. `hecate.kernels.common.sorting` sorts on the
device without waiting for it, so all sizes on the host are upper bounds; `assignment_tiles`, for the torch path, reads the sizes back.

Shapes: T tokens, K assignments of a token, P places of the sorted assignments (T·K at most), S slots, D hidden, m assignments of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hecate.kernels.common.operands import Operands


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one layer on this rank, and the slots and weights that the router has assigned to them."""

    x_TD: Tensor
    slot_TK: Tensor
    """int64, the slot of each assignment; -1: that assignment is computed elsewhere and adds nothing to the result"""
    weight_TK: Tensor
    """the router's weights"""
    token_T: Tensor | None = None
    """int64, the global number of each token; needed with dropout"""
    expert_S: Tensor | None = None
    """int64, the number of the expert in each slot; needed with dropout, and by experts with pairs"""
    served: int | None = None
    """the number of assignments that have a slot, where the host knows it: kernels have room for so many; None: for all"""

    @property
    def places(self) -> int:
        """Return for how many assignments kernels have room."""
        return self.slot_TK.numel() if self.served is None else self.served

    @property
    def experts_in_slots(self) -> Tensor:
        """Return `expert_S`, which must be given."""
        assert self.expert_S is not None, "the experts in the slots are not given"
        return self.expert_S


@dataclass(frozen=True)
class AssignmentOrder(Operands):
    """The assignments sorted by slot. Within a slot the earlier token comes first, so sums over a slot have one order.

    There are P = T·K places, of which assignments that are computed elsewhere (slot -1) take the last, from `starts[-1]` on. Where the host
    knows how many those are (`RoutedTokens.served`), they have none.
    """

    order_P: Tensor
    """int64 [P], the assignment at each place, as an index into the flattened [T, K]"""
    token_P: Tensor
    """int32 [P], the token at each place"""
    place_TK: Tensor
    """int32 [T, K], the place of each assignment; -1 where it is computed elsewhere"""
    starts: Tensor
    """int32 [S + 1], the first place of each slot, and last the number of assignments that are computed on this rank"""
    tile_maps: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """the tile maps of this order that were needed so far (`hecate.kernels.common.sorting.kept_tile_map`), by the rows of a tile"""

    @property
    def num_assignments(self) -> int:
        """P, the number of places: at least that of the assignments that this rank computes."""
        return self.order_P.numel()

    @property
    def num_slots(self) -> int:
        return self.starts.numel() - 1


def num_tiles_bound(num_assignments: int, num_slots: int, rows: int) -> int:
    """Return the most tiles of `rows` rows that the assignments of `num_slots` groups can need: only a group's last tile is not full."""
    return num_assignments // rows + min(num_slots, num_assignments) if num_slots else 0


@dataclass(frozen=True)
class AssignmentBlocks:
    """An order with two maps (`hecate.kernels.common.sorting.kept_tile_map`): the tiles that programs work on, and the chunks over which
    gradients are summed first."""

    order: AssignmentOrder
    rows: int
    """the most rows of a tile"""
    tiles: Tensor
    """int32 [tiles, 3]: the slot, first row and number of rows of each tile"""
    chunks: Tensor
    """int32 [chunks, 3]; a hot slot's gradients are summed by many programs, each over one chunk, and then over the chunks in turn"""
    first_chunk: Tensor
    """int32 [S + 1]: the chunks of slot s are first_chunk[s] … first_chunk[s + 1] - 1"""


@dataclass(frozen=True)
class Tile:
    """Assignments of one slot, for the torch path."""

    slot: int
    token: Tensor
    """int64 [m]: the token of each assignment"""
    assignment: Tensor
    """int64 [m]: each assignment's index into the flattened [T, K]"""
    span: slice
    """the range of these assignments among those of all tiles"""
    first: bool
    """whether it is the first tile of its slot"""


def assignment_tiles(slot_TK: Tensor, rows: int) -> tuple[list[Tile], Tensor]:
    """Return tiles of at most `rows` assignments, and the assignments in their order, int64 indices into the flattened [T, K].

    Assignments of slot -1 are left out. On CUDA the group sizes are read back to the host.
    """
    slot = slot_TK.flatten()
    # Slices of the tiles are made on the host, so it waits for the sizes: the torch path's one wait.
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
