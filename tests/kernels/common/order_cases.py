"""Chosen slots to be sorted."""

from __future__ import annotations

import torch

CASES = {
    # tokens, k, slots, share of assignments elsewhere
    "plain": (23, 2, 4, 0.0),
    "k 1": (23, 1, 4, 0.2),
    "more slots than assignments": (3, 2, 50, 0.3),
    "one slot": (9, 3, 1, 0.5),
    "all elsewhere": (9, 2, 4, 1.1),
    "no slots": (9, 2, 0, 1.1),
    "no tokens": (0, 2, 4, 0.0),
    "more slots than int16 holds": (9, 2, 40_000, 0.3),
}


def random_slots(tokens: int, k: int, slots: int, elsewhere: float) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    slot_TK = torch.randint(max(slots, 1), (tokens, k), generator=random)
    return slot_TK.masked_fill(torch.rand(slot_TK.shape, generator=random) < elsewhere, -1)
