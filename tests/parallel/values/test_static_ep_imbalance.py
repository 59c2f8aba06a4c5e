"""What static expert parallelism would have made of a step's loads."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.parallel.values.placement import everything_everywhere, new_copies, owners_only
from hecate.parallel.values.static_ep_imbalance import static_ep_imbalance, static_ep_served
from hecate.parallel.values.units import Unit


def test_experts_are_dealt_in_blocks() -> None:
    # Five experts on two ranks: 0, 1 and 2 on the first; two sharding groups, each of which keeps its own tokens.
    loads_EG = np.array([[1, 10], [2, 20], [4, 40], [8, 80], [16, 160]])
    assert static_ep_served(loads_EG, 2).tolist() == [7, 24, 70, 240]


def test_a_step_is_the_mean_of_its_units() -> None:
    even = np.array([[3, 1], [1, 3]])
    skewed = np.array([[4, 4], [0, 0]])
    assert static_ep_imbalance({Unit(0): even, Unit(1): skewed}, shard_size=2) == 1.5
    assert static_ep_imbalance({Unit(1): skewed}, shard_size=1) == 1.0, "each rank computes its own tokens"
    assert static_ep_imbalance({Unit(0): np.array([[6, 6, 6, 6]])}, shard_size=4) == 4.0, "three of the ranks have nothing to do"
    assert static_ep_imbalance({}, shard_size=2) == 1.0


@pytest.mark.parametrize(("before", "count"), [(None, 3), ("owners", 3), ("everywhere", 0), ("other", 3)])
def test_copies_that_were_not_there(before: str | None, count: int) -> None:
    owner_E = np.array([0, 1, 1])
    placements = {
        "owners": owners_only(owner_E, 2),
        "everywhere": everything_everywhere(owner_E, 2),
        "other": everything_everywhere(owner_E, 3),
    }
    assert new_copies(placements[before] if before else None, everything_everywhere(owner_E, 2)) == count
    assert new_copies(None, owners_only(owner_E, 2)) == 0
