"""Time the MixLoRA layer of `moe_layer` over a link of 1 Gbit/s between two network namespaces, as two nodes of one or two ranks each.

The topology for planning is measured first, on the same ranks, by simultaneous matmuls and all-to-alls over the link. All policies
alternate in the same processes, and a sample is the slowest rank's time. Two columns explain it: `cpu_ms_min` is the CPU time of the rank
that computed most, and `link_ms` the least time that the link's busier direction needs at its rate. `bytes_sent` is counted by the
engines, between all ranks; `bytes_across` is counted at the two ends of the link, with headers, acknowledgements and the exchange of
loads. This needs root.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.moe_layer_parts import Shape, check, make_engine, one_step, route
from benchmarks.report import arguments, finish
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Topology
from hecate.parallel.units import Unit
from hecate.profile.fit import topology_from
from hecate.profile.probe import ProbeSizes
from hecate.profile.run import measure as measure_ranks
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
QUICK_POLICIES = ("static_ep", "full", "hecate_paper", "auto")
_SIZES = ProbeSizes(matmul=1024, copy_bytes=1 << 27, small_bytes=1 << 10, large_bytes=1 << 23, seconds=1.0)


def measure(*, quick: bool = False) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows and the summary of all settings. Call `missing_for_slow_link` before.

    Raises:
        AssertionError: the layer's output or a gradient is wrong, or a rank failed.
        OSError: the link cannot be created.
    """
    policies = QUICK_POLICIES if quick else tuple(POLICIES)
    rows: list[dict[str, Any]] = []
    for setting, node_of_rank in SETTINGS.items():
        with slow_link(RATE) as names:
            namespaces = [names[node] for node in node_of_rank]
            arguments_ = (node_of_rank, Shape(), policies, 2 if quick else 7)
            of_ranks = run_ranks(len(node_of_rank), bench_rank, *arguments_, timeout=900, namespaces=namespaces)
        rows += [{"setting": setting, **row} for row in of_ranks[0]]
    return rows, summarize(rows)


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return `auto`'s speed-ups, each the lowest of the settings.

    `..._cpu_and_link_...` is the ratio of `cpu_ms_min` + `link_ms`: the time if each rank had a core and the link carried nothing else.
    """
    median = {(row["setting"], row["routing"], row["policy"]): row["ms_median"] for row in rows}
    least = {(row["setting"], row["routing"], row["policy"]): row["cpu_ms_min"] + row["link_ms"] for row in rows}

    def worst(policy: str, routings: tuple[str, ...], ms: dict[tuple[str, str, str], float] = median) -> float:
        return min(ms[s, routing, policy] / ms[s, routing, "auto"] for s in SETTINGS for routing in routings)

    return {
        "slow_link_speedup_over_static_ep": worst("static_ep", ROUTINGS[:1]),
        "slow_link_speedup_over_full": worst("full", ROUTINGS),
        "slow_link_balanced_speedup_over_static_ep": worst("static_ep", ROUTINGS[1:]),
        "slow_link_speedup_over_ep_per_choice": worst(PER_CHOICE, ROUTINGS[:1]),
        "slow_link_cpu_and_link_speedup_over_static_ep": worst("static_ep", ROUTINGS[:1], least),
        "slow_link_cpu_and_link_speedup_over_full": worst("full", ROUTINGS, least),
        "slow_link_gbit_per_s": min(row["uplink_gbit_per_s"] for row in rows),
    }


def bench_rank(
    rank: int, world: int, node_of_rank: tuple[int, ...], shape: Shape, policies: tuple[str, ...], samples: int
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
        times: dict[str, list[float]] = {policy: [] for policy in engines}
        cpu: dict[str, list[float]] = {policy: [] for policy in engines}
        facts: dict[str, dict[str, Any]] = {}
        for sample in range(samples + 1):
            for policy, engine in engines.items():
                sent, across = engine.shards.bytes_sent, bytes_out()
                dist.barrier()
                start, cpu_start = time.perf_counter(), time.process_time()
                _, loads = one_step(engine, sample, x, expert, weight, per_choice=policy == PER_CHOICE)
                seconds = torch.tensor([time.perf_counter() - start, time.process_time() - cpu_start])
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                left = torch.tensor([engine.shards.bytes_sent - sent, (bytes_out() - across) * first_of_node])
                busier = left[1].clone()
                dist.all_reduce(left)
                dist.all_reduce(busier, op=dist.ReduceOp.MAX)
                if sample >= 1:
                    times[policy].append(1e3 * float(seconds[0]))
                    cpu[policy].append(1e3 * float(seconds[1]))
                facts[policy] = {
                    "link_ms": 1e3 * int(busier) / RATE_BYTES,
                    "bytes_sent": int(left[0]),
                    "bytes_across": int(left[1]),
                    "replicas": int(engine.shards.placements[Unit(0)].where_ED.sum()) - shape.experts,
                    "imbalance": engine.shards.plans.imbalance(loads),
                }
        rows += [
            {
                "routing": routing,
                "policy": policy,
                "ms_median": statistics.median(times[policy]),
                "ms_min": min(times[policy]),
                "ms_all": times[policy],
                "cpu_ms_min": min(cpu[policy]),
                **facts[policy],
                "gflops_per_rank": min(topology.flops) / 1e9,
                "uplink_gbit_per_s": min(topology.uplink_bandwidth) * 8e-9,
                "overlap_slowdown": topology.overlap_slowdown,
            }
            for policy in engines
        ]
    return rows


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
