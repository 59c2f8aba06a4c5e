"""How much of a job's time trains, if a rank fails every ten minutes: a discrete-event simulation of three ways to go on.

    python -m benchmarks.effective_time [--quick] [--costs FAULTS.json] [--json FILE]

- copies: hecate with `fssdp.redundancy: 1`. The others do the step under way again, and go on; a replacement joins when it has loaded.
- checkpoint: hecate without it, which saves beside the steps. The others go back to the last checkpoint, and go on.
- restart: saves at once, at Daly's interval. All processes end, wait for the replacement, start, and load the last checkpoint.

The share is of work: the time that the steps which count would have taken on all ranks without any of this, over the time of the clock. So
what second copies and saves add to each step counts as lost, and so do steps that are slower because a rank is missing: a micro-step has a
number of sequences that does not change, and the busiest rank takes the rest. The column `trains` is the share of time in which steps that
count are computed, however fast, which is what is published as effective training time ratio (MoEvement, arXiv:2412.15411: 0.94 at one
failure every ten minutes).

What this machine can tell is read from the file that `benchmarks.faults` has written: what second copies and saves add to a step, how
long it takes to notice a loss and to go on. What it cannot tell is assumed (`Assumptions`). Nobody has measured how going on becomes slower
with more ranks than four; so there is a row in which it grows with the logarithm of the ranks, and one in which it grows with their number.
Failures come at random (exponentially), and strike any rank alike, also while others go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simpy

from benchmarks.report import arguments, finish

BETWEEN_FAILURES = 600.0
"""seconds, the mean for the whole job"""
RANKS = (8, 64, 256, 1024)
ARRIVALS = (0.0, 60.0, 300.0)
"""seconds until a replacement is there; 0: it stands by, and has loaded"""
WAYS = ("copies", "checkpoint", "restart")
GROWTHS = ("log", "linear")
GOAL, PUBLISHED = 0.99, 0.94
RECORDED = Path(__file__).parent / "results" / "faults.json"
_MEASURED_RANKS = 4

Wait = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Costs:
    """What `benchmarks.faults` has measured."""

    redundancy_of_a_step: float
    save_beside_of_a_step: float
    noticed_s: float
    """from the kill until all others have noticed it"""
    recovered_s: float
    """from the kill until the others go on, with the step from its beginning"""

    @staticmethod
    def read(path: Path) -> Costs:
        """Those of a file of `benchmarks.faults`."""
        found = json.loads(path.read_text(encoding="utf-8"))["summary"]
        return Costs(*(found[name] for name in Costs.__dataclass_fields__))


@dataclass(frozen=True)
class Assumptions:
    """What cannot be measured on one machine without a GPU. The model is Mixtral 8x7B with rank 16 on all experts."""

    step_s: float = 5.0
    state_bytes: float = 2.7e9
    """what is trained, with moments"""
    base_bytes: float = 93e9
    """in bfloat16; each rank that starts reads all of it"""
    read_bytes_per_s: float = 5e9
    """of a rank, from storage"""
    write_bytes_per_s: float = 0.5e9
    """of a rank, to storage, with fsync"""
    commit_s: float = 0.1
    start_s: float = 30.0
    """for a process to start, to import and to meet the others"""
    sequences: int = 6
    """of a rank in a micro-step"""

    @property
    def load_s(self) -> float:
        """From the arrival of a replacement until it may join, and from the start of all processes until they train."""
        return self.start_s + self.base_bytes / self.read_bytes_per_s


@dataclass(frozen=True)
class Case:
    """One job."""

    way: str
    ranks: int
    arrival_s: float
    growth: str
    """of going on after a loss: "log" or "linear" in the number of ranks"""
    costs: Costs
    assumed: Assumptions = Assumptions()
    interval: int | None = None
    """steps between saves; None: Daly's best for restart and checkpoint, five minutes' worth for copies"""

    @property
    def go_on_s(self) -> float:
        times = self.ranks / _MEASURED_RANKS
        return self.costs.recovered_s * (times if self.growth == "linear" else 1 + max(0.0, math.log2(times)))

    @property
    def restart_s(self) -> float:
        """From a failure until all processes train again."""
        return self.costs.noticed_s + self.arrival_s + self.assumed.load_s + self.read_s

    @property
    def read_s(self) -> float:
        """To read the last checkpoint."""
        return self.assumed.state_bytes / self.ranks / self.assumed.read_bytes_per_s

    @property
    def save_s(self) -> float:
        """That steps stand still, or are longer, because of a save."""
        if self.way == "restart":
            return self.written_s
        return self.costs.save_beside_of_a_step * self.assumed.step_s

    @property
    def written_s(self) -> float:
        """From the beginning of a save until it counts."""
        return self.assumed.commit_s + self.assumed.state_bytes / self.ranks / self.assumed.write_bytes_per_s

    @property
    def steps_between_saves(self) -> int:
        if self.interval is not None:
            return self.interval
        if self.way == "copies":
            return max(1, round(300 / self.assumed.step_s))
        best = daly_interval(self.save_s, BETWEEN_FAILURES)
        return max(1, round(best / self.assumed.step_s))

    def step_s(self, missing: int) -> float:
        """A step while so many ranks are missing."""
        own = self.assumed.sequences
        slower = math.ceil(self.ranks * own / max(1, self.ranks - missing)) / own
        added = self.costs.redundancy_of_a_step if self.way == "copies" else 0.0
        return self.assumed.step_s * slower * (1 + added)


@dataclass
class Found:
    """What became of a job."""

    steps: int = 0
    """that count"""
    training_s: float = 0.0
    """of these"""
    lost: int = 0
    """steps that were done and had to be done again; the one under way at a failure does not count"""
    failures: int = 0
    went_back: int = 0
    """times that a way with copies had to go back to a checkpoint"""
    seconds: float = 0.0

    def work(self, case: Case) -> float:
        return self.steps * case.assumed.step_s / self.seconds

    @property
    def trains(self) -> float:
        return self.training_s / self.seconds


class _Job:
    """One job under simulation."""

    def __init__(self, case: Case, failures: int, seed: int) -> None:
        self.env = simpy.Environment()
        self.case, self.found = case, Found()
        self._random = np.random.default_rng(seed)
        self._most = failures
        self._missing, self._ready = 0, 0
        """ranks that are missing, and replacements that may join"""
        self._since_save: list[float] = []
        """seconds of each step that the last checkpoint which counts lacks"""
        self._trains = self.env.process(self._train())
        self.env.process(self._fail())
        self.env.run(self._trains)
        self.found.seconds = self.env.now

    def _fail(self) -> Wait:
        while self._trains.is_alive:
            yield self.env.timeout(self._random.exponential(BETWEEN_FAILURES))
            if self._trains.is_alive:
                self._trains.interrupt()

    def _train(self) -> Wait:
        while self.found.failures < self._most:
            try:
                yield from self._step()
            except simpy.Interrupt:
                yield from self._go_on()

    def _step(self) -> Wait:
        case, found = self.case, self.found
        if self._ready and self._missing:
            yield self.env.timeout(case.go_on_s)  # all regroup with those that have loaded
            self._missing, self._ready = max(0, self._missing - self._ready), 0
        took = case.step_s(self._missing)
        yield self.env.timeout(took)
        found.steps, found.training_s = found.steps + 1, found.training_s + took
        self._since_save.append(took)
        if found.steps % case.steps_between_saves == 0:
            saved = len(self._since_save)
            yield self.env.timeout(case.save_s)
            if case.way == "restart":
                self._since_save = []
            else:
                self.env.process(self._written(saved, found.failures))

    def _written(self, steps: int, failures: int) -> Wait:
        """A save beside the steps counts once it is written; a rank that is lost meanwhile ends it."""
        yield self.env.timeout(self.case.written_s)
        if self.found.failures == failures:
            del self._since_save[:steps]

    def _go_on(self) -> Wait:
        """Go on after a failure, and after those that come meanwhile."""
        case, found, lost = self.case, self.found, case_loses(self.case)
        while True:
            found.failures += 1
            if case.way != "restart":
                self._missing += 1
                self.env.process(self._replace())
            if lost:
                found.went_back += case.way == "copies"
                self._go_back()
            try:
                seconds = case.restart_s if case.way == "restart" else case.go_on_s + (case.read_s if lost else 0.0)
                yield self.env.timeout(seconds)
            except simpy.Interrupt:
                # Two of the ranks that are left have, or are the backup of, what the rank that was just lost had alone.
                lost = lost or self._random.random() < 2 / max(2, case.ranks - self._missing)
            else:
                return

    def _go_back(self) -> None:
        self.found.steps -= len(self._since_save)
        self.found.lost += len(self._since_save)
        self.found.training_s -= sum(self._since_save)
        self._since_save = []

    def _replace(self) -> Wait:
        loads = self.case.assumed.load_s if self.case.arrival_s else 0.0
        yield self.env.timeout(self.case.arrival_s + loads)
        self._ready += 1


def case_loses(case: Case) -> bool:
    """Whether one failure takes the job back to its last checkpoint."""
    return case.way != "copies"


def simulated(case: Case, failures: int, seed: int = 0) -> Found:
    """A job until so many failures have struck."""
    return _Job(case, failures, seed).found


def daly_interval(save_s: float, between_failures_s: float) -> float:
    """The seconds of work between saves with which a job that restarts is done first (J. T. Daly, Future Generation Computer Systems 22,
    2006, equation 37), of which Young's sqrt(2 * save * between failures) is the first term."""
    if save_s >= 2 * between_failures_s:
        return between_failures_s
    part = save_s / (2 * between_failures_s)
    return math.sqrt(2 * save_s * between_failures_s) * (1 + math.sqrt(part) / 3 + part / 9) - save_s


