"""(token, choice) pairs sorted by the slot they chose, on the device: what permutes tokens to their experts and back.

Nothing here waits for the device, so every size known to the host is an upper bound: there are always T·K places, and the pairs whose
choice is computed elsewhere (slot -1) take the last of them, behind `starts[-1]`.

Shapes: T tokens, K choices, P = T·K pairs, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairOrder:
    """A permutation of pairs. Of one slot's pairs, the earlier token comes first, so sums over them have one order."""

    order_P: Tensor
    """int64 [P], the pair at each place, an index into the flattened [T, K]"""
    token_P: Tensor
    """int32 [P], its token"""
    place_TK: Tensor
    """int32 [T, K], the place of each pair; -1 where its choice is computed elsewhere"""
    starts: Tensor
    """int32 [S + 1], the first place of each slot, then the number of pairs that are here"""
    tile_maps: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """what `tile_map` made of it, by rows of a tile"""

    @property
    def num_pairs(self) -> int:
        """P, those elsewhere included."""
        return self.order_P.numel()

    @property
    def num_slots(self) -> int:
        return self.starts.numel() - 1

    @property
    def sizes_S(self) -> Tensor:
        """int32 [S], the number of pairs of each slot."""
        return self.starts.diff()


def pair_order(slot_TK: Tensor, num_slots: int) -> PairOrder:
    """The pairs of `slot_TK` (integers [T, K], each in -1 … num_slots - 1) in the order of their slots, and in their own within one."""
    slot = slot_TK.flatten()
    # A radix sort takes a pass for each few bits of its keys.
    key = torch.where(slot < 0, num_slots, slot).to(torch.int16 if num_slots < 2**15 else torch.int32)
    key_P, order_P = torch.sort(key, stable=True)
    bounds = torch.arange(num_slots + 1, dtype=key.dtype, device=key.device)
    starts = torch.searchsorted(key_P, bounds, out_int32=True)
    place = torch.empty_like(order_P, dtype=torch.int32)
    place.scatter_(0, order_P, torch.arange(slot.numel(), dtype=torch.int32, device=slot.device))
    token_P = (order_P // slot_TK.shape[1]).to(torch.int32)
    return PairOrder(order_P, token_P, torch.where(slot < 0, -1, place).view(slot_TK.shape), starts)
