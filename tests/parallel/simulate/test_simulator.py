"""Small simulations worked by hand: two ranks of a node, one byte per second, one FLOP per second, no latency."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, PlanMode
from hecate.parallel.cost.flows import token_split
from hecate.parallel.plan.measured_modes import MODES, execution_of
from hecate.parallel.planners import POLICIES, Plan, PlanInput, Planner
from hecate.parallel.simulate.simulated_step import Setting, StepSeconds
from hecate.parallel.simulate.simulator import Simulated, simulate, slots_in_memory
from hecate.parallel.simulate.workloads import WORKLOADS
from testing.plan_cases import Kind, kinds, topologies
from testing.unit_cases import unit_topology

NODE = unit_topology((0, 0), memory_bandwidth=1.0)
AUTO = {"auto": POLICIES["auto"]}
COST = LayerCost(trainable_bytes=4.0, row_bytes=1.0, assignment_flops=1.0, non_moe_flops=5.0)
ALL_TO_FIRST = [[10, 0], [10, 0]]
"""a row a source rank: both ranks choose expert 0, which rank 0 owns"""


def run(
    steps: list[list[list[int]]],
    planner: Planner,
    *,
    cost: LayerCost = COST,
    mode: PlanMode = "history",
    layers: int = 1,
    num_layers: int | None = None,
    rematerialize: bool = False,
    topology: Topology = NODE,
) -> Simulated:
    loads = np.repeat(np.array(steps).swapaxes(1, 2)[:, None], layers, axis=1)
    slots_D = np.full(topology.world_size, loads.shape[2])
    (row,) = simulate(
        loads,
        {"tried": planner},
        Setting(
            topology=topology,
            cost=cost,
            execution=ExecutionMode(plan=mode, rematerialize=rematerialize),
            slots_D=slots_D,
            num_layers=num_layers,
        ),
    )
    return row


def test_static_ep_by_hand() -> None:
    """Rank 0 computes 20 assignments of 1 + 2 FLOPs. Ten rows of a byte go to it and back, forward and backward: four times 10 s.

    Attention: 5 + 2 · 5 s. The optimizer reads 4 bytes of gradient an owned expert.
    """
    row = run([ALL_TO_FIRST] * 2, POLICIES["static_ep"])
    assert row.seconds.compute == 60
    assert row.seconds.dispatch == 40
    assert row.seconds.attention == 15
    assert row.seconds.optimizer == 4
    assert (row.seconds.gather, row.seconds.reduce, row.seconds.exposed, row.seconds.reshard) == (0, 0, 0, 0)
    assert row.step_seconds == 60 + 40 + 15 + 4
    assert row.imbalance == 2
    assert (row.bytes.near, row.bytes.far, row.bytes.busiest_port, row.bytes.busiest_uplink) == (40, 0, 20, 0)
    assert row.replica_bytes == 0


def test_a_frozen_attention_takes_as_long_backward_as_forward() -> None:
    row = run([ALL_TO_FIRST] * 2, POLICIES["static_ep"], cost=replace(COST, non_moe_backward=1.0))
    assert row.seconds.attention == 5 + 5


def test_full_by_hand() -> None:
    """Each rank gets and sends one expert of 4 bytes, hidden behind 5 s of attention, and its gradient, hidden behind 10."""
    row = run([ALL_TO_FIRST] * 2, POLICIES["full"])
    assert (row.seconds.compute, row.seconds.dispatch) == (30, 0)
    assert (row.seconds.gather, row.seconds.reduce, row.seconds.exposed) == (4, 4, 0)
    assert row.step_seconds == 30 + 15 + 4
    assert row.imbalance == 1
    assert (row.bytes.near, row.bytes.busiest_port) == (16, 8)
    assert row.replica_bytes == 4 + 4  # parameters and gradient of one expert


def test_layers_add_up() -> None:
    one, three = run([ALL_TO_FIRST] * 2, POLICIES["full"]), run([ALL_TO_FIRST] * 2, POLICIES["full"], layers=3)
    assert three.step_seconds == 3 * one.step_seconds
    assert three.bytes.near == 3 * one.bytes.near
    assert three.replica_bytes == 3 * one.replica_bytes
    assert three.imbalance == one.imbalance


@pytest.mark.parametrize("rematerialize", [False, True])
def test_a_sample_of_layers_stands_for_all(rematerialize: bool) -> None:
    cost = replace(COST, frozen_bytes=100.0)
    steps, full = [ALL_TO_FIRST] * 2, POLICIES["full"]
    sample = run(steps, full, cost=cost, layers=2, num_layers=6, rematerialize=rematerialize)
    every = run(steps, full, cost=cost, layers=6, rematerialize=rematerialize)
    assert replace(sample, planner_ms_per_layer=0) == replace(every, planner_ms_per_layer=0)
    assert every.replica_bytes == (8 if rematerialize else 6 * 8) + 6 * 100


def test_rematerialized_replicas_travel_twice_and_stay_for_one_layer() -> None:
    """8 bytes more a layer than 16; in the backward pass 4 s of gradients and 4 s of parameters hide behind 10 s."""
    row = run([ALL_TO_FIRST] * 2, POLICIES["full"], layers=3, rematerialize=True)
    assert row.bytes.near == 3 * 24
    assert row.replica_bytes == 8
    assert row.seconds.exposed == 0


def test_a_frozen_part_travels_once() -> None:
    """100 bytes each way in the first step, which counts only if it is the only one, and 100 s, of which 5 - 4 s are hidden."""
    cost = replace(COST, frozen_bytes=100.0)
    first, later = run([ALL_TO_FIRST], POLICIES["full"], cost=cost), run([ALL_TO_FIRST] * 3, POLICIES["full"], cost=cost)
    assert first.bytes.near == 16 + 200
    assert later.bytes.near == 16
    assert first.seconds.exposed == 104 - 5
    assert later.seconds.exposed == 0
    assert run([ALL_TO_FIRST], POLICIES["full"], cost=cost, rematerialize=True).seconds.exposed == 104 - 5  # only parameters travel again
    assert first.replica_bytes == later.replica_bytes == 108


def shared_where_uneven(given: PlanInput) -> Plan:
    load_LE = given.expected_LED.sum(-1)
    return POLICIES["static_ep" if (load_LE == load_LE[:, :1]).all() else "full"](given)


@pytest.mark.parametrize(("second", "seconds", "near"), [(ALL_TO_FIRST, 30 + 15 + 4 + 4, 16), ([[5, 5], [5, 5]], 30 + 20 + 15 + 4, 40)])
def test_a_calibrated_plan_brings_what_it_needs_after_the_router(second: list[list[int]], seconds: float, near: float) -> None:
    """The history is even, so experts stay at home, which would take 60 + 40 + 15 + 4 s. After the router each rank gets the expert that
    it lacks: 4 s that nothing hides; the gradients are hidden. An even step keeps its plan: 5 of each rank's 10 rows travel."""
    row = run([[[5, 5], [5, 5]], second], shared_where_uneven, mode="calibrated")
    assert row.step_seconds == seconds
    assert row.bytes.near == near
    assert row.imbalance == 1


