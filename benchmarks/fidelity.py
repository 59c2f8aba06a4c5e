"""Compare the simulator's predictions with real steps: seconds and bytes on 2 and 4 gloo ranks of one thread each.

A run is a few steps from an empty history, under a synthetic workload and a policy, and is repeated. Its routing has exactly the loads of
the workload. `hecate.parallel.simulate.simulator` predicts the same steps from a topology that `hecate profile` measures and from probes of
single parts (`step_probes`), never from a run. The error of a run is max(predicted / measured, measured / predicted) - 1; over several runs
it is that of the geometric mean of these ratios. Bytes are counted where they are passed to torch.distributed, and must equal the plan's,
for every two ranks in every step.

Runs and probes alternate, each next to a yardstick (`gloo_steps.Clock`). On a shared machine, waiting times contain the work of others.
`busy` therefore compares CPU seconds of the busiest rank with the same parts in CPU seconds, which do not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gloo_steps import Clock, Shape, Stack, Taken, Wire, draw_routing
from benchmarks.planned_bytes import planned_traffic
from benchmarks.report import finish, kept_rows, recorded, resumable
from benchmarks.step_probes import Parts, Probes, measured_cost, measured_topology, parts, yardstick
from hecate.launch.local_launcher import RANK_SETTINGS
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import profile
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import DISPATCH_COLLECTIVES, LEAST_TRAFFIC
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, Plan, PlanInput
from hecate.parallel.simulate.simulated_step import HISTORY_STEPS, Setting
from hecate.parallel.simulate.simulator import Simulated, simulate
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.placement import contiguous_owners
from hecate.parallel.values.predictors import predicted_loads
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.plain_flows import executed_flows, rows_served, served
from testing.ranks import run_ranks

TRIED = ("static_ep", "full", "hecate_paper", "auto")
CASES = ("balanced", "one_hot_expert", "hot_rank", "ragged_sources", "empty_rank", "rotating", "burst", "zipf", "dirichlet_drift")
SHAPES = {2: Shape(tokens=256), 4: Shape(tokens=128)}
"""the layer's shape by the number of ranks"""
STEPS = 6
"""the steps of a run. The first one has no history and is not counted; in the workload burst the fifth and sixth are the bursts"""
PROFILE = ProbeSizes(matmul=1024, copy_bytes=1 << 26, small_bytes=1 << 10, large_bytes=1 << 22, seconds=0.3)


@dataclass(frozen=True)
class Step:
    """One measured step of a run on one rank."""

    workload: str
    policy: str
    number: int
    taken: Taken
    bytes_to: list[int]
    """the bytes passed to torch.distributed for each other rank"""
    counted: int
    """the bytes sent according to the engine"""


@dataclass(frozen=True)
class Measured:
    """The measurements of one rank."""

    topologies: list[Topology]
    planning: LayerCost
    """the cost that the engine planned with, next to the first topology"""
    probes: list[dict[str, Taken]]
    steps: list[Step]


def loads_of(workload: str, world: int, shape: Shape) -> np.ndarray:
    """Return the loads of a workload, int64 [steps, layers, experts, source ranks]."""
    return WORKLOADS[workload](STEPS, shape.layers, world, shape.experts, shape.tokens, shape.top_k, 0)


def routing_of(load_E: np.ndarray, shape: Shape, step: int, layer: int, rank: int) -> np.ndarray:
    return draw_routing(load_E, shape.top_k, np.random.default_rng([step, layer, rank]))


def measure(rank: int, world: int, shape: Shape, workloads: Sequence[str], repeats: int) -> Measured:
    """Run probes and steps on this rank. Every rank must call it."""
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    topologies = [_profiled(Ranks(rank, world, torch.device("cpu"), groups))]
    clock = Clock(yardstick(shape))
    probes = Probes(shape, topologies[0], groups, rank)
    seconds = [probes.run(clock) for _ in range(3)]
    planning = measured_cost(parts_of(seconds, shape).seconds, shape, topologies[0])
    stacks = {policy: Stack(shape, POLICIES[policy], topologies[0], planning, groups) for policy in TRIED}
    x_TD = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    steps: list[Step] = []
    for _ in range(repeats):
        for workload in workloads:
            for stack in stacks.values():
                stack.forget_loads()
            for number, loads_LED in enumerate(loads_of(workload, world, shape)):
                drawn = [routing_of(loads_ED[:, rank], shape, number, layer, rank) for layer, loads_ED in enumerate(loads_LED)]
                weights = [torch.full(expert_TK.shape, 1 / shape.top_k).requires_grad_() for expert_TK in drawn]
                routing = list(zip(map(torch.from_numpy, drawn), weights, strict=True))
                for policy, stack in stacks.items():
                    before, wire = stack.engine.shards.bytes_sent, Wire(world, rank)
                    with wire.counting():
                        taken = clock.time(partial(stack.step, number, x_TD, routing))
                    steps.append(Step(workload, policy, number, taken, wire.bytes_to, stack.engine.shards.bytes_sent - before))
            seconds.append(probes.run(clock))
        topologies.append(_profiled(Ranks(rank, world, torch.device("cpu"), groups)))
    return Measured(topologies, planning, seconds, steps)


