"""How much longer steps may take than predicted at a topology's rates, and what says so: the range in which times are printed.

Predictions count matmuls at the rate that a large one sustains. Steps of real trainings are slower, by how much is not known before one has
run: on GPUs it is taken from published trainings (`hecate.parallel.cluster.published_runs`), on CPUs from this project's own recordings.
"""

from __future__ import annotations

from dataclasses import dataclass

from hecate.parallel.cluster.published_runs import RUNS
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_cards import CARDS, SUSTAINED_FLOPS

GPU_FLOPS = 1e13
"""the speed from which on a device counts as a GPU, and computes in bfloat16"""
_MEASURED_CPU = (0.91, 1.19)
"""the least and the most that a step took over its prediction after `hecate profile`: `benchmarks/results/fidelity.json`"""
_GUESSED_CPU = (1.1, 2.2)
"""the rate that a CPU is taken for, over those of two-cpu-ranks and four-cpu-ranks in configs/topologies"""


@dataclass(frozen=True)
class StepSpread:
    """The range of a step's time over its prediction at the topology's rates."""

    least: float
    most: float
    source: str
    """a line without a full stop"""
    calibrated: bool
    """whether `hecate profile` has measured the rates"""

    def text(self, value: float) -> str:
        """A value that grows with the time, as a range: 1.3-3.92."""
        return f"{short(value * self.least)}-{short(value * self.most)}"

    def inverse_text(self, value: float) -> str:
        """A value that shrinks with the time, as a range."""
        return f"{short(value / self.most)}-{short(value / self.least)}"

    @property
    def note(self) -> str:
        """What a reader of a range must know of it."""
        unsure = "" if self.calibrated else "uncalibrated: `hecate profile` has not run on these devices; "
        return f"times are {self.least:.2f} to {self.most:.2f} times those at the topology's rates; {unsure}{self.source}"


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def step_spread(topology: Topology) -> StepSpread:
    """Return the range of a step's time. A step waits for its slowest rank, so ranks' largest factors count."""
    if topology.measured and max(topology.flops) < GPU_FLOPS:
        least, most = _MEASURED_CPU
        return StepSpread(least, most, "72 steps of hecate beside their predictions (benchmarks/results/fidelity.json)", True)
    if max(topology.flops) < GPU_FLOPS:
        least, most = _GUESSED_CPU
        return StepSpread(least, most, "CPUs that were profiled did 23 and 44 GFLOP/s where 50 are taken", topology.measured)
    cards = topology.card or ("",) * topology.world_size
    ranges = {(card, rate): _slowdowns(card, rate) for card, rate in zip(cards, topology.flops, strict=True)}
    texts = [_published(card) for card in dict.fromkeys(cards)]
    return StepSpread(
        max(min(one) for one in ranges.values()), max(max(one) for one in ranges.values()), "; ".join(texts), topology.measured
    )


def _slowdowns(card: str, rate: float) -> list[float]:
    """By which factor each published training is slower than a rate; of cards without trainings, than those of all others."""
    if card in RUNS:
        return [rate / run.flops for run in RUNS[card]]
    return [SUSTAINED_FLOPS * CARDS[name].bf16_flops / run.flops for name, runs in RUNS.items() if name in CARDS for run in runs]


def _published(card: str) -> str:
    if card not in RUNS:
        return f"no training is known here of {card or 'devices without a name'}: as far below a matmul's rate as on all other cards"
    rates = [run.flops / 1e12 for run in RUNS[card]]
    dense = "" if any(run.has_experts for run in RUNS[card]) else " (of dense models)"
    return f"{len(rates)} published trainings{dense} with other trainers on {card} reached {min(rates):.0f} to {max(rates):.0f} TFLOP/s"