def halves(given: PlanInput) -> Plan:
    """Everything everywhere, each expert's assignments dealt evenly."""
    where = np.ones((given.num_layers, given.num_experts, given.world_size), dtype=bool)
    return Plan(given.owner_LE, where, np.broadcast_to(given.expected_LED.sum(-1, keepdims=True) / given.world_size, where.shape))


def test_history_meets_other_loads_than_it_planned_for() -> None:
    """Planned for step 0: rank 0 keeps 5 of its 10 assignments and hands 5 over. In step 1 it has 20 and hands over 10; rank 1's 4, of
    which the plan knew nothing, stay: 10 and 14 assignments, 10 rows travel.
    """
    steps = [[[10, 0], [0, 0]], [[20, 0], [4, 0]]]
    history, exact = run(steps, halves), run(steps, halves, mode="exact")
    assert (history.seconds.compute, history.seconds.dispatch) == (3 * 14, 4 * 10)
    assert (exact.seconds.compute, exact.seconds.dispatch) == (3 * 12, 4 * 8)


def test_loads_that_are_known_ahead_are_planned_for_and_their_gather_is_hidden() -> None:
    """As `exact` in all that follows from the plan, and as `history` in what hides its gather."""
    steps = [[[10, 0], [0, 0]], [[20, 0], [4, 0]]]
    history, exact, replay = (run(steps, halves, mode=mode) for mode in ("history", "exact", "replay"))
    assert (replay.seconds.compute, replay.seconds.dispatch) == (exact.seconds.compute, exact.seconds.dispatch) == (3 * 12, 4 * 8)
    assert replay.seconds.gather == exact.seconds.gather > 0
    assert (history.seconds.exposed, replay.seconds.exposed) == (0, 0)
    assert exact.seconds.exposed > 0


