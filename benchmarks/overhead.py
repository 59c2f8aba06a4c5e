"""What Ray costs a step: one run of two ranks under `hecate ray` (a private cluster of this machine) and the same under `hecate launch`
(torch's elastic agent), alive together, and in turn stopped.

While one trains, all processes of the other are stopped, Ray's own with it. They take turns in the order ABBA; a pair of turns covers
the same steps of both, so the same work. A turn's time is the mean of its steps, so that what Ray does only now and then counts; the figure
is the median over the pairs. It wants a quiet machine: the controller may take a worker that stood still for ten seconds for hung and go on
without it. Where losses differ there are no figures.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.following import Job, job
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from hecate.launch.run_folder import processes_below

LAUNCHERS = {"torchrun": ["launch", "--nproc-per-node", "2"], "ray": ["ray", "--address", "local"]}
COMMON = ("topology=two-cpu-ranks", "ray.workers=2", "micro_batch_size=2")
_FIRST_STEPS = 10
"""of a run: they compile, allocate, connect"""
_FIRST_OF_TURN = 3
"""that may have been stopped in their middle, or begun in the turn before"""
_STEPS_OF_TURN = 10


class Racer:
    """A job that trains and stands still as it is told."""

    def __init__(self, run: Job) -> None:
        self._run = run
        self.losses: list[tuple[int, float]] = []
        """with the number of the step"""

    def go(self, steps: int) -> list[float]:
        """Train so many steps and stop; the seconds of each."""
        self.signal(signal.SIGCONT)
        records = [self._run.next_step()[1] for _ in range(steps)]
        self.signal(signal.SIGSTOP)
        self.losses += [(record["step"], record["loss"]) for record in records]
        return [record["step_seconds"] for record in records]

    def signal(self, number: int) -> None:
        """To all of its processes."""
        for pid in [self._run.process.pid, *processes_below(self._run.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def race(workshop: Path, pairs: int) -> dict[str, list[float]]:
    """Launcher -> the mean seconds of a step in each of its turns."""
    seconds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    with ExitStack() as stack:
        racers = {}
        for name, command in LAUNCHERS.items():
            racers[name] = Racer(stack.enter_context(job(workshop, name, command, *COMMON)))
            stack.callback(racers[name].signal, signal.SIGCONT)
            racers[name].go(_FIRST_STEPS)
        for pair in range(pairs):
            for name in list(racers)[:: -1 if pair % 2 else 1]:
                steps = racers[name].go(_FIRST_OF_TURN + _STEPS_OF_TURN)
                seconds[name].append(statistics.mean(steps[_FIRST_OF_TURN:]))
        for (step, one), (also, other) in zip(*(racer.losses for racer in racers.values()), strict=True):
            if step != also or abs(one - other) > 1e-3:
                raise SystemExit(f"overhead: not the same training, step {step}: {one}, step {also}: {other}; no figures")
    return seconds


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        workshop = Path(folder)
        make_folder(workshop)
        seconds = race(workshop, 4 if options.quick else 40)
    rows = [{"launcher": name, "step_ms_median": 1e3 * statistics.median(values), "all": values} for name, values in seconds.items()]
    ratios = sorted(ray / torchrun for torchrun, ray in zip(seconds["torchrun"], seconds["ray"], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5  # of the median, as of a normal distribution
    print(f"{len(ratios)} pairs of turns of {_STEPS_OF_TURN} steps; half of their ratios within {low:.3f} .. {high:.3f}; +- {error:.3f}")
    finish(
        "overhead", rows, {"ray_over_torchrun": middle, "standard_error": error, "quartile_low": low, "quartile_high": high}, options.json
    )


if __name__ == "__main__":
    main()
