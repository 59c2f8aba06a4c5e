"""Sequences shared out by speed: worked examples, and no other division finishes earlier."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.values.sequence_shares import dense_seconds, sequences_by_speed, slowest_of_each


@pytest.mark.parametrize(
    ("num_sequences", "speed_D", "sequences_D"),
    [
        (8, [3, 3, 1, 1], [3, 3, 1, 1]),
        (8, [5.0, 5.0, 5.0, 5.0], [2, 2, 2, 2]),
        (5, [1.0, 1.0], [3, 2]),
        (4, [1.0, 0.5], [3, 1]),  # 3 and 1 sequence: 3 s and 2 s; 2 and 2 would take 4 s
        (6, [10.0, 10.0, 0.5], [3, 3, 0]),  # one sequence on the third would take 2 s, all six on the others 0.3 s
        (0, [1.0, 2.0], [0, 0]),
        (1, [1.0], [1]),
    ],
)
def test_worked_cases(num_sequences: int, speed_D: list[float], sequences_D: list[int]) -> None:
    assert sequences_by_speed(num_sequences, speed_D) == sequences_D


def test_groups_that_stay_together() -> None:
    """Four groups of three: the slow rank gets one, as it would of four sequences, and not four of the twelve."""
    assert sequences_by_speed(12, [1.0, 0.5], group_size=3) == [9, 3]
    assert sequences_by_speed(12, [1.0, 0.5]) == [8, 4]


@given(st.integers(0, 7), st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_no_other_deal_is_through_earlier(num_sequences: int, speed_D: list[float]) -> None:
    dealt = sequences_by_speed(num_sequences, speed_D)
    assert sum(dealt) == num_sequences
    others = (deal for deal in itertools.product(range(num_sequences + 1), repeat=len(speed_D)) if sum(deal) == num_sequences)
    assert dense_seconds(dealt, speed_D) <= min(dense_seconds(deal, speed_D) for deal in others) * (1 + 1e-12)


def test_a_group_is_as_fast_as_its_slowest() -> None:
    assert slowest_of_each([4.0, 3.0, 2.0, 5.0], 2) == [3.0, 2.0]
    assert slowest_of_each([4.0, 3.0], 1) == [4.0, 3.0]