def test_attention_hides_no_gather_of_a_plan_made_after_the_gate() -> None:
    """4 s of gather come after the router; 4 s of reduction still hide behind the backward pass. The engine makes no exception of `full`,
    which could plan without a router."""
    steps = [ALL_TO_FIRST] * 3
    history, exact = run(steps, halves), run(steps, halves, mode="exact")
    assert (history.seconds.gather, exact.seconds.gather) == (4, 4)
    assert (history.seconds.exposed, exact.seconds.exposed) == (0, 4)
    assert exact.step_seconds - history.step_seconds == 4
    loads = np.array(steps).swapaxes(1, 2)[:, None]
    (full,) = simulate(
        loads, {"full": POLICIES["full"]}, Setting(topology=NODE, cost=COST, execution=ExecutionMode(plan="exact"), slots_D=np.full(2, 2))
    )
    assert full.seconds.exposed == 4


def test_how_plans_are_executed_is_what_is_priced() -> None:
    """4 s of gather that nothing hides without prefetch; eight messages of 3 s for each of two micro-steps; one hot expert in thirds."""
    loads = np.array([ALL_TO_FIRST] * 2).swapaxes(1, 2)[:, None]

    def simulated(policy: str, topology: Topology, loads: np.ndarray, cost: LayerCost = COST, **execution: Any) -> StepSeconds:
        slots_D = np.full(topology.world_size, 2)
        mode = ExecutionMode(**execution)
        return simulate(loads, {policy: POLICIES[policy]}, Setting(topology=topology, cost=cost, execution=mode, slots_D=slots_D))[
            0
        ].seconds

    assert simulated("full", NODE, loads, prefetch=0).exposed == 4
    late = replace(NODE, intra_node=Link(1.0, 3.0))
    assert simulated("static_ep", late, loads, micro_steps=2).dispatch - simulated("static_ep", late, loads).dispatch == 8 * 3
    four = Topology((0,) * 4, (1.0,) * 4, (1e9,) * 4, Link(1.0, 0.0), Link(1.0, 0.0), memory_bandwidth=(1.0,) * 4)
    hot, cut = np.full((2, 1, 1, 4), 10), replace(COST, trainable_bytes=12.0, chunk_numel=3)
    assert [simulated("full", four, hot, cut, route=route).gather for route in ("flat", "sliced", "fastest")] == [36, 20, 20]


def test_a_frozen_transfer_pays_its_latency_only_where_something_travels() -> None:
    """A message takes 3 s: parameters and frozen parts in the first step, parameters alone in the later ones; nothing hides them."""
    cost, topology = replace(COST, frozen_bytes=100.0, non_moe_flops=0.0), replace(NODE, intra_node=Link(1.0, 3.0))
    first, later = (run([ALL_TO_FIRST] * steps, POLICIES["full"], cost=cost, topology=topology) for steps in (1, 3))
    assert first.seconds.gather == 4 + 3 + 100 + 3
    assert later.seconds.gather == 4 + 3


def test_history_is_the_mean_of_five_steps() -> None:
    seen: list[list[float]] = []

    def planner(given: PlanInput) -> Plan:
        seen.append([] if given.loads_LED is None else given.loads_LED[0, 0].tolist())
        return POLICIES["static_ep"](given)

    run([[[n, 0], [2 * n, 0]] for n in (0, 5, 10, 15, 20, 35, 0)], planner)
    assert seen == [[], [0, 0], [2.5, 5], [5, 10], [7.5, 15], [10, 20], [17, 34]]


