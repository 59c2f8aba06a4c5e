"""Schedule the exchanges of a profile: rounds of pairs of ranks in which every rank has at most one partner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

Pair = tuple[int, int]
Rounds = list[list[Pair]]


def round_robin(count: int) -> Rounds:
    """Pair each of 0..count-1 with each other number exactly once, in count - 1 rounds (count rounds if odd), by the circle method."""
    if count < 2:
        return []
    circle = list(range(count + count % 2))  # if count is odd, the number paired with the extra last one pauses
    half = len(circle) // 2
    rounds: Rounds = []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < count))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def near_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Schedule every pair of ranks of the same node once, on all nodes at the same time."""
    return _side_by_side([[(ranks[a], ranks[b]) for a, b in pairs] for pairs in round_robin(len(ranks))] for ranks in ranks_of_node)


def far_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Schedule every pair of ranks of different nodes once.

    In a round two nodes exchange over as many pairs as they have, which measures their uplinks.
    """
    rounds: Rounds = []
    for node_pairs in round_robin(len(ranks_of_node)):
        rounds += _side_by_side(_shifted(ranks_of_node[a], ranks_of_node[b]) for a, b in node_pairs)
    return rounds


def alone_rounds(ranks_of_node: Sequence[Sequence[int]]) -> Rounds:
    """Schedule each rank with some rank of every other node.

    In a round a node has only one pair, which measures the NIC of one rank.
    """
    rounds: Rounds = []
    for node_pairs in round_robin(len(ranks_of_node)):
        both = [(ranks_of_node[a], ranks_of_node[b]) for a, b in node_pairs]
        rounds += _side_by_side([[(a[i % len(a)], b[i % len(b)])] for i in range(max(len(a), len(b)))] for a, b in both)
    return rounds


def _shifted(a: Sequence[int], b: Sequence[int]) -> Rounds:
    turns = max(len(a), len(b))
    return [[(a[i], b[(i + shift) % turns]) for i in range(len(a)) if (i + shift) % turns < len(b)] for shift in range(turns)]


def _side_by_side(schedules: Iterable[Rounds]) -> Rounds:
    """Merge schedules of disjoint sets of ranks, so that they run at the same time."""
    return [[pair for pairs in rounds for pair in pairs] for rounds in zip_longest(*schedules, fillvalue=[])]
