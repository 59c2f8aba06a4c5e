"""Time one MoE layer, forward and backward, on 2 gloo ranks of one thread, under every policy and under balanced and skewed routing.

There are three kinds of experts: LoRA over a dense base, full experts, and LoRA over the frozen experts of an MoE base. The layer is the
engine's, with the collectives of a real step: gather, dispatch if the placement needs it, combine, reduce. Before the experts run four
hidden x hidden projections, the GEMMs of attention (trained with full experts, otherwise frozen). As in a step, the gather starts before
them and the reduction ends after their backward pass. All policies alternate in the same processes, and a sample is the slowest rank's
time. Plans are made for this machine as measured at the start.

`static_ep` is ours: a token is sent once to each rank and computed by one base FFN on it, whatever the number of its experts there.
`ep_per_choice` is expert parallelism as in the textbook and in Megatron's dispatcher: every assignment is sent separately and computed by
a base FFN of its own. `static_ep, balanced` draws all experts with equal odds, whatever the routing of the other rows: it is the time of
a perfectly balanced layer, measured in the same minutes.

Two further kinds compare full experts with Megatron's MoELayer and torch's FSDP2: see `benchmarks.moe_layer_rivals`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import cpu_layer
from benchmarks.moe_layer_parts import FFN_KINDS, ROUTINGS, Formula, Projections, Shape, make_engine, make_family, one_step, route
from benchmarks.moe_layer_rivals import RIVAL_KINDS, bench_kind, rival_ratios, rival_shape
from benchmarks.report import arguments, finish
from hecate.launch.local_launcher import ALLOCATOR_SETTINGS
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Topology
from hecate.profile.probe import ProbeSizes
from hecate.profile.run import profile
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks

WORLD = 2
PER_CHOICE = "ep_per_choice"
BALANCED = "static_ep, balanced"
REMATERIALIZE = "full, rematerialize"
EVERY_KIND = (*FFN_KINDS, *RIVAL_KINDS)
WARM_UP = 1
"""the number of steps before the first sample: the one without history"""
PROBES = ProbeSizes(matmul=1024, copy_bytes=1 << 26, small_bytes=1 << 10, large_bytes=1 << 24, seconds=0.5)


@dataclass(frozen=True)
class Variant:
    """A policy and the options that it is run with."""

    policy: str
    per_choice: bool = False
    balanced: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def variants(kind: str, policies: Collection[str]) -> dict[str, Variant]:
    named = {policy: Variant(policy) for policy in policies}
    named[BALANCED] = Variant("static_ep", balanced=True)
    if kind == "mixlora":
        named[PER_CHOICE] = Variant("static_ep", per_choice=True)
        named[REMATERIALIZE] = Variant("full", options={"rematerialize": True})
    named["auto, exact"] = Variant("auto", options={"plan": "exact"})
    return named


def measured_topology(rank: int, groups: ExpertGroups) -> Topology:
    """Measure this machine. All ranks return the same topology."""
    with tempfile.TemporaryDirectory() as folder:
        return profile(Ranks(rank, WORLD, torch.device("cpu"), groups), Path(folder) / "topology.yaml", PROBES)


def bench_rank(
    rank: int, world: int, shape: Shape, kinds: Sequence[str], policies: Collection[str], samples: int, quick: bool
) -> tuple[list[dict[str, Any]], Topology]:
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    topology = measured_topology(rank, groups)
    rows = []
    for kind in kinds:
        if kind in RIVAL_KINDS:
            found_rows = bench_kind(rank, kind, rival_shape(kind, quick=quick), samples, groups, topology)
            rows += [row(kind, bytes_sent=None, imbalance=None, **one) for one in found_rows]
            continue
        family, named = make_family(kind, shape), variants(kind, policies)
        before = Projections(shape, trained=kind == "full")
        formula = Formula(family, rank, shape, *route(ROUTINGS[0], shape, seed=rank))
        for variant in named.values():
            engine = make_engine(variant.policy, shape, groups, topology, family, **variant.options)
            formula.check(engine, per_choice=variant.per_choice)
        del formula, engine
        for routing in ROUTINGS:
            found: dict[str, dict[str, Any]] = {name: {"ms_all": [], "cpu_ms_all": []} for name in named}
            engines = {name: make_engine(v.policy, shape, groups, topology, family, **v.options) for name, v in named.items()}
            x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
            for step in range(WARM_UP + samples):
                for name, engine in engines.items():
                    expert, weight = route("balanced" if named[name].balanced else routing, shape, seed=rank, step=step)
                    sent = engine.shards.bytes_sent
                    dist.barrier()
                    start, cpu_start = time.perf_counter(), time.process_time()
                    _, loads = one_step(engine, step, x, expert, weight.requires_grad_(), per_choice=named[name].per_choice, before=before)
                    ms = 1e3 * torch.tensor([time.perf_counter() - start, time.process_time() - cpu_start])
                    dist.all_reduce(ms, op=dist.ReduceOp.MAX)
                    before.zero_grad(set_to_none=True)
                    x.grad = None
                    total = torch.tensor(engine.shards.bytes_sent - sent)
                    dist.all_reduce(total)
                    if step >= WARM_UP:
                        found[name]["ms_all"].append(ms[0].item())
                        found[name]["cpu_ms_all"].append(ms[1].item())
                    found[name].update(bytes_sent=int(total), imbalance=engine.shards.plans.imbalance(loads))
            rows += [row(kind, name, routing, **result) for name, result in found.items()]
    return rows, topology


def row(
    kind: str, policy: str, routing: str, *, ms_all: list[float], cpu_ms_all: list[float], bytes_sent: int | None, imbalance: float | None
) -> dict[str, Any]:
    """Return a row of results.

    `cpu_ms` is the busier rank's processor time, which says more than the clock on a crowded machine. Bytes and imbalance are those of the
    last step, and None for rivals.
    """
    return {
        "kind": kind,
        "policy": policy,
        "routing": routing,
        "ms_median": statistics.median(ms_all),
        "ms_min": min(ms_all),
        "cpu_ms_median": statistics.median(cpu_ms_all),
        "ms_all": ms_all,
        "cpu_ms_all": cpu_ms_all,
        "bytes_sent": bytes_sent,
        "imbalance": imbalance,
    }


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the ratios of times, and under keys with `_cpu` those of processor times."""
    by_cpu = {f"{key}_cpu": value for key, value in _ratios(rows, "cpu_ms_median").items()}
    return {**_ratios(rows, "ms_median"), **by_cpu}


