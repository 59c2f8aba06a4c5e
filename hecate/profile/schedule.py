"""Who exchanges messages with whom, and when: rounds of pairs in which every rank has at most one partner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

Pair = tuple[int, int]
Rounds = list[list[Pair]]


def round_robin(count: int) -> Rounds:
    """Everyone of 0..count-1 meets everyone else once, in count - 1 rounds (count, if odd): the circle method."""
    if count < 2:
        return []
    circle = list(range(count + count % 2))  # with an odd number, whoever meets the last one sits out
    half = len(circle) // 2
    rounds: Rounds = []
    for _ in range(len(circle) - 1):
        met = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append(sorted((min(pair), max(pair)) for pair in met if max(pair) < count))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def near_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Every pair of ranks that share a node, once; all nodes at the same time."""
    return _side_by_side([[(ranks[a], ranks[b]) for a, b in pairs] for pairs in round_robin(len(ranks))] for ranks in ranks_of_node)


def far_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Every pair of ranks of two nodes, once. In a round two nodes exchange over as many pairs as they can: what their uplinks carry."""
    rounds: Rounds = []
    for node_pairs in round_robin(len(ranks_of_node)):
        rounds += _side_by_side(_shifted(ranks_of_node[a], ranks_of_node[b]) for a, b in node_pairs)
    return rounds


def alone_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Every rank with some rank of every other node; in a round a node has one pair: what one rank's NIC carries."""
    rounds: Rounds = []
    for node_pairs in round_robin(len(ranks_of_node)):
        both = [(ranks_of_node[a], ranks_of_node[b]) for a, b in node_pairs]
        rounds += _side_by_side([[(a[i % len(a)], b[i % len(b)])] for i in range(max(len(a), len(b)))] for a, b in both)
    return rounds


def _shifted(a: Sequence[int], b: Sequence[int]) -> Rounds:
    turns = max(len(a), len(b))
    return [[(a[i], b[(i + shift) % turns]) for i in range(len(a)) if (i + shift) % turns < len(b)] for shift in range(turns)]


def _side_by_side(schedules: Iterable[Rounds]) -> Rounds:
    """Schedules of disjoint sets of ranks at the same time."""
    return [[pair for pairs in rounds for pair in pairs] for rounds in zip_longest(*schedules, fillvalue=[])]
