"""What several of the tables need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hecate.ranks.ranks import Ranks, join_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with join_ranks() as alone:
        yield alone
