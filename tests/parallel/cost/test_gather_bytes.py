"""Port counts of a SparseAllGather against a simulation that walks every copy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.gather_bytes import PortBytes, leaders
from testing.unit_cases import unit_topology
from tests.parallel.plain_gather_ports import gather_ports

PORTS = tuple(field.name for field in fields(PortBytes))


@dataclass
class Case:
    nodes: tuple[int, ...]
    owner_E: np.ndarray
    where_ED: np.ndarray

    @property
    def topology(self) -> Topology:
        return unit_topology(self.nodes)

    def ports(self, *, two_level: bool) -> dict[str, list[float]]:
        got = gather_ports(self.owner_E, self.where_ED, self.topology, two_level=two_level)
        return {name: getattr(got, name).tolist() for name in PORTS}


@st.composite
def cases(draw: st.DrawFn, max_nodes: int = 4) -> Case:
    """Nodes of any size with ranks in any order, any owners, any replicas beside theirs."""
    world, experts = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    count = draw(st.integers(1, min(world, max_nodes)))
    rest = draw(st.lists(st.integers(0, count - 1), min_size=world - count, max_size=world - count))
    owner = draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts))
    row = st.lists(st.booleans(), min_size=world, max_size=world)
    where = np.array(draw(st.lists(row, min_size=experts, max_size=experts)))
    where[np.arange(experts), owner] = True
    return Case(tuple(draw(st.permutations([*range(count), *rest]))), np.array(owner), where)


def copies(case: Case, *, two_level: bool) -> list[tuple[int, int, int]]:
    """(expert, from, to) of every copy, in the order in which they can be made."""
    made = []
    for expert, owner in enumerate(case.owner_E.tolist()):
        wanting = [rank for rank in range(len(case.nodes)) if case.where_ED[expert, rank] and rank != owner]
        for node in sorted(set(case.nodes)):
            group = [rank for rank in wanting if case.nodes[rank] == node]
            if two_level and group and node != case.nodes[owner]:
                leader = group[expert % len(group)]
                made.append((expert, owner, leader))
                made += [(expert, leader, rank) for rank in group if rank != leader]
            else:
                made += [(expert, owner, rank) for rank in group]
    return made


def counted(case: Case, made: list[tuple[int, int, int]]) -> dict[str, list[float]]:
    ports = {name: [0.0] * len(case.nodes) for name in PORTS}
    for _, source, target in made:
        reach = "near" if case.nodes[source] == case.nodes[target] else "far"
        ports[f"{reach}_out_D"][source] += 1
        ports[f"{reach}_in_D"][target] += 1
    return ports


@given(cases())
def test_the_simulation_brings_each_replica_once_from_a_rank_that_has_it(case: Case) -> None:
    for two_level in (False, True):
        held = {(expert, owner) for expert, owner in enumerate(case.owner_E.tolist())}
        for expert, source, target in copies(case, two_level=two_level):
            assert (expert, source) in held
            assert (expert, target) not in held
            held.add((expert, target))
        assert held == {(int(e), int(r)) for e, r in np.argwhere(case.where_ED)}


@pytest.mark.parametrize("two_level", [False, True])
@given(case=cases())
def test_ports_are_those_of_a_walk_over_every_copy(two_level: bool, case: Case) -> None:
    assert case.ports(two_level=two_level) == counted(case, copies(case, two_level=two_level))


@given(cases())
def test_two_levels_carry_an_expert_once_per_node_that_wants_it(case: Case) -> None:
    wanted_of_node = Counter[int]()
    for expert, owner in enumerate(case.owner_E.tolist()):
        nodes = {case.nodes[rank] for rank in np.flatnonzero(case.where_ED[expert])}
        wanted_of_node.update(nodes - {case.nodes[owner]})
    ports = case.ports(two_level=True)
    for node in set(case.nodes):
        assert sum(ports["far_in_D"][rank] for rank in range(len(case.nodes)) if case.nodes[rank] == node) == wanted_of_node[node]
    assert sum(ports["far_out_D"]) == wanted_of_node.total()


@given(cases())
def test_both_ways_bring_a_rank_all_that_it_lacks(case: Case) -> None:
    """Which ports it comes through differs, how much comes does not; and all that comes was sent."""
    lacking = [int(case.where_ED[:, rank].sum() - (case.owner_E == rank).sum()) for rank in range(len(case.nodes))]
    for two_level in (False, True):
        ports = case.ports(two_level=two_level)
        assert [near + far for near, far in zip(ports["near_in_D"], ports["far_in_D"], strict=True)] == lacking
        assert sum(ports["near_out_D"]) == sum(ports["near_in_D"])
        assert sum(ports["far_out_D"]) == sum(ports["far_in_D"])


@given(cases(max_nodes=1))
def test_on_one_node_both_ways_are_the_same_and_nothing_is_far(case: Case) -> None:
    ports = case.ports(two_level=True)
    assert ports == case.ports(two_level=False)
    assert not any(ports["far_in_D"] + ports["far_out_D"])


@given(cases())
def test_layers_are_counted_one_by_one(case: Case) -> None:
    """A layer and one whose experts are numbered the other way round, stacked."""
    other = Case(case.nodes, case.owner_E[::-1], case.where_ED[::-1])
    for two_level in (False, True):
        owner, where = np.stack([case.owner_E, other.owner_E]), np.stack([case.where_ED, other.where_ED])
        together = gather_ports(owner, where, case.topology, two_level=two_level)
        for name in PORTS:
            assert getattr(together, name).dtype == np.float64
            wanted = [counted(one, copies(one, two_level=two_level))[name] for one in (case, other)]
            assert getattr(together, name).tolist() == wanted, name


def test_ports_by_hand() -> None:
    """Nodes {0, 2, 4} and {1, 3}. Expert 0 of rank 0 everywhere; expert 1 of rank 3 on 0, 2 and 4; expert 2 of rank 1 alone.

    Flat: rank 0 sends 2 near and 2 far; rank 3 sends 3 far.
    Two levels: expert 0 goes to rank 1, the 0th of 1 and 3, which hands it to 3; expert 1 to rank 2, the 1st of 0, 2 and 4, and on to two.
    """
    where = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=bool)
    case = Case((0, 1, 0, 1, 0), np.array([0, 3, 1]), where)
    assert case.ports(two_level=False) == {
        "near_out_D": [2, 0, 0, 0, 0],
        "near_in_D": [0, 0, 1, 0, 1],
        "far_out_D": [2, 0, 0, 3, 0],
        "far_in_D": [1, 1, 1, 1, 1],
    }
    assert case.ports(two_level=True) == {
        "near_out_D": [2, 1, 2, 0, 0],
        "near_in_D": [1, 0, 1, 1, 2],
        "far_out_D": [1, 0, 0, 1, 0],
        "far_in_D": [0, 1, 1, 0, 0],
    }


def test_leaders_take_turns() -> None:
    """Eight experts that all three ranks of node 1 want, and two of which only ranks 2 and 4 do: 0 1 2 0 1 2 0 1, then 0 1 of two."""
    nodes = Case((0, 0, 1, 1, 1), np.zeros(10, dtype=np.int64), np.ones((10, 5), dtype=bool)).topology
    wanted = np.zeros((10, 5), dtype=bool)
    wanted[:8, 2:] = True
    wanted[8:, [2, 4]] = True
    leading = [np.flatnonzero(row).tolist() for row in leaders(wanted, nodes)]
    assert leading == [[2], [3], [4], [2], [3], [4], [2], [3], [2], [4]]


def test_a_hot_node_shares_the_handing_on() -> None:
    """Two nodes of four, all twelve experts of rank 0 everywhere: each rank of node 1 receives three and hands each to three others."""
    case = Case((0, 0, 0, 0, 1, 1, 1, 1), np.zeros(12, dtype=np.int64), np.ones((12, 8), dtype=bool))
    ports = case.ports(two_level=True)
    assert ports["far_in_D"] == [0, 0, 0, 0, 3, 3, 3, 3]
    assert ports["far_out_D"] == [12, 0, 0, 0, 0, 0, 0, 0]
    assert ports["near_out_D"] == [36, 0, 0, 0, 9, 9, 9, 9]
    assert case.ports(two_level=False)["far_out_D"][0] == 48


@given(cases())
def test_reversed_swaps_in_and_out(case: Case) -> None:
    ports = gather_ports(case.owner_E, case.where_ED, case.topology)
    back = ports.reversed()
    made = counted(case, [(expert, target, source) for expert, source, target in copies(case, two_level=True)])
    assert {name: getattr(back, name).tolist() for name in PORTS} == made
