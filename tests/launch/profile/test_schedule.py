"""In the rounds of pairs every two ranks meet once, and no rank has two partners at a time."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.launch.profile.schedule import Rounds, alone_rounds, far_rounds, near_rounds, round_robin

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def nodes_of(sizes: list[int]) -> list[list[int]]:
    """Ranks dealt to nodes in turn, so that a node's are not adjacent."""
    ranks: list[list[int]] = [[] for _ in sizes]
    rank = 0
    while any(len(r) < size for r, size in zip(ranks, sizes, strict=True)):
        for members, size in zip(ranks, sizes, strict=True):
            if len(members) < size:
                members.append(rank)
                rank += 1
    return ranks


def met(rounds: Rounds) -> Counter[tuple[int, int]]:
    return Counter((min(pair), max(pair)) for pairs in rounds for pair in pairs)


def assert_disjoint(rounds: Rounds) -> None:
    for pairs in rounds:
        assert pairs, "a round in which nobody meets"
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)), pairs


@pytest.mark.parametrize("count", range(12))
def test_round_robin_lets_every_pair_meet_once(count: int) -> None:
    rounds = round_robin(count)
    assert_disjoint(rounds)
    assert met(rounds) == Counter(combinations(range(count), 2))
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2), "more rounds than needed"


@given(SIZES)
def test_near_and_far_rounds_cover_every_pair_of_ranks_once(sizes: list[int]) -> None:
    nodes = nodes_of(sizes)
    near, far = near_rounds(nodes), far_rounds(nodes)
    assert_disjoint(near)
    assert_disjoint(far)
    assert met(near) == Counter(pair for ranks in nodes for pair in combinations(ranks, 2))
    assert met(far) == Counter((min(p), max(p)) for a, b in combinations(nodes, 2) for p in product(a, b))


@given(SIZES)
def test_in_a_far_round_two_nodes_use_as_many_ranks_as_they_can(sizes: list[int]) -> None:
    nodes = nodes_of(sizes)
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    for pairs in far_rounds(nodes):
        peers = [sorted((node_of[a], node_of[b])) for a, b in pairs]
        for a, b in peers:
            assert peers.count([a, b]) == min(len(nodes[a]), len(nodes[b]))
            assert all({a, b} == {*other} or not {a, b} & {*other} for other in peers), "a node exchanges with two others at a time"


@given(SIZES)
def test_in_an_alone_round_a_node_has_one_pair(sizes: list[int]) -> None:
    nodes = nodes_of(sizes)
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    rounds = alone_rounds(nodes)
    for pairs in rounds:
        busy = [node_of[rank] for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)), pairs
    seen = {(rank, node_of[peer]) for pairs in rounds for a, b in pairs for rank, peer in ((a, b), (b, a))}
    assert seen == {(rank, other) for rank, node in node_of.items() for other in range(len(nodes)) if other != node}


def test_two_nodes_by_hand() -> None:
    """Node 0 has ranks 0-2, node 1 ranks 3 and 4."""
    nodes = [[0, 1, 2], [3, 4]]
    assert near_rounds(nodes) == [[(1, 2), (3, 4)], [(0, 2)], [(0, 1)]]
    assert far_rounds(nodes) == [[(0, 3), (1, 4)], [(0, 4), (2, 3)], [(1, 3), (2, 4)]]
    assert alone_rounds(nodes) == [[(0, 3)], [(1, 4)], [(2, 3)]]
