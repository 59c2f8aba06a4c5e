"""Time one MoE layer, forward and backward, on 2 gloo ranks of one thread, under every policy and under balanced and skewed routing.

There are three kinds of experts: LoRA over a dense base, full experts, and LoRA over the frozen experts of an MoE base. The layer is the
engine's, with the collectives of a real step: gather, dispatch if the placement needs it, combine, reduce. Before the experts run four
hidden x hidden projections, the GEMMs of attention (trained with full experts, otherwise frozen). As in a step, the gather starts before
them and the reduction ends after their backward pass. Policies take turns in the same processes (`benchmarks.ratios`), and a sample is the
slowest rank's time. Those that the summary compares go on until their ratios are known well enough; the others are sampled a few times,
for the table. Plans are made for this machine as measured at the start.

`static_ep` is ours: a token is sent once to each rank and computed by one base FFN on it, whatever the number of its experts there.
`ep_per_choice` is expert parallelism as in the textbook and in Megatron's dispatcher: every assignment is sent separately and computed by
a base FFN of its own. `static_ep, balanced` draws all experts with equal odds, whatever the routing of the other rows: it is the time of
a perfectly balanced layer, measured in the same minutes.

Of LoRA over a dense base, GEMMs and an exchange of rows take turns with the policies. Their rates give the ceilings that stand beside the
speed-ups: the most that moving experts can win (`benchmarks.moe_layer_ceiling`).

Two further kinds compare full experts with Megatron's MoELayer and torch's FSDP2: see `benchmarks.moe_layer_rivals`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import cpu_layer
from benchmarks.moe_layer_ceiling import Rates, ceiling
from benchmarks.moe_layer_parts import FFN_KINDS, ROUTINGS, Formula, Projections, Shape, make_engine, make_family, one_step, route
from benchmarks.moe_layer_ratios import BALANCED, EXACT, PER_CHOICE, REMATERIALIZE, compared, side_by_side, summary_of
from benchmarks.moe_layer_rivals import RIVAL_KINDS, bench_kind, rival_shape
from benchmarks.ratios import Budget
from benchmarks.report import arguments, finish
from benchmarks.slowest_rank import SlowestRank, take_turns
from hecate.engine.engine import Engine
from hecate.launch.local_launcher import RANK_SETTINGS
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import profile
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners import POLICIES
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks

WORLD = 2
GEMM, EXCHANGE = "gemm", "exchange"
"""what the rates come from: tokens x hidden times hidden x ffn on all ranks at once, and as many rows to the other rank as each has"""
ENOUGH, QUICK, TABLE = Budget(half_width=0.02, rounds=60), Budget(half_width=0.02, rounds=2), Budget(half_width=0.02, rounds=4)
"""for ratios; for `--quick`; and for policies that no ratio needs. In half of the rounds the rotating hot expert has just changed."""
NO_FACTS = {"bytes_sent": None, "imbalance": None}
"""of what is no policy of ours"""
EVERY_KIND = (*FFN_KINDS, *RIVAL_KINDS)
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
    named[EXACT] = Variant("auto", options={"plan": "exact"})
    return named


def measured_topology(rank: int, groups: ExpertGroups) -> Topology:
    """Measure this machine. All ranks return the same topology."""
    with tempfile.TemporaryDirectory() as folder:
        return profile(Ranks(rank, WORLD, torch.device("cpu"), groups), Path(folder) / "topology.yaml", PROBES)


def bench_rank(
    rank: int, world: int, shape: Shape, kinds: Sequence[str], policies: Collection[str], budget: Budget, table: Budget, quick: bool
) -> tuple[list[dict[str, Any]], Topology]:
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    topology = measured_topology(rank, groups)
    rows = []
    for kind in kinds:
        if kind in RIVAL_KINDS:
            found_rows = bench_kind(rank, kind, rival_shape(kind, quick=quick), budget, table, groups, topology)
            rows += [row(kind, **NO_FACTS, **one) for one in found_rows]
            continue
        family, named = make_family(kind, shape), variants(kind, policies)
        before = Projections(shape, trained=kind == "full")
        formula = Formula(family, rank, shape, *route(ROUTINGS[0], shape, seed=rank))
        for variant in named.values():
            engine = make_engine(variant.policy, shape, groups, topology, family, **variant.options)
            formula.check(engine, per_choice=variant.per_choice)
        del formula, engine
        for routing in ROUTINGS:
            timed = {
                name: TimedPolicy(make_engine(v.policy, shape, groups, topology, family, **v.options), v, routing, shape, rank, before)
                for name, v in named.items()
            }
            pairs = compared(kind, routing)
            rates = rate_actions(shape, world) if kind == "mixlora" and pairs else {}
            clocks = {name: SlowestRank(prepare) for name, prepare in {**timed, **rates}.items()}
            sides = [*side_by_side(pairs), *rates]
            take_turns(clocks, sides, pairs, budget)
            take_turns(clocks, [name for name in clocks if name not in sides], [], table)
            rows += [
                row(kind, name, routing, ms_all=one.ms, cpu_ms_all=one.cpu_ms, **timed[name].facts() if name in timed else NO_FACTS)
                for name, one in clocks.items()
            ]
    return rows, topology


class TimedPolicy:
    """The steps of one policy under one routing. Called with a step's number, it returns the step."""

    def __init__(self, engine: Engine, variant: Variant, routing: str, shape: Shape, rank: int, before: Projections) -> None:
        self._engine, self._variant, self._shape, self._rank, self._before = engine, variant, shape, rank, before
        self._routing = "balanced" if variant.balanced else routing
        self._x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        self._sent_before = 0
        self._loads: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Callable[[], None]:
        expert, weight = route(self._routing, self._shape, seed=self._rank, step=step)
        weight.requires_grad_()
        self._before.zero_grad(set_to_none=True)
        self._x.grad = None
        self._sent_before = self._engine.shards.bytes_sent

        def take() -> None:
            per_choice = self._variant.per_choice
            _, self._loads = one_step(self._engine, step, self._x, expert, weight, per_choice=per_choice, before=self._before)

        return take

    def facts(self) -> dict[str, Any]:
        """Of the last step, on all ranks. All must call it."""
        total = torch.tensor(self._engine.shards.bytes_sent - self._sent_before)
        dist.all_reduce(total)
        return {"bytes_sent": int(total), "imbalance": self._engine.shards.plans.imbalance(self._loads)}


