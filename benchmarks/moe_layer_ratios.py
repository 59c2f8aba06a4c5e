"""What `moe_layer` compares, by kind of experts, and the ratios of what it has measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.moe_layer_parts import ROUTINGS
from benchmarks.ratios import Budget, Ratio, largest, of_times, speedup

PER_CHOICE = "ep_per_choice"
BALANCED = "static_ep, balanced"
REMATERIALIZE = "full, rematerialize"
EXACT = "auto, exact"
MEGATRON, FSDP2 = "megatron_ep", "fsdp2"
_ORDER = (PER_CHOICE, "hecate_paper", "static_ep", "auto", BALANCED, EXACT, REMATERIALIZE, "full", MEGATRON, FSDP2)
"""of a round, with what is compared side by side"""
_NAMES = {"zipf(1.2)": "zipf", "balanced": "balanced"}
"""the routings under which speed-ups are taken, by their names in the summary"""


@dataclass(frozen=True)
class Comparison:
    """One ratio of the summary."""

    key: str
    ours: str
    theirs: str
    routings: Sequence[str]
    worst_time: bool = False
    """how many times as long ours takes, under the routing where that is most; else how many times as fast ours is"""

    def ratio(self, seconds: Mapping[tuple[str, str], Sequence[float]], budget: Budget) -> Ratio:
        """
        Args:
            seconds: of the samples, by policy and routing.
        """
        take = of_times if self.worst_time else speedup
        return largest(take(seconds[self.ours, routing], seconds[self.theirs, routing], budget) for routing in self.routings)


def _speedups(ending: str, ours: str, theirs: str) -> Iterator[Comparison]:
    for routing, name in _NAMES.items():
        yield Comparison(f"{name}_{ending}", ours, theirs, (routing,))


def _over_balanced(name: str) -> Iterator[Comparison]:
    yield Comparison(f"{name}_worst_over_balanced_ep", "auto", BALANCED, ROUTINGS, worst_time=True)
    yield Comparison(f"{name}_exact_worst_over_balanced_ep", EXACT, BALANCED, ROUTINGS, worst_time=True)


COMPARISONS: Mapping[str, Sequence[Comparison]] = {
    "mixlora": (
        *_speedups("speedup_over_ep_per_choice", "hecate_paper", PER_CHOICE),
        *_speedups("speedup_over_static_ep", "hecate_paper", "static_ep"),
        *_speedups("auto_speedup_over_static_ep", "auto", "static_ep"),
        Comparison("rematerialize_slowdown", REMATERIALIZE, "full", ("zipf(1.2)",), worst_time=True),
    ),
    "full": tuple(_over_balanced("full_experts")),
    "moe_lora": tuple(_over_balanced("frozen_moe")),
    "beside_megatron": tuple(_speedups(f"speedup_over_{MEGATRON}", "auto", MEGATRON)),
    "beside_fsdp2": tuple(_speedups(f"speedup_over_{FSDP2}", "auto", FSDP2)),
}


def compared(kind: str, routing: str) -> list[tuple[str, str]]:
    """The pairs of policies that are compared under a routing."""
    return [(one.ours, one.theirs) for one in COMPARISONS[kind] if routing in one.routings]


def side_by_side(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The sides of these pairs in the order of a round."""
    return [side for side in _ORDER if any(side in pair for pair in pairs)]


def summary_of(rows: Sequence[Mapping[str, Any]], budget: Budget) -> dict[str, Ratio]:
    """The ratios of times, and under keys with `_cpu` those of processor times."""
    found: dict[str, Ratio] = {}
    for column, ending in (("ms_all", ""), ("cpu_ms_all", "_cpu")):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            samples = {(row["policy"], row["routing"]): row[column] for row in rows if row["kind"] == kind}
            found |= {f"{one.key}{ending}": one.ratio(samples, budget) for one in COMPARISONS[kind]}
    return found
