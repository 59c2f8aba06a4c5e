"""The replicas that `auto` brings for the tokens' sake, worked out by hand for four experts of two ranks."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.parallel.cost.cost_loops import layer_loads
from hecate.parallel.cost.cost_model import topology_numbers
from hecate.parallel.loops.replica_lists import no_replicas, only_owners
from hecate.parallel.planners.replication import NODES, NODES_BUT_ONE, OWNERS, WANTED, expert_orders, replicate
from testing.unit_cases import unit_topology

OWNER = np.array([0, 0, 1, 1])
TOKENS = ([5.0, 1.0, 3.0, 0.0], [2.0, 4.0, 0.0, 1.0])
"""by source rank; 7, 5, 3 and 1 in all"""


def brought(
    rule: int,
    slots: tuple[int, ...],
    *,
    tokens: tuple[list[float], ...] = TOKENS,
    nodes: tuple[int, ...] = (0, 0),
    owner: np.ndarray = OWNER,
    cost_in_rows: float = 3.0,
) -> list[list[int]]:
    """The ranks of each expert, where one costs as much to bring as 3 tokens to send."""
    numbers = topology_numbers(unit_topology(nodes))
    loads = layer_loads(np.array(tokens), numbers)
    replicas = no_replicas(len(owner), len(nodes))
    only_owners(replicas, owner)
    orders = expert_orders(owner, np.array(slots), loads, numbers)
    replicate(rule, owner, np.array(slots), cost_in_rows, orders, loads, numbers, replicas)
    return [np.flatnonzero(row).tolist() for row in replicas.has_ED]


def test_what_each_rank_and_node_wants() -> None:
    numbers = topology_numbers(unit_topology((0, 0)))
    orders = expert_orders(OWNER, np.array([1, 2]), layer_loads(np.array(TOKENS), numbers), numbers)
    assert orders.by_load_E.tolist() == [0, 1, 2, 3]
    assert orders.rank_DE.tolist() == [[2, -1], [1, 0]], "of other owners, those with tokens here"
    assert orders.node_NE.tolist() == [[0, 1, 2, 3]]


def test_ties_differ_from_rank_to_rank() -> None:
    """Or all ranks would ask the same owner at once: rank d begins at its own share of the experts."""
    numbers = topology_numbers(unit_topology((0, 0, 0)))
    owner = np.array([0, 0, 0])
    orders = expert_orders(owner, np.array([0, 1, 1]), layer_loads(np.ones((3, 3)), numbers), numbers)
    assert orders.rank_DE.tolist() == [[-1], [1], [2]]


def test_the_owners_alone() -> None:
    assert brought(OWNERS, (4, 4)) == [[0], [0], [1], [1]]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ((1, 2), [[0, 1], [0, 1], [0, 1], [1]]),  # whatever has tokens and room
        ((1, 1), [[0], [0, 1], [0, 1], [1]]),  # rank 1 prefers expert 1
        ((4, 4), [[0, 1]] * 4),  # room for all: everything everywhere
    ],
)
def test_wanted_experts(slots: tuple[int, ...], expected: list[list[int]]) -> None:
    assert brought(WANTED, slots) == expected


def test_each_node_gets_one_copy_of_what_it_wants_most() -> None:
    """Nodes {0, 1} and {2, 3}, all experts at rank 0. Node 1's tokens want expert 1 most, then 2; both go where there is room, the first to
    the lower rank, and the next to the less busy one. Expert 3, with 3 tokens, is not worth as many."""
    tokens = ([9.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0, 8.0, 1.0, 0.0], [0.0, 0.0, 4.0, 3.0])
    owner = np.zeros(4, dtype=np.int64)
    found = brought(NODES, (4, 4, 4, 4), cost_in_rows=6.0, tokens=tokens, nodes=(0, 0, 1, 1), owner=owner)
    assert found == [[0], [0, 2], [0, 3], [0]]
    # The other rule leaves a slot of each rank free.
    found = brought(NODES_BUT_ONE, (1, 1, 1, 2), tokens=tokens, nodes=(0, 0, 1, 1), owner=owner)
    assert found == [[0], [0, 3], [0], [0]]
