"""Which frozen parts stay where, and what moves when that changes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hecate.parallel.transfer.residency import (
    Residency,
    expected_uses,
    frozen_move,
    never_gives_up,
    residency_from_json,
    residency_to_json,
)


def rows(text: str) -> np.ndarray:
    """bool [experts, ranks] from words, one an expert: "10 01"."""
    return np.array([[mark == "1" for mark in word] for word in text.split()])


def residency(slots: list[int]) -> Residency:
    """Experts 0-3 on rank 0, 4 on rank 1."""
    return Residency.of_owners(np.array([0, 0, 0, 0, 1]), np.array(slots))


def fetched(before: Residency, after: Residency) -> np.ndarray:
    """bool [experts, ranks]: what the moves of all ranks bring, of which each is sent once and received once."""
    moves = [frozen_move(before, after, rank) for rank in range(len(before.slots_D))]
    arrives_ED = np.zeros_like(before.held_ED)
    sent = 0
    for rank, move in enumerate(moves):
        assert (move.exchange is None) == (move.copies == 0)
        if move.exchange is not None:
            arrives_ED[move.exchange.received.expert_M, rank] = True
            assert all(before.held_ED[expert, rank] for expert in move.exchange.sent.expert_M), "a rank sends what it does not hold"
            sent += len(move.exchange.sent.expert_M)
        held_E = before.held_ED[:, rank] | arrives_ED[:, rank]
        held_E[list(move.dropped)] = False
        assert (held_E == after.held_ED[:, rank]).all(), rank
    assert sent == arrives_ED.sum() == moves[0].copies
    return arrives_ED


def test_the_most_recently_needed_stay_while_there_is_room() -> None:
    """Rank 1 keeps two of rank 0's experts."""
    before = residency([0, 2])
    steps = [
        ("11 10 10 10 01", "01 00 00 00 00", "11 10 10 10 01"),  # 0 comes
        ("10 11 10 10 01", "00 01 00 00 00", "11 11 10 10 01"),  # 1 comes, 0 has room
        ("11 10 10 10 01", "00 00 00 00 00", "11 11 10 10 01"),  # nothing has to come
        ("10 10 11 10 01", "00 00 01 00 00", "11 10 11 10 01"),  # 2 comes; 1 was needed before 0 was
        ("10 11 11 11 01", "00 01 00 01 00", "10 11 11 11 01"),  # three are needed: nothing else stays
        ("10 10 10 10 01", "00 00 00 00 00", "10 11 11 10 01"),  # of three needed equally lately the highest index goes
    ]
    for number, (where, fresh, held) in enumerate(steps):
        after = before.need(rows(where))
        assert (fetched(before, after) == rows(fresh)).all(), f"step {number}"
        assert (after.held_ED == rows(held)).all(), f"step {number}"
        before = after


def test_borrowing_everything_leaves_what_was_needed_last() -> None:
    before = residency([1, 2]).need(rows("10 10 10 11 01")).need(rows("10 11 10 10 01"))
    borrowed = before.hold_for_now(np.ones((5, 2), dtype=bool))
    assert (fetched(before, borrowed) == rows("01 00 01 00 10")).all()
    assert borrowed.held_ED.all()
    returned = borrowed.evict()
    assert not fetched(borrowed, returned).any()
    assert (returned.held_ED == rows("10 11 10 11 11")).all(), "rank 0 has room for one, rank 1 for two"


def test_an_expert_that_leaves_its_rank_stays_as_a_replica() -> None:
    before = residency([1, 1]).need(rows("11 10 10 10 01"))
    after = before.change_owners(np.array([1, 1, 0, 0, 1]))
    assert (fetched(before, after) == rows("00 01 00 00 00")).all(), "0 was there already"
    assert (after.held_ED == rows("11 01 10 10 01")).all(), "rank 0 keeps one of the two that left it"
    assert [after.replicas_on(rank) for rank in (0, 1)] == [1, 0]
    home = before.change_owners(np.zeros(5, dtype=np.int64))
    assert (home.held_ED == rows("10 10 10 10 11")).all(), "on rank 1, what leaves it counts as used after the replica of 0"