def rate_actions(shape: Shape, world: int) -> dict[str, Callable[[int], Callable[[], object]]]:
    """What the rates of `measured_rates` come from."""
    x, weight = torch.randn(shape.tokens, shape.hidden), torch.randn(shape.hidden, shape.ffn)
    rows, received = torch.randn(world * shape.tokens, shape.hidden), torch.empty(world * shape.tokens, shape.hidden)
    return {GEMM: lambda _: lambda: x @ weight, EXCHANGE: lambda _: lambda: dist.all_to_all_single(received, rows)}


def measured_rates(rows: Sequence[dict[str, Any]], shape: Shape) -> Rates:
    """The medians over all samples."""
    seconds = {
        name: statistics.median(ms / 1e3 for row in rows if row["policy"] == name for ms in row["ms_all"]) for name in (GEMM, EXCHANGE)
    }
    matmul, sent = 2.0 * shape.tokens * shape.hidden * shape.ffn, 4.0 * shape.tokens * shape.hidden
    return Rates(matmul / seconds[GEMM], sent / seconds[EXCHANGE])


def ceilings(rows: Sequence[dict[str, Any]], shape: Shape) -> dict[str, float]:
    """The rates, and what stands beside the speed-ups of LoRA over a dense base."""
    if not any(row["policy"] == GEMM for row in rows):
        return {}
    rates, cost = measured_rates(rows, shape), make_family("mixlora", shape).cost(shape.top_k, shape.attention_flops)
    found = {"gemm_gflop_per_s": rates.flops / 1e9, "exchange_gb_per_s": rates.bytes_per_s / 1e9}
    for name, routing in (("zipf", "zipf(1.2)"), ("balanced", "balanced")):
        routed = [route(routing, shape, seed=rank)[0].numpy() for rank in range(WORLD)]
        for rival, per_choice in (("static_ep", False), (PER_CHOICE, True)):
            found[f"{name}_speedup_over_{rival}_ceiling"] = ceiling(routed, shape.experts, cost, rates, per_choice=per_choice)
    return found


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
        budget = QUICK if options.quick else ENOUGH
        found = cpu_layer.rows(budget)
        finish("moe_layer", found, cpu_layer.summary_of(found, budget), options.json)
        return
    os.environ.update(RANK_SETTINGS)  # for the ranks, as hecate's launcher sets them
    shape, budget, table = (Shape(hidden=256, ffn=704, tokens=512), QUICK, QUICK) if options.quick else (Shape(), ENOUGH, TABLE)
    kinds = options.kind or EVERY_KIND
    rows, topology = run_ranks(WORLD, bench_rank, shape, kinds, list(POLICIES), budget, table, options.quick, timeout=7200)[0]
    link = topology.intra_node
    print(f"measured: {topology.flops[0]:.3g} FLOP/s, {link.bandwidth:.3g} B/s, {link.latency:.3g} s, slowdown {topology.overlap_slowdown}")
    finish("moe_layer", rows, {**summary_of(rows, budget), **ceilings(rows, shape)}, options.json)


def _start_again_as_ranks_are_started() -> None:
    """Replace this process by a new one, because allocator settings are read when a process starts."""
    if not RANK_SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.moe_layer", *sys.argv[1:]], {**os.environ, **RANK_SETTINGS})


if __name__ == "__main__":
    main()