def daly_share(work_s: float, save_s: float, restart_s: float, between_failures_s: float) -> float:
    """The share of work of a job that saves after every `work_s`, and after each failure takes `restart_s` to begin again at the last save;
    failures come exponentially, in saves and restarts too (Daly 2006, equation 20)."""
    mean = between_failures_s
    return work_s / (mean * math.exp(restart_s / mean) * math.expm1((work_s + save_s) / mean))


def cases(costs: Costs, *, quick: bool) -> Iterator[Case]:
    for ranks in RANKS[::3] if quick else RANKS:
        for arrival in ARRIVALS:
            for way in WAYS:
                for growth in GROWTHS if way != "restart" else GROWTHS[:1]:
                    yield Case(way, ranks, arrival, growth, costs)


def row_of(case: Case, failures: int, seeds: int) -> dict[str, Any]:
    found = [simulated(case, failures, seed) for seed in range(seeds)]
    works = [one.work(case) for one in found]
    return {
        "way": case.way,
        "ranks": case.ranks,
        "arrival_s": case.arrival_s,
        "growth": case.growth if case.way != "restart" else "-",
        "work": median(works),
        "least": min(works),
        "most": max(works),
        "trains": median(one.trains for one in found),
        "lost_steps_per_failure": sum(one.lost for one in found) / sum(one.failures for one in found),
        "went_back": sum(one.went_back for one in found),
        "goal": "met" if median(works) >= GOAL else "missed",
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--costs", type=Path, default=RECORDED, help="a file of benchmarks.faults")
    options = parser.parse_args()
    costs = Costs.read(options.costs)
    failures, seeds = (100, 2) if options.quick else (500, 5)
    rows = [row_of(case, failures, seeds) for case in cases(costs, quick=options.quick)]
    standing_by = [row for row in rows if row["arrival_s"] == 0]
    summary = {
        **{f"assumed_{name}": float(value) for name, value in asdict(Assumptions()).items()},
        **{f"measured_{name}": value for name, value in asdict(costs).items()},
        **{f"{way}_standing_by_least": min(row["work"] for row in standing_by if row["way"] == way) for way in WAYS},
        **{f"{way}_standing_by_most": max(row["work"] for row in standing_by if row["way"] == way) for way in WAYS},
        "goal": GOAL,
        "published": PUBLISHED,
    }
    finish("effective_time", rows, summary, options.json)


if __name__ == "__main__":
    main()