def test_new_owners_are_paid_for() -> None:
    """Expert 0 moves from rank 0 to rank 1 after the first step: 20 bytes of state and two messages, here without latency."""

    def planner(given: PlanInput) -> Plan:
        owner = given.owner_LE if given.loads_LED is None else np.array([[1, 1]])
        return Plan(owner, owner[..., None] == np.arange(2))

    steps = [ALL_TO_FIRST] * 3
    row = run(steps, planner, cost=replace(COST, state_bytes=20.0))
    assert row.seconds.reshard == pytest.approx(20 / 2)  # in one of two counted steps
    assert row.bytes.near == pytest.approx(40 + 20 / 2)
    assert row.seconds.optimizer == 2 * (4 + 2 * 20)  # both experts on one rank


def test_resharding_happens_when_it_is_asked_for() -> None:
    """Both of rank 0's experts are hot and cannot be replicated; once they have been moved, each rank serves one."""
    loads = np.array([[[[50, 50], [50, 50], [0, 0], [0, 0]]]] * 6)
    cost = replace(COST, trainable_bytes=0.001, non_moe_flops=0.0)
    policies = {"hecate_paper": POLICIES["hecate_paper"], "static_ep": POLICIES["static_ep"]}
    stay = simulate(loads, policies, Setting(topology=NODE, cost=cost, slots_D=np.zeros(2, dtype=int)))
    move = simulate(loads, policies, Setting(topology=NODE, cost=cost, slots_D=np.zeros(2, dtype=int), reshard_interval=2))
    assert [row.imbalance for row in stay] == [2, 2]
    assert [row.imbalance for row in move] == [1, 2]


def test_bytes_between_nodes_are_those_of_each_source_alone() -> None:
    """With top-1 every assignment is a row: rows near and far by a plain loop over sources, experts and ranks."""
    topology = unit_topology((0, 1, 0, 1), far=Link(0.5, 0.0))
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 30, (2, 1, 6, 4))
    owner_E = np.array([0, 0, 1, 2, 2, 3])
    where_ED = (owner_E[:, None] == np.arange(4)) | (rng.random((6, 4)) < 0.3)
    share_ED = where_ED * rng.random((6, 4))
    quota_ED = loads[0, 0].sum(1, keepdims=True) * share_ED / share_ED.sum(1, keepdims=True)

    def planner(given: PlanInput) -> Plan:
        return Plan(given.owner_LE, where_ED[None], None if given.loads_LED is None else quota_ED[None])

    row = run([step[0].T.tolist() for step in loads], planner, cost=replace(COST, trainable_bytes=0.0), topology=topology)
    near = far = 0.0
    for source in range(4):
        split_ED = token_split(where_ED, loads[0, 0], quota_ED, topology, source)
        for expert in range(6):
            for rank in range(4):
                rows = loads[1, 0, expert, source] * split_ED[expert, rank] * 4
                near += rows * (rank != source and rank % 2 == source % 2)
                far += rows * (rank % 2 != source % 2)
    assert row.bytes.near == pytest.approx(near)
    assert row.bytes.far == pytest.approx(far)


def test_replica_slots_by_hand() -> None:
    """Three experts on two ranks: two owned, each 4 + 4 + 12 bytes in each of two layers: 80. 100 - 80 - 4 leave 16, half of it 8: one
    replica of 8 bytes if one layer's are there at a time, else none. The other device has room for more than there are experts.
    """
    topology = replace(NODE, memory=(100.0, 1e6))
    cost = replace(COST, state_bytes=12.0)
    few = slots_in_memory(topology, cost, num_layers=2, num_experts=3, other_bytes=4.0)
    assert few.tolist() == [0, 3]
    assert slots_in_memory(topology, cost, num_layers=2, num_experts=3, other_bytes=4.0, rematerialize=True).tolist() == [1, 3]


