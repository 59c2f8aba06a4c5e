"""The order of pairs against one made of Python lists, and its invariants."""

from __future__ import annotations

import itertools

import pytest
import torch

from hecate.kernels.common.assignments import assignment_order

CASES = {
    # tokens, k, slots, share of choices elsewhere
    "plain": (23, 2, 4, 0.0),
    "k 1": (23, 1, 4, 0.2),
    "more slots than pairs": (3, 2, 50, 0.3),
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


@pytest.mark.parametrize("name", CASES)
def test_against_lists(name: str) -> None:
    _, k, slots, _ = CASES[name]
    slot_TK = random_slots(*CASES[name])
    of_pair = slot_TK.flatten().tolist()
    here = [pair for slot in range(slots) for pair, chosen in enumerate(of_pair) if chosen == slot]
    elsewhere = [pair for pair, chosen in enumerate(of_pair) if chosen == -1]

    order = assignment_order(slot_TK, slots)
    assert order.order_P.tolist() == here + elsewhere
    assert order.token_P.tolist() == [pair // k for pair in here + elsewhere]
    place = {pair: at for at, pair in enumerate(here)}
    assert order.place_TK.flatten().tolist() == [place.get(pair, -1) for pair in range(len(of_pair))]
    assert order.sizes_S.tolist() == [of_pair.count(slot) for slot in range(slots)]
    assert order.starts.tolist() == [0, *itertools.accumulate(of_pair.count(slot) for slot in range(slots))]
    assert (order.num_assignments, order.num_slots) == (len(of_pair), slots)


def test_a_case_worked_by_hand() -> None:
    # Token 0 chose slots 1 and 0, token 1 slot 1 and one elsewhere, token 2 slots 0 and 1.
    order = assignment_order(torch.tensor([[1, 0], [1, -1], [0, 1]]), 3)
    assert order.order_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert order.token_P.tolist() == [0, 2, 0, 1, 2, 1]
    assert order.place_TK.tolist() == [[2, 0], [3, -1], [1, 4]]
    assert order.starts.tolist() == [0, 2, 5, 5]