def _ratios(rows: Sequence[dict[str, Any]], column: str) -> dict[str, float]:
    median = {(row["kind"], row["policy"], row["routing"]): row[column] for row in rows}
    kinds = {row["kind"] for row in rows}
    summary = {}
    if "mixlora" in kinds:
        dense = {key[1:]: value for key, value in median.items() if key[0] == "mixlora"}
        for routing, name in (("zipf(1.2)", "zipf"), ("balanced", "balanced")):
            summary[f"{name}_speedup_over_static_ep"] = dense["static_ep", routing] / dense["hecate_paper", routing]
            summary[f"{name}_auto_speedup_over_static_ep"] = dense["static_ep", routing] / dense["auto", routing]
            summary[f"{name}_speedup_over_ep_per_choice"] = dense[PER_CHOICE, routing] / dense["hecate_paper", routing]
        if (REMATERIALIZE, "zipf(1.2)") in dense:
            summary["rematerialize_slowdown"] = dense[REMATERIALIZE, "zipf(1.2)"] / dense["full", "zipf(1.2)"]
    summary |= rival_ratios(median, sorted(kinds))
    for kind, name in (("full", "full_experts"), ("moe_lora", "frozen_moe")):
        for policy in ("auto", "auto, exact"):
            over = [median[kind, policy, r] / median[kind, BALANCED, r] for r in ROUTINGS if (kind, policy, r) in median]
            if over:
                summary[f"{name}_{'exact_' if 'exact' in policy else ''}worst_over_balanced_ep"] = max(over)
    return summary


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--kind", choices=(*FFN_KINDS, *RIVAL_KINDS), action="append", help="only this kind of experts; may be given more than once"
    )
    parser.add_argument("--kernels", action="store_true", help="instead: one MixLoRA layer on one core, ours beside the naive loop")
    options = parser.parse_args()
    if options.kernels:
        _start_again_as_ranks_are_started()
        torch.set_num_threads(1)
        found = cpu_layer.rows(samples=3 if options.quick else 15)
        finish("moe_layer", found, cpu_layer.summary_of(found), options.json)
        return
    os.environ.update(ALLOCATOR_SETTINGS)  # for the ranks, as hecate's launcher sets them
    # In two of three samples the rotating hot expert has just changed.
    shape, samples = (Shape(hidden=256, ffn=704, tokens=512), 2) if options.quick else (Shape(), 3)
    kinds = options.kind or EVERY_KIND
    rows, topology = run_ranks(WORLD, bench_rank, shape, kinds, list(POLICIES), samples, options.quick, timeout=1800)[0]
    link = topology.intra_node
    print(f"measured: {topology.flops[0]:.3g} FLOP/s, {link.bandwidth:.3g} B/s, {link.latency:.3g} s, slowdown {topology.overlap_slowdown}")
    finish("moe_layer", rows, summary_of(rows), options.json)


def _start_again_as_ranks_are_started() -> None:
    """Replace this process by a new one, because allocator settings are read when a process starts."""
    if not ALLOCATOR_SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.moe_layer", *sys.argv[1:]], {**os.environ, **ALLOCATOR_SETTINGS})


if __name__ == "__main__":
    main()