def test_the_same_input_gives_the_same_figures() -> None:
    steps = [[[30, 1], [4, 20]], [[5, 40], [6, 7]], [[8, 9], [50, 1]]]
    first, second = (replace(run(steps, POLICIES["auto"]), planner_ms_per_layer=0.0) for _ in range(2))
    assert first == second


def test_smartmoe_plans_every_tenth_step_from_the_last_two() -> None:
    seen: list[float] = []

    def planner(given: PlanInput) -> Plan:
        seen.append(0.0 if given.loads_LED is None else given.loads_LED[0, 0, 0])
        return POLICIES["static_ep"](given)

    loads = np.zeros((24, 1, 2, 2), dtype=int)
    loads[:, 0, 0, 0] = np.arange(24)
    simulate(loads, {"smartmoe": planner}, Setting(topology=NODE, cost=COST, slots_D=np.zeros(2, dtype=int)))
    assert seen == [0, 0, 9.5, 19.5]  # steps 0, 1, 11 and 21, the means of steps 9 and 10, 19 and 20


EVEN = [[8, 0], [8, 0]], [[0, 8], [0, 8]]
"""in one step both ranks choose expert 0, in the other expert 1: 16 assignments, which take 3 s each on one rank"""


def hottest_everywhere(given: PlanInput) -> Plan:
    """The expert with the most assignments on both ranks, each of which serves its own."""
    hot_LE1 = (given.expected_LED.sum(-1) == given.expected_LED.sum(-1).max(-1, keepdims=True))[..., None]
    at_home_LED = given.expected_LED.sum(-1, keepdims=True) * given.owned_LED
    return Plan(given.owner_LE, given.owned_LED | hot_LE1, np.where(hot_LE1, given.expected_LED, at_home_LED))


@pytest.mark.parametrize(
    ("attention", "micro_steps", "late", "gathers", "exposed"),
    [
        # A late gather and its reduction take 4 s each. Calibrated, the first plan's gather would come on top.
        (0.0, 1, "exact", 4 + 4, 8 + 8),
        # Attention hides the steady layer's, and the first plan's. What the better plan needs takes 4 s in three of four steps.
        (5.0, 1, "calibrated", 4 + (4 + 3 * 8) / 4, 3),
        # In three of four steps two micro-steps gather the jumping layer, each for itself.
        (0.0, 2, "exact", 4 + (4 + 3 * 8) / 4, 8 + (8 + 3 * 16) / 4),
    ],
)
def test_each_layer_goes_by_the_mode_that_was_fastest(
    attention: float, micro_steps: int, late: str, gathers: float, exposed: float
) -> None:
    """Layer 0 always has the same loads, and those of layer 1 jump. So history costs it 48 s.

    Nothing is measured before the third of five steps, and the first is not counted: history is 5 of 8, compute 4 · 24, 48 and 3 · 24 s.
    """
    loads = np.array([[EVEN[0], EVEN[step % 2]] for step in range(5)]).swapaxes(2, 3)
    cost = LayerCost(trainable_bytes=4.0, assignment_flops=1.0, non_moe_flops=attention)
    execution = ExecutionMode(micro_steps=micro_steps)
    (row,) = simulate(
        loads,
        {"tried": hottest_everywhere},
        Setting(topology=NODE, cost=cost, slots_D=np.full(2, 2), execution=execution, window=1, choose_modes=MODES),
    )
    assert row.plan_modes == {"history": 5 / 8, "calibrated": 0, "exact": 0} | {late: 3 / 8}
    assert row.seconds.compute == (4 * 24 + 48 + 3 * 24) / 4
    assert (row.seconds.gather, row.seconds.exposed, row.seconds.optimizer) == (gathers, exposed, 8)
    assert row.bytes.near == gathers + (8 if late == "calibrated" else gathers), "and the gradients"
    assert row.replica_bytes_D == (16.0, 16.0), (
        "the steady layer's are on rank 1, and in the first step, whose loads count as even, on rank 0"
    )


