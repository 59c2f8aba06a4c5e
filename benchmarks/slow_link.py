"""Time the MixLoRA layer of `moe_layer` over a link of 1 Gbit/s between two network namespaces, as two nodes of one or two ranks each.

The topology for planning is measured first, on the same ranks, by simultaneous matmuls and all-to-alls over the link. Policies take
turns in the same processes (`benchmarks.ratios`), and a sample is the slowest rank's time. Those that the summary compares go on until
their ratios are known well enough; the others are sampled a few times, for the table. Two columns explain it: `cpu_ms_min` is the CPU
time of the rank that computed most, and `link_ms` the least time that the link's busier direction needs at its rate. `bytes_sent` is
counted by the engines, between all ranks; `bytes_across` is counted at the two ends of the link, with headers, acknowledgements and the
exchange of loads. This needs root.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.moe_layer_parts import Shape, check, make_engine, one_step, route
from benchmarks.ratios import Budget, Ratio, least, speedup
from benchmarks.report import arguments, finish
from benchmarks.slowest_rank import SlowestRank, take_turns
from hecate.engine.engine import Engine
from hecate.launch.profile.fit import topology_from
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import measure as measure_ranks
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.namespaces import bytes_out, missing_for_slow_link, slow_link
from testing.ranks import run_ranks

RATE = "1gbit"
RATE_BYTES = 1e9 / 8
"""the rate in bytes per second"""
SETTINGS = {"2 nodes x 1": (0, 1), "2 nodes x 2": (0, 0, 1, 1)}
"""the node of each rank, by the name of the setting"""
ROUTINGS = ("zipf(1.2)", "balanced")
PER_CHOICE = "ep_per_choice"
"""expert parallelism as in the textbook; see `benchmarks.moe_layer`"""
RIVALS = ("static_ep", "full", PER_CHOICE)
"""what `auto` is compared with"""
ENOUGH, QUICK, TABLE = Budget(half_width=0.02, rounds=40), Budget(half_width=0.02, rounds=2), Budget(half_width=0.02, rounds=4)
"""for ratios; for `--quick`; and for policies that no ratio needs"""
_SIZES = ProbeSizes(matmul=1024, copy_bytes=1 << 27, small_bytes=1 << 10, large_bytes=1 << 23, seconds=1.0)


def measure(*, quick: bool = False) -> tuple[list[dict[str, Any]], dict[str, float | Ratio]]:
    """Return the rows and the summary of all settings. Call `missing_for_slow_link` before.

    Raises:
        AssertionError: the layer's output or a gradient is wrong, or a rank failed.
        OSError: the link cannot be created.
    """
    policies = ("static_ep", "full", "hecate_paper", "auto") if quick else tuple(POLICIES)
    budget, table = (QUICK, QUICK) if quick else (ENOUGH, TABLE)
    rows: list[dict[str, Any]] = []
    for setting, node_of_rank in SETTINGS.items():
        with slow_link(RATE) as names:
            namespaces = [names[node] for node in node_of_rank]
            arguments_ = (node_of_rank, Shape(), policies, budget, table)
            of_ranks = run_ranks(len(node_of_rank), bench_rank, *arguments_, timeout=3600, namespaces=namespaces)
        rows += [{"setting": setting, **row} for row in of_ranks[0]]
    return rows, summarize(rows, budget)


def summarize(rows: list[dict[str, Any]], budget: Budget) -> dict[str, float | Ratio]:
    """Return `auto`'s speed-ups, each the lowest of the settings.

    `..._cpu_and_link_...` is the ratio of `cpu_ms_min` + `link_ms`: the time if each rank had a core and the link carried nothing else.
    """
    samples = {(row["setting"], row["routing"], row["policy"]): row["ms_all"] for row in rows}
    floor = {(row["setting"], row["routing"], row["policy"]): row["cpu_ms_min"] + row["link_ms"] for row in rows}

    def worst(policy: str, routings: tuple[str, ...]) -> Ratio:
        return least(speedup(samples[s, routing, "auto"], samples[s, routing, policy], budget) for s in SETTINGS for routing in routings)

    def worst_floor(policy: str, routings: tuple[str, ...]) -> float:
        return min(floor[s, routing, policy] / floor[s, routing, "auto"] for s in SETTINGS for routing in routings)

    return {
        "slow_link_speedup_over_static_ep": worst("static_ep", ROUTINGS[:1]),
        "slow_link_speedup_over_full": worst("full", ROUTINGS),
        "slow_link_balanced_speedup_over_static_ep": worst("static_ep", ROUTINGS[1:]),
        "slow_link_speedup_over_ep_per_choice": worst(PER_CHOICE, ROUTINGS[:1]),
        "slow_link_cpu_and_link_speedup_over_static_ep": worst_floor("static_ep", ROUTINGS[:1]),
        "slow_link_cpu_and_link_speedup_over_full": worst_floor("full", ROUTINGS),
        "slow_link_gbit_per_s": min(row["uplink_gbit_per_s"] for row in rows),
    }


def bench_rank(
    rank: int, world: int, node_of_rank: tuple[int, ...], shape: Shape, policies: tuple[str, ...], budget: Budget, table: Budget
) -> list[dict[str, Any]]:
    default = dist.group.WORLD
    assert default is not None
    tokens = dist.new_group()
    assert isinstance(tokens, dist.ProcessGroup)
    groups = ExpertGroups(default, tokens)
    topology = measured_topology(Ranks(rank, world, torch.device("cpu"), groups), node_of_rank)
    engines = {policy: make_engine(policy, shape, groups, topology) for policy in policies}
    engines[PER_CHOICE] = make_engine("static_ep", shape, groups, topology)
    first_of_node = node_of_rank.index(node_of_rank[rank]) == rank
    rows = []
    for routing in ROUTINGS:
        expert, weight = route(routing, shape, seed=rank)
        x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        weight.requires_grad_()
        for policy, engine in engines.items():
            engine.shards.history.load_state_dict([])  # so that the next plans are made from the loads of this routing only
            check(engine, rank, shape, expert, weight, per_choice=policy == PER_CHOICE)
        steps = {
            policy: TimedPolicy(engine, x, expert, weight, per_choice=policy == PER_CHOICE, counts=first_of_node)
            for policy, engine in engines.items()
        }
        clocks = {policy: SlowestRank(prepare) for policy, prepare in steps.items()}
        take_turns(clocks, [PER_CHOICE, "static_ep", "auto", "full"], [("auto", rival) for rival in RIVALS], budget)
        take_turns(clocks, [policy for policy in policies if policy not in ("auto", *RIVALS)], [], table)
        rows += [
            {
                "routing": routing,
                "policy": policy,
                "ms_median": statistics.median(clocks[policy].ms),
                "ms_min": min(clocks[policy].ms),
                "ms_all": clocks[policy].ms,
                "cpu_ms_min": min(clocks[policy].cpu_ms),
                **steps[policy].facts(shape),
                "gflops_per_rank": min(topology.flops) / 1e9,
                "uplink_gbit_per_s": min(topology.uplink_bandwidth) * 8e-9,
                "overlap_slowdown": topology.overlap_slowdown,
            }
            for policy in engines
        ]
    return rows


class TimedPolicy:
    """The steps of one policy. Called with a step's number, it returns the step.

    Args:
        counts: whether this rank counts the bytes that leave its node.
    """

    def __init__(self, engine: Engine, x: Tensor, expert: Tensor, weight: Tensor, *, per_choice: bool, counts: bool) -> None:
        self._engine, self._x, self._expert, self._weight = engine, x, expert, weight
        self._per_choice, self._counts = per_choice, counts
        self._before = (0, 0)
        self._after = (0, 0)
        self._loads: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Callable[[], None]:
        self._before = self._sent()

        def take() -> None:
            _, self._loads = one_step(self._engine, step, self._x, self._expert, self._weight, per_choice=self._per_choice)
            self._after = self._sent()

        return take

    def _sent(self) -> tuple[int, int]:
        return self._engine.shards.bytes_sent, bytes_out()

    def facts(self, shape: Shape) -> dict[str, Any]:
        """Of the last step, on all ranks. All must call it."""
        sent, across = (after - before for before, after in zip(self._before, self._after, strict=True))
        left = torch.tensor([sent, across * self._counts])
        busier = left[1].clone()
        dist.all_reduce(left)
        dist.all_reduce(busier, op=dist.ReduceOp.MAX)
        return {
            "link_ms": 1e3 * int(busier) / RATE_BYTES,
            "bytes_sent": int(left[0]),
            "bytes_across": int(left[1]),
            "replicas": int(self._engine.shards.placements[Unit(0)].where_ED.sum()) - shape.experts,
            "imbalance": self._engine.shards.plans.imbalance(self._loads),
        }


def measured_topology(ranks: Ranks, node_of_rank: tuple[int, ...]) -> Topology:
    """Measure the topology, with all ranks equally fast, as their cores are, so that plans do not follow other programs' load."""
    topology = topology_from(measure_ranks(ranks, node_of_rank, ("cpu",) * ranks.world_size, _SIZES))
    return replace(topology, flops=(statistics.median(topology.flops),) * ranks.world_size)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    if reason := missing_for_slow_link():
        raise SystemExit(f"slow_link: {reason}")
    rows, summary = measure(quick=options.quick)
    finish("slow_link", rows, summary, options.json)


if __name__ == "__main__":
    main()
