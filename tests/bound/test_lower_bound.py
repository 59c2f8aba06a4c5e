"""The lower bound in cases that can be computed by hand."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.placement import contiguous_owners
from testing.bound import lower_bound as module
from testing.bound.bound_relaxation import LayerProblem, Reach, Relaxation
from testing.bound.lower_bound import lower_bound
from testing.plan_cases import kinds
from testing.unit_cases import UNIT_LINK, layer_input, unit_topology

pytest.importorskip("scipy.optimize")


def plan_input(
    loads: list[list[float]],
    cost: LayerCost,
    *,
    owner: list[int],
    slots: int,
    nodes: tuple[int, ...] | None = None,
    intra: Link = UNIT_LINK,
    inter: Link = UNIT_LINK,
    rates: tuple[float, ...] | None = None,
) -> PlanInput:
    """Devices of 1 FLOP/s and links of 1 byte/s without latency, unless told otherwise; memories so fast that optimizers take no time.

    `loads`: a row a source rank.
    """
    on = unit_topology(nodes or (0,) * len(loads), flops=rates or (), near=intra, far=inter, memory_bandwidth=1e15)
    return layer_input(owner, loads, slots, on=on, cost=cost)


def work(assignment: float = 0.0, row: float = 0.0, **others: Any) -> LayerCost:
    """FLOPs of forward and backward together."""
    return LayerCost(**{"trainable_bytes": 0.0, **others}, assignment_flops=assignment / 3, row_flops=row / 2)


def test_one_device_has_one_plan() -> None:
    # 2 tokens of top-2 routing: 2 rows of 5 s and 4 assignments of 3 s.
    given_ = plan_input([[1.0, 3.0]], work(3.0, 5.0, top_k=2, row_bytes=9.0), owner=[0, 0], slots=4)
    assert lower_bound(given_, 0) == pytest.approx(2 * 5 + 4 * 3, rel=1e-5)


def test_without_tokens_only_optimizers_work() -> None:
    cost = work(3.0, trainable_bytes=4.0, state_bytes=10.0)
    given_ = plan_input([[0.0, 0.0, 0.0]] * 2, cost, owner=[0, 1, 1], slots=1)
    given_ = replace(given_, topology=replace(given_.topology, memory_bandwidth=(1.0, 4.0)))
    # Rank 0 reads gradients and reads and writes states of one expert at 1 byte/s, rank 1 of two at 4.
    assert lower_bound(given_, 0) == pytest.approx(4 + 2 * 10)


def test_a_hot_expert_needs_a_whole_replica() -> None:
    # Rank 0 serves 20 assignments in 20 s; or half of them, and the replica costs 1 s to bring and 1 s to bring its gradient back.
    given_ = plan_input([[10.0], [10.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=1)
    assert lower_bound(given_, 0) == pytest.approx(12.0, rel=5e-3)


SLOW, FAST = 1 / 8, 1000.0


@pytest.mark.parametrize(
    ("nics", "uplinks"),
    [
        ((SLOW, SLOW, FAST, FAST), (FAST, FAST)),
        ((FAST,) * 4, (SLOW, FAST)),
        ((FAST,) * 4, (FAST, SLOW)),
    ],
)
def test_a_node_fetches_a_whole_expert_over_the_slow_link(nics: tuple[float, ...], uplinks: tuple[float, float]) -> None:
    # 80 assignments take 80 s on the owner; 40 s on its node, and 1 s each way; 27 s with one rank of the other node; 20 s with both, and
    # 8 s each way over the slow link, while what is sent inside the nodes takes 1 s.
    given_ = plan_input([[20.0]] * 4, work(1.0, trainable_bytes=1.0), owner=[0], slots=1, nodes=(0, 0, 1, 1))
    given_ = replace(given_, topology=replace(given_.topology, nic_bandwidth=nics, uplink_bandwidth=uplinks))
    assert lower_bound(given_, 0) == pytest.approx(36.0, rel=5e-3)


@pytest.mark.parametrize("nics", [(SLOW, FAST), (FAST, SLOW)])
def test_the_slower_of_two_ends_decides(nics: tuple[float, float]) -> None:
    # 80 assignments take 80 s on the owner; 40 s on both ranks, and a copy crosses in 8 s each way.
    given_ = plan_input([[40.0]] * 2, work(1.0, trainable_bytes=1.0), owner=[0], slots=1, nodes=(0, 1))
    given_ = replace(given_, topology=replace(given_.topology, nic_bandwidth=nics, uplink_bandwidth=(FAST, FAST)))
    assert lower_bound(given_, 0) == pytest.approx(56.0, rel=5e-3)


def test_a_leader_receives_from_afar_and_sends_nearby() -> None:
    # As before, but slow inside the nodes and fast between them. Everywhere: owner and leader each send one copy inside their nodes, 8 s.
    given_ = plan_input([[20.0]] * 4, work(1.0, trainable_bytes=1.0), owner=[0], slots=1, nodes=(0, 0, 1, 1), intra=Link(SLOW, 0.0))
    given_ = replace(given_, topology=replace(given_.topology, nic_bandwidth=(FAST,) * 4, uplink_bandwidth=(FAST,) * 2))
    assert 20.0 <= lower_bound(given_, 0) <= 36.0
    # With one rank of the other node alone: 40 assignments on each of two ranks, and next to nothing to bring.
    assert lower_bound(replace(given_, slots_D=np.array([0, 0, 1, 0])), 0) == pytest.approx(40.0, rel=5e-3)


@pytest.mark.parametrize("uplinks", [(SLOW, FAST), (FAST, SLOW)])
def test_tokens_of_a_node_stay_only_with_a_whole_expert(uplinks: tuple[float, float]) -> None:
    # 20 tokens of a node whose expert is on another: they cross the slow link in 4 · 20 · 0.0375 · 8 = 24 s, or the expert does in 8 s, and
    # its gradient, after which half of them travel inside the node in no time.
    cost = work(0.001, trainable_bytes=1.0, row_bytes=0.0375)
    given_ = plan_input([[0.0], [10.0], [10.0]], cost, owner=[0], slots=1, nodes=(0, 1, 1), intra=Link(FAST, 0.0), inter=Link(FAST, 0.0))
    given_ = replace(given_, topology=replace(given_.topology, nic_bandwidth=(FAST,) * 3, uplink_bandwidth=uplinks))
    assert lower_bound(given_, 0) == pytest.approx(16.0, rel=5e-3)
    assert lower_bound(replace(given_, slots_D=np.zeros(3, dtype=int)), 0) == pytest.approx(24.0, rel=5e-3)


@pytest.mark.parametrize(("nodes", "intra", "inter"), [((0, 0), 1.0, FAST), ((0, 1), SLOW, 1.0)])
def test_work_is_shared_by_sending_tokens(nodes: tuple[int, int], intra: float, inter: float) -> None:
    # All 40 tokens are on one rank, replicas are free: 20 s of work on each, and half of the rows travel, 4 · 20 · 0.1 bytes.
    given_ = plan_input(
        [[40.0], [0.0]], work(1.0, row_bytes=0.1), owner=[0], slots=1, nodes=nodes, intra=Link(intra, 0.0), inter=Link(inter, 0.0)
    )
    bound = lower_bound(given_, 0)
    assert bound == pytest.approx(28.0, rel=5e-3)
    assert bound <= 28.0


def test_slots_limit_what_is_shared() -> None:
    # No room for a replica: the owner serves all.
    given_ = plan_input([[10.0], [10.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=0)
    assert lower_bound(given_, 0) == pytest.approx(20.0, rel=1e-5)


@pytest.mark.parametrize(("nodes", "source"), [((0, 0), 1), ((0, 0), 0), ((0, 1), 0)])
def test_a_rank_serves_what_its_slots_hold(nodes: tuple[int, int], source: int) -> None:
    # Replicas and rows are free, but rank 1, ten times as fast, has room for one of rank 0's two experts: the other takes 10 s at home.
    # Tokens are on rank 1, or come there from its node, or from the other one.
    loads = np.zeros((2, 2))
    loads[source] = 10.0
    given_ = plan_input(loads.tolist(), work(1.0), owner=[0, 0], slots=1, nodes=nodes, rates=(1.0, 10.0))
    assert lower_bound(given_, 0) == pytest.approx(10.0, rel=5e-3)
    assert lower_bound(replace(given_, slots_D=np.array([2, 2])), 0) == pytest.approx(20 / 11, rel=5e-3)


def test_a_rank_without_a_slot_serves_nothing_from_afar() -> None:
    # The copy is free, but only slow rank 1 of the other node may have it: 5 s on it and on the owner. Rank 2 is a hundred times as fast.
    given_ = plan_input([[10.0], [0.0], [0.0]], work(1.0), owner=[0], slots=0, nodes=(0, 1, 1), rates=(1.0, 1.0, 100.0))
    assert lower_bound(replace(given_, slots_D=np.array([0, 1, 0])), 0) == pytest.approx(5.0, rel=5e-3)


def test_experts_of_one_owner_share_its_copies() -> None:
    # Rank 0 owns two experts of 10 assignments. R copies leave 20 / (R + 1) s to each rank; its port sends and gets back R bytes: of 20,
    # 10 + 2, 20/3 + 4, 5 + 6 s two copies are best. Each expert alone would be content with half a copy here and half a copy there.
    given_ = plan_input([[2.5, 2.5]] * 4, work(1.0, trainable_bytes=1.0), owner=[0, 0], slots=1)
    assert lower_bound(given_, 0) == pytest.approx(20 / 3 + 4, rel=5e-3)


def test_only_a_rank_with_a_copy_leads() -> None:
    # Rank 1, with the slow NIC, has the only slot: 40 s on both, and the copy crosses in 8 s each way, whatever NIC its neighbour has.
    # The bound falls short, for it counts on the neighbour's computing in part.
    given_ = plan_input([[80.0], [0.0], [0.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=0, nodes=(0, 1, 1))
    given_ = replace(given_, topology=replace(given_.topology, nic_bandwidth=(FAST, SLOW, FAST), uplink_bandwidth=(FAST, FAST)))
    assert 52.0 <= lower_bound(replace(given_, slots_D=np.array([0, 1, 0])), 0) <= 56.0


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("far", [False, True])
def test_rows_pass_the_ports_of_both_ends(slow: int, far: bool) -> None:
    # 10 tokens of a tenth of a byte from rank 1 to rank 0, four times, 8 s each time through whichever port is slow; the work takes 10 s.
    given_ = plan_input([[0.0], [10.0]], work(1.0, row_bytes=0.1), owner=[0], slots=0, nodes=(0, int(far)))
    ports = tuple(SLOW if rank == slow else FAST for rank in range(2))
    topology = replace(given_.topology, port_bandwidth=(FAST,) * 2, nic_bandwidth=(FAST,) * 2, uplink_bandwidth=(FAST,) * (1 + far))
    topology = replace(topology, nic_bandwidth=ports) if far else replace(topology, port_bandwidth=ports)
    assert lower_bound(replace(given_, topology=topology), 0) == pytest.approx(10 + 4 * 8, rel=5e-3)


def test_fast_devices_take_more() -> None:
    # Replicas are free: 30 assignments on ranks of 1 and 2 FLOP/s take 10 s.
    given_ = plan_input([[15.0], [15.0]], work(1.0), owner=[0], slots=1, rates=(1.0, 2.0))
    assert lower_bound(given_, 0) == pytest.approx(10.0, rel=5e-3)


@pytest.mark.parametrize("slowdown", [1.0, 1.5, 2.0])
def test_transfers_hide_behind_attention_as_far_as_they_can(slowdown: float) -> None:
    # A replica comes in 3 s, of which attention hides 1 s, and its gradient goes in 3 s, of which 2 s of attention hide 2 s; both at the
    # price of the slowdown. Alone, the owner would take 20 s.
    cost = work(1.0, trainable_bytes=3.0, non_moe_flops=1.0)
    given_ = plan_input([[10.0], [10.0]], cost, owner=[0], slots=1)
    given_ = replace(given_, topology=replace(given_.topology, overlap_slowdown=slowdown))
    exposed = (3 - 1) + (3 - 2) + (slowdown - 1) * (1 + 2)
    assert lower_bound(given_, 0) == pytest.approx(10 + exposed, rel=5e-3)


@pytest.mark.parametrize("row_bytes", [0.0, 3.0])
def test_resident_frozen_parts_are_free(row_bytes: float) -> None:
    cost = work(1.0, frozen_bytes=100.0, frozen_lifetime=20.0, row_bytes=row_bytes)
    absent = plan_input([[10.0], [10.0]], cost, owner=[0], slots=1)
    there = replace(absent, resident_LED=np.array([[[True, True]]]))
    both = replace(
        absent,
        owner_LE=np.zeros((2, 1), dtype=np.int64),
        loads_LED=np.full((2, 1, 2), 10.0),
        resident_LED=np.array([[[True, False]], [[True, True]]]),
    )
    # A replica of 100 bytes, once in 20 steps, takes 5 s; both serve 10 assignments, and no row travels.
    assert lower_bound(absent, 0) == pytest.approx(15.0, rel=5e-3)
    assert lower_bound(there, 0) == pytest.approx(10.0, rel=5e-3)
    assert [lower_bound(both, layer) for layer in (0, 1)] == pytest.approx([15.0, 10.0], rel=5e-3)


def test_latencies_that_nobody_escapes() -> None:
    # Without slots the tokens of rank 1 travel through eight all-to-alls; with them a replica does, there and back.
    given_ = plan_input([[1.0], [1.0]], work(1.0), owner=[0], slots=0, intra=Link(1.0, 100.0))
    assert lower_bound(given_, 0) == pytest.approx(2 + 8 * 100, rel=1e-5)
    assert lower_bound(replace(given_, slots_D=np.array([1, 1])), 0) == pytest.approx(1 + 2 * 100, rel=5e-3)


def test_tokens_that_stay_wait_unless_everything_is_everywhere() -> None:
    # Each rank wants its own expert only: they stay in 1 s, and a latency of 10 s is paid eight times; or both experts go everywhere, whose
    # gather and reduction take 10 + 5 s each. Without slots there is no choice.
    given_ = plan_input([[1.0, 0.0], [0.0, 1.0]], work(1.0, trainable_bytes=5.0), owner=[0, 1], slots=0, intra=Link(1.0, 10.0))
    assert lower_bound(given_, 0) == pytest.approx(1 + 8 * 10, rel=5e-3)
    assert lower_bound(replace(given_, slots_D=np.array([1, 1])), 0) == pytest.approx(1 + 2 * 15, rel=5e-3)


def test_latencies_between_nodes_and_inside_them() -> None:
    # All tokens stay if the expert is everywhere: a copy goes to the other node, and on inside both. Frozen parts go the same way.
    given_ = plan_input([[1.0]] * 4, work(1.0), owner=[0], slots=1, nodes=(0, 0, 1, 1), intra=Link(1.0, 10.0), inter=Link(1.0, 100.0))
    frozen = replace(given_, cost=replace(given_.cost, frozen_bytes=1e-6))
    # Instead: a copy to the other node alone, 2 · 100 s, and all-to-alls inside the nodes, 8 · 10 s, and 2 s of computing.
    assert lower_bound(given_, 0) == pytest.approx(1 + 2 * 110, rel=5e-3)
    assert lower_bound(frozen, 0) == pytest.approx(1 + (2 + 1 / 20) * 110, rel=5e-3), "one step in 20 fetches"


@pytest.mark.parametrize(("nodes", "latency"), [((0, 0, 1), 2 * 10), ((0, 1, 0), 0), ((0, 1, 1), 0)])
def test_replicas_wait_for_the_links_that_they_cross(nodes: tuple[int, ...], latency: float) -> None:
    # Links wait 10 s inside nodes and not at all between them. Alone, rank 0 takes 200 s, with a replica on rank 1 half of that. Ranks of a
    # node ask each other in 80 s, and so does every all-to-all, also one of rows for the other node.
    given_ = plan_input([[10.0], [10.0], [0.0]], work(10.0), owner=[0], slots=0, nodes=nodes, intra=Link(1.0, 10.0))
    bound = lower_bound(replace(given_, slots_D=np.array([0, 1, 0])), 0)
    assert bound == pytest.approx(100 + 80 + latency, rel=5e-3)
    assert bound <= 100 + 80 + latency


def test_replicas_in_both_kinds_of_nodes_wait_for_both_kinds_of_links() -> None:
    # All tokens and both experts are on rank 0; rank 1 of its node and rank 2 of another one have room for a replica each.
    given_ = plan_input([[20.0, 20.0], [0.0, 0.0], [0.0, 0.0]], work(3.0), owner=[0, 0], slots=1, nodes=(0, 0, 1), intra=Link(1.0, 4.0))
    given_ = replace(given_, topology=replace(given_.topology, inter_node=Link(1.0, 3.0)))
    problem = LayerProblem(given_)
    assert problem.kinds("far") == {"away": 3.0, "both": 7.0}  # tokens leave their node only for a replica elsewhere
    assert problem.kinds("near") == {"home": 4.0, "away": 3.0, "both": 7.0}
    # 120 s of work: 60 s on two ranks, 40 s on three; all-to-alls wait 8 * 4 s, and replicas there and back.
    assert lower_bound(given_, 0) == pytest.approx(40 + 32 + 2 * 7, rel=5e-3)


def test_a_replica_travels_as_a_whole() -> None:
    # 40 s on the owner. Slices of a replica may come from any rank, but a replica takes 10 s there and 10 s back, and four ranks take 10 s.
    given_ = plan_input([[10.0]] * 4, work(1.0, trainable_bytes=10.0, chunk_numel=12), owner=[0], slots=1)
    assert 30.0 * (1 - 1e-5) <= lower_bound(given_, 0) <= 40.0


def test_rows_are_shared_by_assignments_that_stay() -> None:
    # Two tokens on each rank choose both experts: two rows of 5 s on each rank if replicas keep all where they are. Those take 1 s each way
    # for the link to answer; all-to-alls would take 8 s.
    given_ = plan_input([[2.0, 2.0], [2.0, 2.0]], work(0.0, 5.0, top_k=2), owner=[0, 0], slots=2, intra=Link(1.0, 1.0))
    assert lower_bound(given_, 0) == pytest.approx(10.0 + 2.0, rel=5e-3)


def test_rows_travel_once_for_all_assignments_at_a_rank() -> None:
    # One token of top-2 routing on rank 1, both experts on rank 0, nothing can move: one row there, one back, the same backward.
    given_ = plan_input([[0.0, 0.0], [1.0, 1.0]], work(0.0, 1.0, top_k=2, row_bytes=10.0), owner=[0, 0], slots=0)
    assert lower_bound(given_, 0) == pytest.approx(1 + 4 * 10, rel=1e-5)


def test_it_is_tighter_for_plans_divided_by_how_long_the_slowest_rank_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight experts a token the chords of distinct tokens are far below them, unless the slowest rank has little time."""
    topology = uniform_topology(2, 2, flops=6e14, memory=8e10, intra_node=Link(3e11, 1e-5), inter_node=Link(1.25e10, 2e-5))
    loads = WORKLOADS["trained_steady"](3, 1, 4, 16, 4096, 8, 0)[-1, 0].astype(float)
    given_ = PlanInput(contiguous_owners(16, 4)[None], loads[None], topology, kinds(8)[0].cost, np.full(4, 4))
    plan_seconds = float(POLICIES["auto"](given_).seconds(given_).total[0])
    divided = lower_bound(given_, 0, plan_seconds=plan_seconds)
    monkeypatch.setattr(module, "DIVISIONS", 0)
    assert 1.1 * lower_bound(given_, 0, plan_seconds=plan_seconds) < divided <= plan_seconds


