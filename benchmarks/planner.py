"""Time the planning of every policy, per layer, on one core, at four sizes, with Zipf(1.2) loads and LoRA over a frozen MoE base.

A row has the median and the `spread` of the samples. `auto, after the router` is one layer's plan from its true loads, while ranks wait:
a plan of its own, and a new split of what is there. The process has the settings of a rank (`RANK_SETTINGS`): fresh memory would take a
fifth of the time at the largest size.

Then time the choice of a route for one layer's experts (`fastest_route`), for placements of few and of many copies.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import arguments, finish, spread
from hecate.launch.local_launcher import RANK_SETTINGS
from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.cost.cost_loops import SERVED
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost
from hecate.parallel.loops import jit
from hecate.parallel.plan.after_router import best_after_router, one_layer
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.transfer.transfer_plan import fastest_route
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement, contiguous_owners

SIZES = ((8, 4, 16), (64, 32, 16), (256, 320, 2), (256, 1024, 1))
"""the experts, the ranks, and the layers that are planned together"""
ROUTED = (256, 64)
"""the experts and the ranks, eight a node, of the placements whose routes are chosen"""
DENSITIES = (0.02, 0.1, 0.3, 1.0)
"""the shares of ranks that have a copy of an expert of another rank"""


def plan_input(experts: int, world: int, layers: int) -> PlanInput:
    rng = np.random.default_rng(0)
    odds = np.arange(1, experts + 1) ** -1.2
    loads = np.stack([rng.multinomial(8192, rng.permutation(odds) / odds.sum(), size=world).T for _ in range(layers)]).astype(float)
    topology = uniform_topology(
        max(world // 8, 1), min(world, 8), flops=6e14, memory=8e10, intra_node=Link(3e11, 1e-5), inter_node=Link(5e10, 2e-5)
    )
    hidden, ffn, rank = 2048, 768, 16
    cost = LayerCost(
        trainable_bytes=6.0 * rank * (hidden + ffn),
        frozen_bytes=6.0 * hidden * ffn,
        top_k=min(8, experts // 4),
        row_bytes=2.0 * hidden,
        assignment_flops=6.0 * hidden * ffn,
        assignment_backward=1.1,
        non_moe_flops=8.0 * hidden**2 * 8192,
    )
    owners = np.stack([contiguous_owners(experts, world)] * layers)
    return PlanInput(owners, loads, topology, cost, np.full(world, 8))


def route_rows(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each density: the milliseconds that choosing the route of one placement takes."""
    experts, world = ROUTED
    given = plan_input(experts, world, 1)
    owner_E = given.owner_LE[0]
    numel = int(given.cost.trainable_bytes) // 2
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for density in DENSITIES:
        where_ED = (rng.random((experts, world)) < density) | given.owned_LED[0]
        placement = Placement(owner_E.copy(), where_ED)
        with jit.compiling_in_this_process():
            route = fastest_route(placement, ChunkSize(numel, 2), given.topology)
        times: list[float] = []
        for _ in range(20 if quick else 500):
            start = time.perf_counter()
            fastest_route(placement, ChunkSize(numel, 2), given.topology)
            times.append(1e3 * (time.perf_counter() - start))
        name = f"choose_route ({route}, {density:.0%})"
        rows.append(
            {"experts": experts, "ranks": world, "policy": name, "ms_per_layer": statistics.median(times), "ms_spread": spread(times)}
        )
    return rows


def after_router_ms(given: PlanInput, *, quick: bool) -> list[float]:
    """Milliseconds of planning one layer anew from its true loads, which differ from those of the plan that is there."""
    present = [plan_auto(given).layer(given, 0)]
    true_LED = np.random.default_rng(1).permuted(given.expected_LED[:1], axis=1)
    known = one_layer(replace(given, execution=ExecutionMode(plan="calibrated")), 0, true_LED[0])
    times: list[float] = []
    with jit.compiling_in_this_process():
        best_after_router(plan_auto, known, present, splits=True)
    while len(times) < (1 if quick else 5) or (sum(times) < 2000 and len(times) < 50 and not quick):
        start = time.perf_counter()
        best_after_router(plan_auto, known, present, splits=True)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rows: list[dict[str, Any]] = []
    for experts, world, layers in SIZES:
        given = plan_input(experts, world, layers)
        for policy, planner in POLICIES.items():
            with jit.compiling_in_this_process():  # before the clock starts
                plan = planner(given)
            served_LD = plan.traffic(given.expected_LED, given.expected_LED, given.topology)[:, SERVED]
            assert np.allclose(served_LD.sum(-1), given.expected_LED.sum((1, 2))), policy
            times: list[float] = []
            while len(times) < (1 if options.quick else 5) or (sum(times) < 2 and len(times) < 50 and not options.quick):
                start = time.perf_counter()
                planner(given)
                times.append(time.perf_counter() - start)
                if times[0] > 10:
                    break
            per_layer = [1e3 * seconds / layers for seconds in times]
            rows.append(
                {
                    "experts": experts,
                    "ranks": world,
                    "policy": policy,
                    "ms_per_layer": statistics.median(per_layer),
                    "ms_spread": spread(per_layer),
                }
            )
        times = after_router_ms(given, quick=options.quick)
        rows.append(
            {
                "experts": experts,
                "ranks": world,
                "policy": "auto, after the router",
                "ms_per_layer": statistics.median(times),
                "ms_spread": spread(times),
            }
        )
    find = {(row["experts"], row["ranks"], row["policy"]): row["ms_per_layer"] for row in rows}
    summary = {f"auto_ms_e{e}_d{d}": find[e, d, "auto"] for e, d, _ in SIZES}
    summary |= {f"auto_after_router_ms_e{e}_d{d}": find[e, d, "auto, after the router"] for e, d, _ in SIZES}
    routed = route_rows(quick=options.quick)
    summary["choose_route_ms_e256_d64_worst"] = max(row["ms_per_layer"] for row in routed)
    finish("planner", rows + routed, summary, options.json)


if __name__ == "__main__":
    if not RANK_SETTINGS.items() <= os.environ.items():  # the C library reads them when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.planner", *sys.argv[1:]], {**os.environ, **RANK_SETTINGS})
    main()