@dataclass(frozen=True)
class Found:
    """The parts of a step by both clocks."""

    seconds: Parts
    busy: Parts
    """the parts in CPU seconds of this rank"""


def parts_of(probes: Sequence[Mapping[str, Taken]], shape: Shape) -> Found:
    """Return the parts of a step from the medians of repeated probes."""
    seconds = {name: median(sample[name].seconds for sample in probes) for name in probes[0]}
    busy = {name: median(sample[name].busy for sample in probes) for name in probes[0]}
    return Found(parts(seconds, shape), parts(busy, shape))


@dataclass(frozen=True, eq=False)
class Planned:
    """A step's plan, and the bytes and rows that it must lead to under the step's actual routing."""

    plan: Plan
    given: PlanInput
    sent_WW: np.ndarray
    """the bytes from each rank to each other rank"""
    rows_LW: np.ndarray
    """the distinct tokens that each rank computes in each layer"""


def planned_steps(loads: np.ndarray, policy: str, shape: Shape, measured: Measured) -> Iterator[Planned]:
    """Yield the steps of a run with the plans that the engine makes.

    Args:
        loads: int64 [steps, layers, experts, source ranks].
    """
    _, num_layers, num_experts, world = loads.shape
    owner_LE = np.tile(contiguous_owners(num_experts, world), (num_layers, 1))
    for number, loads_LED in enumerate(loads):
        known = predicted_loads(loads[:number], HISTORY_STEPS) if number else None
        given = PlanInput(owner_LE, known, measured.topologies[0], measured.planning, np.full(world, num_experts))
        plan = POLICIES[policy](given)
        drawn = [
            [routing_of(load_E, shape, number, layer, rank) for rank, load_E in enumerate(loads_ED.T)]
            for layer, loads_ED in enumerate(loads_LED)
        ]
        yield Planned(plan, given, *planned_traffic(given, plan, drawn, shape))


@dataclass(frozen=True)
class Foretold:
    """The predictions of a run, from the loads, the plans and the probes."""

    seconds: float
    """the seconds of the mean counted step"""
    busy: float
    """the CPU seconds of its busiest rank"""
    simulated: Simulated
    """the simulator's result alone"""
    sent: list[np.ndarray]
    """the bytes of each step, [ranks, ranks]"""
    rows_error: float
    """the error of the estimated number of distinct tokens that all ranks compute, in the worst layer of any step"""


def foretell(workload: str, policy: str, shape: Shape, measured: Measured, cores: int) -> Foretold:
    """Predict a run by the simulator, and add what its cost model leaves out.

    That is: experts are launched one by one, dispatch copies tokens, a step has work of its own, and ranks may share cores.
    """
    world = measured.topologies[0].world_size
    clocks = parts_of(measured.probes, shape)
    found = clocks.seconds
    topology = measured_topology(measured.topologies, found)
    cost = measured_cost(found, shape, topology)
    loads = loads_of(workload, world, shape)

    def planner(given: PlanInput) -> Plan:
        """Return the plan that the engine made, whatever was measured later."""
        return POLICIES[policy](replace(given, topology=measured.topologies[0], cost=measured.planning))

    (simulated,) = simulate(loads, {policy: planner}, Setting(topology=topology, cost=cost, slots_D=np.full(world, shape.experts)))
    sent, errors, compute, busy = [], [0.0], [], []
    for loads_LED, planned in zip(loads, planned_steps(loads, policy, shape, measured), strict=True):
        plan = planned.plan
        loads_LED = loads_LED.astype(np.float64)
        flow = executed_flows(plan.where_LED, plan.quota_LED, planned.given.expected_LED, loads_LED, topology)
        rows, assignments_LED = rows_served(flow, loads_LED, cost, topology), served(flow)
        rows_LD = rows.computed_D
        passed_L = np.array([plan.layer(planned.given, layer).dispatches(topology) for layer in range(len(loads_LED))])
        work = partial(_work, rows_LD=rows_LD, assignments_LED=assignments_LED, passed_L=passed_L)
        # Every rank has every expert and the plan sends tokens, but under the step's actual loads all tokens stay on their ranks.
        unpriced = (passed_L & plan.where_LED.all((1, 2)) & (rows.near[0].sum(1) <= LEAST_TRAFFIC)).sum()
        compute.append(
            sum(shared_cores_seconds(work_D, cores) for work_D in work(found)) + unpriced * DISPATCH_COLLECTIVES * found.exchange
        )
        own = clocks.busy
        once = own.rest + shape.layers * own.attention + passed_L.sum() * DISPATCH_COLLECTIVES * own.exchange
        moved_D = (planned.sent_WW.sum(0) + planned.sent_WW.sum(1)) / 2
        busy.append(float((work(own).sum(0) + once + moved_D * own.byte).max()))
        sent.append(planned.sent_WW)
        errors += np.abs(rows_LD.sum(1) / planned.rows_LW.sum(1) - 1).tolist()
    seconds = simulated.step_seconds - simulated.seconds.compute + float(np.mean(compute[1:])) + found.rest
    return Foretold(seconds, float(np.mean(busy[1:])), simulated, sent, max(errors))


