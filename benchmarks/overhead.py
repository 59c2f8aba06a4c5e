"""Measure what Ray adds to a step: the same run of two ranks under `hecate ray` (a private cluster of this machine) and `hecate launch`.

Both runs exist at the same time. While one trains, all processes of the other are stopped,
Ray's own included. They take turns (`benchmarks.ratios`), and turns that are compared cover the same steps of both runs, so the same work.
A turn's time is the mean of its steps, so that Ray's occasional work counts. A turn takes several seconds, because work that is due every
second would otherwise be done more often than in a run that is never stopped. If losses differ, there is no result.

A second figure does not need a quiet machine: the processor time of all processes other than ranks, in cores. With `--spare-core` the
ranks share the first core and all other processes have the rest, as on a node with more cores than ranks.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.following import Job, job
from benchmarks.ratios import Budget, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from hecate.launch.run_folder import processes_below

RANKS = 2
LAUNCHERS = {"launch": ["launch", "--nproc-per-node", f"{RANKS}"], "ray": ["ray", "--address", "local"]}
COMMON = ("topology=two-cpu-ranks", f"ray.workers={RANKS}", "micro_batch_size=2")
_FIRST_STEPS = 100
"""the first steps of a run, which compile, allocate and connect, while Ray's spare worker imports"""
_FIRST_OF_TURN = 10
"""the first steps of a turn, which may have been interrupted or started in the turn before, and in which overdue work is done"""
_STEPS_OF_TURN = 60
ENOUGH = Budget(half_width=0.01, rounds=60)
_TICKS = os.sysconf("SC_CLK_TCK")


class Racer:
    """A job that trains for some steps at a time and is stopped in between."""

    def __init__(self, run: Job) -> None:
        self._run = run
        self.losses: list[tuple[int, float]] = []
        """each step's number and loss"""
        self.beside: list[float] = []
        """for each turn the cores that were busy with processes other than ranks"""

    def go(self, steps: int) -> list[float]:
        """Train for `steps` steps, stop, and return the seconds of each."""
        self.signal(signal.SIGCONT)
        records = [self._run.next_step()[1] for _ in range(min(steps, _FIRST_OF_TURN))]
        before, since = self._processor_seconds(), time.perf_counter()
        records += [self._run.next_step()[1] for _ in range(steps - len(records))]
        after, seconds = self._processor_seconds(), time.perf_counter() - since
        self.signal(signal.SIGSTOP)
        self.losses += [(record["step"], record["loss"]) for record in records]
        spent = sorted(after[pid] - before.get(pid, 0.0) for pid in after)
        self.beside.append(sum(spent[:-RANKS]) / seconds)
        return [record["step_seconds"] for record in records]

    def share_one_core(self) -> None:
        """Put the ranks on the first core that this process may use, and all others on the rest."""
        first, *rest = sorted(os.sched_getaffinity(0))
        spent = self._processor_seconds()
        ranks = sorted(spent, key=lambda pid: spent[pid])[-RANKS:]
        for pid in spent:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):  # the process has ended meanwhile
                    os.sched_setaffinity(int(thread.name), [first] if pid in ranks else rest)

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the job."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _processes(self) -> list[int]:
        return [self._run.process.pid, *processes_below(self._run.process.pid)]

    def _processor_seconds(self) -> dict[int, float]:
        """Return the processor seconds of each process. Those of the ranks are the largest by far."""
        spent = {}
        for pid in self._processes():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                spent[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
        return spent


def race(workshop: Path, budget: Budget, *, spare_core: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return for each launcher the mean seconds of a step in each of its turns, and the median cores busy with processes beside ranks."""
    with ExitStack() as stack:
        racers = {}
        for name, command in LAUNCHERS.items():
            racers[name] = Racer(stack.enter_context(job(workshop, name, command, *COMMON)))
            stack.callback(racers[name].signal, signal.SIGCONT)
            racers[name].go(_FIRST_STEPS)
            if spare_core:
                racers[name].share_one_core()

        def turn(name: str) -> float:
            return statistics.mean(racers[name].go(_FIRST_OF_TURN + _STEPS_OF_TURN)[_FIRST_OF_TURN:])

        seconds = until_narrow(turn, list(racers), [("ray", "launch")], budget)
        for (step, one), (also, other) in zip(*(racer.losses for racer in racers.values()), strict=True):
            if step != also or abs(one - other) > 1e-3:
                raise SystemExit(f"overhead: the two runs differ: loss {one} in step {step}, loss {other} in step {also}; no result")
        return seconds, {name: statistics.median(racer.beside[1:]) for name, racer in racers.items()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--spare-core", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        workshop = Path(folder)
        make_folder(workshop)
        budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
        seconds, beside = race(workshop, budget, spare_core=options.spare_core)
    rows = [
        {"launcher": name, "step_ms_median": 1e3 * statistics.median(values), "cores_beside_ranks": beside[name], "all": values}
        for name, values in seconds.items()
    ]
    ratio = of_times(seconds["ray"], seconds["launch"], budget)
    finish(
        "overhead",
        rows,
        {"ray_over_launch": ratio, **{f"{name}_cores_beside_ranks": cores for name, cores in beside.items()}},
        options.json,
    )


if __name__ == "__main__":
    main()
