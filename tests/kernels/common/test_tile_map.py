"""The tile map by its invariants: every row that is here lies in one tile, each tile in one slot."""

from __future__ import annotations

import pytest
import torch

from hecate.kernels.common.assignments import assignment_order, num_tiles_bound, tile_map
from tests.kernels.common.test_assignments import CASES, random_slots


@pytest.mark.parametrize("rows", [1, 4, 16, 1000])
@pytest.mark.parametrize("name", CASES)
def test_tiles_hold_each_row_once(name: str, rows: int) -> None:
    order = assignment_order(random_slots(*CASES[name]), CASES[name][2])
    tiles = tile_map(order, rows)
    assert tiles.dtype == torch.int32
    assert len(tiles) == num_tiles_bound(order.num_assignments, order.num_slots, rows)
    starts, covered, used = order.starts.tolist(), [], True
    for slot, first, size in tiles.tolist():
        assert used or size == 0, "a tile behind the first empty one has rows"
        used = size > 0
        assert size <= rows
        if used:
            assert starts[slot] <= first
            assert first + size <= starts[slot + 1]
            assert size == rows or first + size == starts[slot + 1], "only a slot's last tile may have fewer rows"
        else:
            assert (slot, first) == (0, 0)
        covered += range(first, first + size)
    assert covered == list(range(starts[-1]))


def test_the_bound_is_reached() -> None:
    """Groups of one row more than full tiles."""
    order = assignment_order(torch.tensor([0] * 5 + [1] * 9 + [2])[:, None], 3)
    assert tile_map(order, 4).tolist() == [[0, 0, 4], [0, 4, 1], [1, 5, 4], [1, 9, 4], [1, 13, 1], [2, 14, 1]]
    assert num_tiles_bound(15, 3, 4) == 6
