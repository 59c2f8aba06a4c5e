"""Both sides of `benchmarks.beside_trl` get the same rows, and a result is refused where they do not train the same."""

from __future__ import annotations

import pytest

from benchmarks.beside_trl import LENGTH, RANKS, ROWS, require_same_losses, rows_of


def _tokens(text: str) -> list[int]:
    """A token for each three letters of a word."""
    return [len(word) for word in text.split(" ") for _ in range(0, len(word), 3)]


def test_each_row_leaves_room_for_the_end_alone() -> None:
    words = [f"{number}" * (1 + number % 7) for number in range(100, 999)]
    rows = rows_of(" ".join(words), _tokens)
    assert [len(_tokens(row)) for row in rows] == [LENGTH - 1] * (RANKS * ROWS)
    assert len({*rows}) == len(rows)


def test_losses_that_differ_give_no_result() -> None:
    require_same_losses([3.0, 2.0], [3.001, 1.999])
    with pytest.raises(SystemExit, match=r"loss 2\.1 of hecate and 2 of TRL in step 2; no result"):
        require_same_losses([3.0, 2.1], [3.0, 2.0])
    with pytest.raises(SystemExit, match="hecate has taken 1 steps, and TRL 2; no result"):
        require_same_losses([3.0], [3.0, 2.0])