def _work(by: Parts, *, rows_LD: np.ndarray, assignments_LED: np.ndarray, passed_L: np.ndarray) -> np.ndarray:
    """Return the seconds that each rank computes its experts in one step, float64 [layers, ranks].

    Args:
        passed_L: bool [layers], whether the layer's tokens go through dispatch.
    """
    row_L1 = by.row + by.passed_row * passed_L[:, None]
    return np.asarray(rows_LD * row_L1 + assignments_LED.sum(1) * by.assignment + (assignments_LED > 0).sum(1) * by.slot)


def shared_cores_seconds(work_D: np.ndarray, cores: int) -> float:
    """Return the seconds until all ranks are done if they share `cores` fairly and each uses at most one.

    Args:
        work_D: the seconds that each rank would take on a core of its own.
    """
    left, done, seconds = len(work_D), 0.0, 0.0
    busy = max(1.0, left / cores)
    for work in sorted(work_D.tolist()):
        seconds += (work - done) * max(1.0, left / cores) / busy
        left, done = left - 1, work
    return seconds


def rows_of(world: int, shape: Shape, workloads: Sequence[str], measured: Sequence[Measured], cores: int) -> list[dict[str, Any]]:
    """Return a row of results for each workload and policy.

    Args:
        measured: the measurements of each rank.
    """
    rows = []
    for workload, policy in product(workloads, TRIED):
        mine = [[step for step in one.steps if (step.workload, step.policy) == (workload, policy)] for one in measured]
        taken = _mean_step(mine[0], "seconds")
        busy = max(_mean_step(steps, "busy") for steps in mine)
        told = foretell(workload, policy, shape, measured[0], cores)
        exact = [
            step.counted == sum(step.bytes_to) and step.bytes_to == told.sent[step.number][rank].tolist()
            for rank, steps in enumerate(mine)
            for step in steps
        ]
        rows.append(
            {
                "ranks": world,
                "workload": workload,
                "policy": policy,
                "measured_ms": 1e3 * taken,
                "predicted_ms": 1e3 * told.seconds,
                "ratio": told.seconds / taken,
                "simulator_ratio": told.simulated.step_seconds / taken,
                "busy_ms": 1e3 * busy,
                "busy_ratio": told.busy / busy,
                **{f"{name}_ms": 1e3 * getattr(told.simulated.seconds, name) for name in ("attention", "compute", "dispatch", "exposed")},
                "bytes_exact": float(np.mean(exact)),
                "bytes_sent": float(np.mean([sent_WW.sum() for sent_WW in told.sent[1:]])),
                "rows_error": told.rows_error,
            }
        )
    return rows


def _mean_step(steps: Sequence[Step], clock: str) -> float:
    """Return the mean over the counted steps of the median over their repetitions."""
    return float(np.mean([median(getattr(step.taken, clock) for step in steps if step.number == number) for number in range(1, STEPS)]))


def _profiled(ranks: Ranks) -> Topology:
    with tempfile.TemporaryDirectory() as folder:
        return profile(ranks, Path(folder) / "topology.yaml", PROFILE)


def _error(rows: Sequence[Mapping[str, Any]], ratio: str = "ratio") -> float:
    return geometric_mean([max(row[ratio], 1 / row[ratio]) for row in rows]) - 1


def main() -> None:
    options = resumable(__doc__ or "").parse_args()
    workloads, repeats = (("balanced", "zipf"), 1) if options.quick else (CASES, 2)
    os.environ.update(RANK_SETTINGS)  # as in training
    cores = len(os.sched_getaffinity(0))
    rows = kept_rows(options)
    for world, shape in SHAPES.items():

        def measured(world: int = world, shape: Shape = shape) -> list[dict[str, Any]]:
            return rows_of(world, shape, workloads, run_ranks(world, measure, shape, workloads, repeats, timeout=3000), cores)

        recorded(rows, {"ranks": world}, measured, options.json)
    by_ranks = {world: [row for row in rows if row["ranks"] == world] for world in SHAPES}
    summary = {
        "step_time_error_geomean": _error(rows),
        **{f"step_time_error_geomean_{world}_ranks": _error(some) for world, some in by_ranks.items()},
        **{f"simulator_alone_error_geomean_{world}_ranks": _error(some, "simulator_ratio") for world, some in by_ranks.items()},
        "busy_time_error_geomean": _error(rows, "busy_ratio"),
        "step_time_error_worst": max(_error([row]) for row in rows),
        "bytes_exact_share": float(np.mean([row["bytes_exact"] for row in rows])),
        "rows_error_worst": max(row["rows_error"] for row in rows),
    }
    finish("fidelity", rows, summary, options.json)


if __name__ == "__main__":
    main()
