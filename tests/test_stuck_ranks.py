"""What a test says whose ranks do not end."""

import time

import pytest

from testing.ranks import run_ranks


def _sleep_for_long(rank: int, world: int) -> None:
    if rank:
        time.sleep(60)


def test_ranks_that_do_not_end_are_reported_with_what_they_did() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] of 2 had not ended after 5 s; killed\nrank 1:.*in _sleep_for_long"):
        run_ranks(2, _sleep_for_long, timeout=5)
