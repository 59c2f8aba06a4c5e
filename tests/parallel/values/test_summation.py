"""The order of sums: written out by hand, and the same for all divisions of positions among ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.values.summation import PositionSums, SumOrder, TreeSum


class Term:
    """A sum as text, which shows its order."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __iadd__(self, other: Term) -> Term:
        self.text = f"({self.text}{other.text})"
        return self


def summed(order: SumOrder, micro_steps: int = 1) -> str:
    """What the last rank gets, of parts that arrive in the order of the ranks."""
    total: TreeSum[Term] = TreeSum(order.size)
    for rank, own in enumerate(order.ranges):
        sums: PositionSums[Term] = PositionSums(order.size)
        for step in range(micro_steps):
            for position in own:
                sums.add(position, Term("abcdefghijklmnopqrs"[position] + "'" * step), last=step == micro_steps - 1)
            sums.add(None, Term("padding"), last=step == micro_steps - 1)
        assert sorted(sums.sums.parts) == order.blocks([rank]), "no more is sent than its whole subtrees"
        for block, part in sums.sums.parts.items():
            total.add(block, part)
    return total.total.text


@pytest.mark.parametrize(("size", "written"), [(1, "a"), (2, "(ab)"), (3, "((ab)c)"), (6, "(((ab)(cd))(ef))"), (7, "(((ab)(cd))((ef)g))")])
def test_the_tree_by_hand(size: int, written: str) -> None:
    assert summed(SumOrder((range(size),))) == written


def test_the_micro_steps_of_a_position_come_first() -> None:
    assert summed(SumOrder((range(2), range(2, 3))), micro_steps=3) == "((((aa')a'')((bb')b''))((cc')c''))"


def test_what_ranks_send() -> None:
    """Of six positions, as whole subtrees; a rank may have none."""
    order = SumOrder((range(2), range(2, 5), range(5, 5), range(5, 6)))
    assert [order.blocks([rank]) for rank in range(4)] == [[(0, 2)], [(2, 4), (4, 5)], [], [(5, 6)]]
    assert order.blocks([0, 1]) == [(0, 4), (4, 5)]
    assert order.passes == 3


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_any_division_gives_the_same_order(shares: list[int]) -> None:
    ends = [sum(shares[:rank]) for rank in range(len(shares) + 1)]
    order = SumOrder(tuple(range(*ends) for ends in pairwise(ends)))
    if order.size <= 19:
        assert summed(order) == summed(SumOrder((range(order.size),)))
