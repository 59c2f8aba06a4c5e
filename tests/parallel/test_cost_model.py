from __future__ import annotations

import pytest

from hecate.parallel.cost_model import LayerCost, overlap_degree
from hecate.parallel.topology import Link, Topology


def topology(nodes: tuple[int, ...], flops: tuple[float, ...], intra: Link, inter: Link) -> Topology:
    return Topology(nodes, flops, (1.0,) * len(nodes), intra, inter)


@pytest.mark.parametrize(
    ("nodes", "flops", "expected"),
    [
        # One node: 8e9 FLOP at 1e9 FLOP/s are 8 s, less 1 s of latency; 7 s · 100 B/s / 40 B = 17.5 experts.
        ((0, 0), (1e9, 1e9), 17),
        # The fastest device has the least time to hide behind: 4 s - 1 s; 3 · 100 / 40 = 7.5.
        ((0, 0), (1e9, 2e9), 7),
        # Two nodes, over the slow link: (8 - 2) s · 10 B/s / 40 B = 1.5.
        ((0, 1), (1e9, 1e9), 1),
    ],
)
def test_overlap_degree_by_hand(nodes: tuple[int, ...], flops: tuple[float, ...], expected: int) -> None:
    given = topology(nodes, flops, Link(100.0, 1.0), Link(10.0, 2.0))
    assert overlap_degree(LayerCost(expert_bytes=40.0, non_moe_flops=8e9), given) == expected


@pytest.mark.parametrize("non_moe_flops", [0.0, 0.5e9, 1e9])
def test_nothing_hides_behind_less_than_the_latency(non_moe_flops: float) -> None:
    given = topology((0,), (1e9,), Link(1e12, 1.0), Link(1e12, 1.0))
    assert overlap_degree(LayerCost(expert_bytes=1.0, non_moe_flops=non_moe_flops), given) == 0