@pytest.mark.parametrize(("slots", "kept"), [(1, 1), (2, 2)])
def test_frozen_parts_that_are_kept_take_memory(slots: int, kept: int) -> None:
    """Another expert of rank 0 gets hot: rank 1 gets a replica of it, and keeps the frozen part of the one before if it has a slot."""

    def planner(given: PlanInput) -> Plan:
        return Plan(given.owner_LE, given.owned_LED) if given.loads_LED is None else hottest_everywhere(given)

    loads = np.zeros((3, 1, 4, 2), dtype=np.int64)
    loads[0, 0, 0] = loads[1:, 0, 1] = 8
    cost = LayerCost(trainable_bytes=4.0, frozen_bytes=100.0, assignment_flops=1.0)
    (row,) = simulate(loads, {"tried": planner}, Setting(topology=NODE, cost=cost, slots_D=np.full(2, slots), predict=last_loads))
    assert row.replica_bytes_D == (0.0, 8.0 + 100.0 * kept)


def last_loads(past: np.ndarray) -> np.ndarray:
    return past[-1].astype(np.float64)


def test_the_first_steps_have_their_share_of_a_run() -> None:
    """Step 0 brings 100 bytes each way. A replica's 4 bytes and its gradient's travel in all steps, and each rank has one."""
    cost, loads = LayerCost(trainable_bytes=4.0, frozen_bytes=100.0), np.full((4, 1, 2, 2), 8)

    def full(run_steps: int | None) -> Simulated:
        setting = Setting(topology=NODE, cost=cost, slots_D=np.full(2, 2), run_steps=run_steps)
        return simulate(loads, {"full": POLICIES["full"]}, setting)[0]

    endless = full(None)
    assert (endless.bytes.near, endless.seconds.exposed) == (16, 8)
    for steps in (2, 4, 50):
        row = full(steps)
        assert row.bytes.near == pytest.approx(16 + 200 / steps)
        assert row.seconds.exposed == pytest.approx(8 + 100 / steps)
        optimizer = row.seconds.optimizer
        assert (row.first_steps, row.first_seconds, row.first_bytes) == (2, 108 + 8 + 2 * optimizer, 216 + 16)
    assert full(1).bytes.near == (216 + 16) / 2, "no fewer than the first steps"


@pytest.mark.parametrize(("run_steps", "held"), [(1000, 4.0), (None, 0.0), (3, 0.0)])
def test_what_memory_holds_is_brought_as_soon_as_loads_are_known_if_the_run_is_long(run_steps: int | None, held: float) -> None:
    """A frozen part travels as long as the rows of 100 steps that one rank sends for its expert: 8 a step, there and back, twice."""
    cost = LayerCost(trainable_bytes=0.001, frozen_bytes=3200.0, row_bytes=1.0)
    loads = np.full((3, 1, 8, 2), 8)
    (row,) = simulate(loads, AUTO, Setting(topology=NODE, cost=cost, slots_D=np.full(2, 8), run_steps=run_steps))
    assert row.frozen_parts_D == (held, held)


@pytest.mark.parametrize("workload", ["rotating", "trained_steady"])
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_exact_plans_are_never_slower_than_those_from_history(workload: str, kind: Kind) -> None:
    """But for the time that planning takes. Step by step, before a step has been measured: they begin with history's gather, and may keep
    its plan."""
    topology = topologies()["8x1"]
    loads = WORKLOADS[workload](3, 1, topology.world_size, 16, 4096, 2, 0)
    seconds = {}
    for choice in ("history", "exact"):
        plan, among = execution_of(choice, 1)
        both = [
            simulate(
                part,
                AUTO,
                Setting(topology=topology, cost=kind.cost, slots_D=np.full(8, 2), execution=ExecutionMode(plan=plan), choose_modes=among),
            )[0]
            for part in (loads[:2], loads[1:])
        ]
        seconds[choice] = np.array([one.step_seconds - one.seconds.planning for one in both])
    assert (seconds["exact"] <= seconds["history"] * (1 + 1e-12)).all()
    if workload == "rotating" and kind.name != "LoRA, dense base":
        assert seconds["exact"].sum() < 0.99 * seconds["history"].sum()
