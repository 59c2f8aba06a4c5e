from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hecate.data.pack import LOOK_AHEAD_SAMPLES, Piece, pack

LENGTHS = st.lists(st.integers(1, 20), max_size=200)


def rows_of(lengths: list[int], seq_len: int, packing: bool = True) -> list[list[Piece]]:
    return list(pack(iter([Piece(0, i, length) for i, length in enumerate(lengths)]), seq_len, packing))


@given(LENGTHS)
def test_every_sample_once_and_no_row_too_full(lengths: list[int]) -> None:
    sequences = rows_of(lengths, 20)
    assert sorted(piece.sample for sequence in sequences for piece in sequence) == list(range(len(lengths)))
    assert all(0 < sum(piece.length for piece in sequence) <= 20 for sequence in sequences)


@given(LENGTHS)
def test_the_oldest_waiting_sample_starts_each_row(lengths: list[int]) -> None:
    sequences = rows_of(lengths, 20)
    assert all(earlier[0].sample < later[0].sample for earlier, later in pairwise(sequences))
    for number, sequence in enumerate(sequences):
        placed_before = sum(len(earlier) for earlier in sequences[:number])
        assert max(piece.sample for piece in sequence) < placed_before + LOOK_AHEAD_SAMPLES


def lengths_of(sequences: list[list[Piece]]) -> list[list[int]]:
    return [[piece.length for piece in sequence] for sequence in sequences]


def test_by_hand() -> None:
    # 5 is first; only 4 and 1 make up the other 5. Then 7 and 3; then 6.
    assert lengths_of(rows_of([5, 7, 4, 3, 6, 1], 10)) == [[5, 4, 1], [7, 3], [6]]
    # The longest that fits beside 4 is 5, but two 3 fill the sequence.
    assert lengths_of(rows_of([4, 5, 3, 3], 10)) == [[4, 3, 3], [5]]
    # 6 or 3 + 3 fill the sequence: whoever has waited longer.
    assert lengths_of(rows_of([2, 6, 3, 3], 8)) == [[2, 6], [3, 3]]
    assert lengths_of(rows_of([2, 3, 6, 3], 8)) == [[2, 3, 3], [6]]


def test_short_samples_fill_sequences() -> None:
    lengths = np.random.default_rng(0).integers(15, 45, 3000).tolist()
    for seq_len in (256, 512, 4096):
        sequences = rows_of(lengths, seq_len)
        assert sum(lengths) / (seq_len * (len(sequences) - 1)) > 0.99, seq_len


def test_without_packing_one_sample_a_row() -> None:
    assert [[piece.sample for piece in sequence] for sequence in rows_of([1, 2, 3], 10, packing=False)] == [[0], [1], [2]]