def test_each_layer_has_its_own_bound() -> None:
    one = plan_input([[10.0], [10.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=0, rates=(1.0, 3.0))
    two = replace(one, owner_LE=np.array([[0], [1]]), loads_LED=np.array([[[10.0, 10.0]], [[1.0, 2.0]]]))
    assert lower_bound(two, 0) == pytest.approx(20.0, rel=1e-5)
    assert lower_bound(two, 1) == pytest.approx(1.0, rel=1e-5)


def test_loads_unknown_count_as_ones() -> None:
    given_ = replace(plan_input([[0.0], [0.0]], work(1.0), owner=[0], slots=0), loads_LED=None)
    assert lower_bound(given_, 0) == pytest.approx(2.0, rel=1e-5)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return import_(name, *args, **kwargs)

    given_ = plan_input([[10.0], [10.0]], work(1.0), owner=[0], slots=1)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"needs scipy(.|\n)*pip install .*\[bench\]"):
        lower_bound(given_, 0)


def test_what_holds_below_one_cutoff_is_not_taken_for_a_higher_one() -> None:
    # Half of 48 assignments, 6 s each, on rank 0, half on rank 2: 144 s. 40 bytes come in 8 s, of which 4 are hidden, and go in 8 s, all of
    # them hidden. Owner 0 moves 2 · (40 + 2 · 20) bytes of memory at 25 bytes/s.
    cost = LayerCost(trainable_bytes=40.0, state_bytes=20.0, assignment_flops=1.0, non_moe_flops=2.0)
    loads = [[0.0, 0.0], [0.0, 0.0], [0.0, 32.0], [0.0, 16.0]]
    given_ = plan_input(loads, cost, owner=[0, 0], slots=0, nodes=(0, 0, 0, 1), rates=(0.5,) * 4)
    topology = replace(
        given_.topology,
        port_bandwidth=(5.0,) * 4,
        uplink_bandwidth=(0.5,) * 2,
        nic_bandwidth=(1.5,) * 4,
        memory_bandwidth=(25.0,) * 4,
    )
    given_ = replace(given_, topology=topology, slots_D=np.array([0, 0, 1, 1]))
    assert 0.95 * 154.4 <= lower_bound(given_, 0) <= 154.4


def test_what_costs_nothing_takes_no_time() -> None:
    given_ = plan_input([[10.0], [10.0]], LayerCost(trainable_bytes=0.0), owner=[0], slots=1)
    with np.errstate(all="raise"):
        assert lower_bound(given_, 0) == 0
    # Tokens that would travel need not.
    assert lower_bound(replace(given_, cost=replace(given_.cost, row_bytes=1.0, non_moe_flops=1.0)), 0) == 0


@pytest.mark.parametrize(
    ("reach", "nodes", "seconds"),
    [
        # Nothing travels but the replica: 10 s of assignments on each rank, and a second for it and for its gradient.
        ("everywhere", (0, 0), 12.0),
        ("stay", (0, 0), 12.0),
        # Half a replica serves half of what a whole one does: 5 of rank 1's assignments, which makes 15 s, and half a second each way.
        ("near", (0, 0), None),
        ("near", (0, 1), np.inf),
        ("far", (0, 0), np.inf),
    ],
)
def test_each_way_for_tokens_to_reach_their_experts_has_its_own_limit(reach: Reach, nodes: tuple[int, ...], seconds: float | None) -> None:
    given_ = plan_input([[10.0], [10.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=1, nodes=nodes)
    problem = LayerProblem(given_)
    assert (problem.static, problem.optimizer, problem.may_stay) == (20.0, pytest.approx(0.0, abs=1e-9), True)
    least = Relaxation(problem, 20.0, reach).least()
    if seconds is None:
        assert problem.balanced <= least <= 12.0 * (1 + 1e-6)
    else:
        assert least == pytest.approx(seconds, rel=1e-6)


def test_no_plan_is_faster_than_a_cutoff_below_the_balanced_work() -> None:
    given_ = plan_input([[10.0], [10.0]], work(1.0, trainable_bytes=1.0), owner=[0], slots=1)
    assert LayerProblem(given_).balanced == pytest.approx(10.0)
    assert Relaxation(LayerProblem(given_), 9.0, "everywhere").least() == np.inf
    without_room = LayerProblem(replace(given_, slots_D=np.zeros(2, dtype=np.int64)))
    assert (without_room.may_stay, without_room.may_have_all) == (False, False)
    assert Relaxation(without_room, 20.0, "everywhere").least() == np.inf