def test_a_replica_is_worth_the_steps_that_such_replicas_were_used_for() -> None:
    """Rank 0 always holds expert 4. In one layer rank 1 fetches another expert in each step; in the other one it keeps one for good."""
    fickle = constant = residency([1, 1])
    for step in range(200):
        fickle = fickle.need(rows("11 10 10 10 11" if step % 2 else "10 11 10 10 11")).after_step()
        constant = constant.need(rows("11 10 10 10 11")).after_step()
    assert expected_uses([fickle]) == 1.5, "the fewest that are expected: each is used once"
    assert expected_uses([constant]) == 200, "the most that are expected"
    # Each layer has two replicas in use, and one of ten layers fetches one in each step: 20 uses for each fetch, of which a third counts.
    assert 20 / 3 < expected_uses([fickle] + 9 * [constant]) < 8
    assert 5 < expected_uses([residency([1, 1])]) < 10, "before any step"


def test_where_nothing_is_given_up_a_replica_is_used_to_the_end_of_the_run() -> None:
    """Rank 0 owns four of five experts, so one slot there and four on rank 1 hold all."""
    ample, scarce = residency([1, 4]), residency([1, 3])
    assert (never_gives_up([ample]), never_gives_up([scarce]), never_gives_up([ample, scarce])) == (True, False, False)
    assert [expected_uses([ample], left) for left in (1, 37, 10_000)] == [1, 37, 200]
    assert expected_uses([ample, scarce], 10_000) == expected_uses([scarce]) == expected_uses([ample])
    assert expected_uses([scarce], 3) == 3, "no more than are left"


def test_a_residency_is_a_value() -> None:
    """What follows from it leaves it as it was."""
    before = residency([1, 1]).need(rows("11 10 10 10 01"))
    copies = [array.copy() for array in (before.owner_E, before.held_ED, before.needed_ED, before.last_use_ED)]
    before.need(rows("10 11 11 10 11")).evict()
    borrowed = before.hold_for_now(np.ones((5, 2), dtype=bool))
    borrowed.evict()
    assert borrowed.held_ED.all()
    before.change_owners(np.array([1, 1, 0, 0, 1])).need(rows("11 01 11 10 11"))
    for array, copy in zip((before.owner_E, before.held_ED, before.needed_ED, before.last_use_ED), copies, strict=True):
        assert (array == copy).all()


def test_a_residency_is_read_as_it_was_written() -> None:
    state = residency([1, 2])
    for where in ("11 10 10 10 01", "10 11 11 10 11", "10 10 11 10 01"):
        state = state.need(rows(where)).after_step()
    again = residency_from_json(json.loads(json.dumps(residency_to_json(state))), residency([1, 2]))
    assert (again.held_ED == state.held_ED).all()
    assert state.replicas_on(1) == 2
    following = rows("10 10 10 11 01")
    assert (again.need(following).held_ED == state.need(following).held_ED).all(), "what was used last stays"
    assert expected_uses([again.after_step()]) == expected_uses([state.after_step()])
    assert (residency_from_json(residency_to_json(state), residency([0, 0])).held_ED == (state.owned_ED | state.needed_ED)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"held": [[5, 0, 1, 1, 1]]},
        {"held": [[0, 2, 1, 1, 1]]},
        {"held": [[0, 1, 9, 1, 1]]},
        {"held": [[0, 1]]},
        {"held": "all"},
        {"clock": None},
        {"uses": float("nan")},
        {"fetches": 0},
        {"uses": 10**400},
    ],
)
def test_what_is_no_residency_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no residency"):
        residency_from_json({**residency_to_json(residency([1, 2]).need(rows("11 10 10 10 01"))), **change}, residency([1, 2]))
