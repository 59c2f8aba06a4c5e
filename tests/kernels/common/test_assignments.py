"""The order of assignments against one made of Python lists, and the tiles and maps of it by their invariants."""

from __future__ import annotations

import itertools

import pytest
import torch

from hecate.kernels.common.assignments import assignment_tiles, num_tiles_bound
from tests.kernels.common.order_cases import CASES, random_slots
from tests.kernels.plain_orders import assignment_order, tile_map


@pytest.mark.parametrize("name", CASES)
def test_against_lists(name: str) -> None:
    _, k, slots, _ = CASES[name]
    slot_TK = random_slots(*CASES[name])
    of_assignment = slot_TK.flatten().tolist()
    here = [assignment for slot in range(slots) for assignment, chosen in enumerate(of_assignment) if chosen == slot]
    elsewhere = [assignment for assignment, chosen in enumerate(of_assignment) if chosen == -1]

    order = assignment_order(slot_TK, slots)
    assert order.order_P.tolist() == here + elsewhere
    assert order.token_P.tolist() == [assignment // k for assignment in here + elsewhere]
    place = {assignment: at for at, assignment in enumerate(here)}
    assert order.place_TK.flatten().tolist() == [place.get(assignment, -1) for assignment in range(len(of_assignment))]
    assert order.starts.diff().tolist() == [of_assignment.count(slot) for slot in range(slots)]
    assert order.starts.tolist() == [0, *itertools.accumulate(of_assignment.count(slot) for slot in range(slots))]
    assert (order.num_assignments, order.num_slots) == (len(of_assignment), slots)


def test_a_case_worked_by_hand() -> None:
    # Token 0 chose slots 1 and 0, token 1 slot 1 and one elsewhere, token 2 slots 0 and 1.
    order = assignment_order(torch.tensor([[1, 0], [1, -1], [0, 1]]), 3)
    assert order.order_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert order.token_P.tolist() == [0, 2, 0, 1, 2, 1]
    assert order.place_TK.tolist() == [[2, 0], [3, -1], [1, 4]]
    assert order.starts.tolist() == [0, 2, 5, 5]


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


def test_tiles_hold_each_assignment_on_this_rank_once() -> None:
    slot_TK = torch.randint(-1, 3, (75, 2), generator=torch.Generator().manual_seed(0))
    tiles, order_P = assignment_tiles(slot_TK, 20)
    assert max(len(tile.assignment) for tile in tiles) == 20
    seen = set()
    for tile in tiles:
        assert (slot_TK.flatten()[tile.assignment] == tile.slot).all()
        assert torch.equal(tile.token, tile.assignment // 2)
        assert torch.equal(tile.assignment, order_P[tile.span])
        assert tile.first == (tile.slot not in seen)
        seen.add(tile.slot)
    found = [assignment for tile in tiles for assignment in tile.assignment.tolist()]
    assert sorted(found) == (slot_TK.flatten() >= 0).nonzero().flatten().tolist()
