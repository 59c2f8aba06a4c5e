"""Kill processes of tiny runs at a thousand seeded points, and compare each run with the undisturbed one, bit for bit.

    python -m benchmarks.kill_points [--quick] [--resume] [--most N] [--json FILE]

A point is a rank that SIGKILL ends at a place in a step or at an operation on a file of a checkpoint (`kill_plans`). A run of four ranks
with `deterministic: true` that saves after each step goes through three of them, in different steps; all three count as failed if its
losses, norms, parameters or moments are not those of the undisturbed run. A point that the run does not come by is not counted. In two of
ten runs the second rank dies while the others connect after the first loss, and in half of these a third one later. Of each
run this counts, beside its bits: steps and samples that are missing or other than in the undisturbed run; steps that were done again,
although a rank had said that they were done; and folders named `checkpoint-N` that are not whole.

Under the local launcher (7 of 10 runs) and under `hecate launch` (1 of 10, in turn on one node and on two) the ranks that are left go on,
the last one alone. On Ray (1 of 10, a private cluster for each) they do so, too, and other ranks join them. Half of these save beside the
steps. Under `hecate launch` without backups (1 of 10, likewise) all ranks start again from the last checkpoint, so that the step
under way, or one that was done and not saved, is done again.

The points come from a seed, so that a call with `--resume` goes on where one before has ended; `--most` ends it after so many points.
Runs whose plan is another one now are done again. A call without `--resume` begins anew. After each run all runs are written to a file
that git ignores, and what they come to, with those that did not hold, to the recording (benchmarks/results/kill_points.json).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kill_plans import DEATHS, RANKS, KillPlan, goes_on, plan_of
from benchmarks.report import arguments, as_json, machine, raw_file, replace_file, spread
from hecate.apps.check.drill.cases.losses import Times, problem_of
from hecate.apps.check.drill.outcome import Scope, TooSlow
from hecate.apps.check.drill.ranks import Launched, Started, begin_run
from hecate.apps.check.drill.run import DrillFolder, drill_folder
from hecate.checkpoint import good_checkpoints

RESULTS = Path(__file__).parent / "results" / "kill_points.json"
WANTED, QUICK = 1000, 6
"""points"""
_LIMIT = 900.0
"""seconds that a run may take; locally one takes five on an idle core"""


@dataclass(frozen=True)
class KilledRun:
    """What became of one plan."""

    number: int
    launcher: str
    beside: bool
    """saves beside the steps"""
    points: tuple[str, ...]
    """of those that the run came by: rank, step, place and call"""
    problem: str
    """what was wrong; empty: nothing"""
    lost_steps: int
    lost_samples: int
    repeated_steps: int
    torn: int
    """folders named as checkpoints that are not whole"""
    noticed_ms: float
    recovered_ms: float
    """after the last kill; 0 where nobody was left to notice, and where all start again"""

    @property
    def held(self) -> bool:
        return not (self.problem or self.lost_steps or self.lost_samples or self.torn)


def carried_out(plan: KillPlan, whole: Launched, scope: Scope) -> KilledRun:
    """Do a run with its kills, and compare it."""
    stays = goes_on(plan.launcher)
    given = ("save_steps=1", "save_total_limit=2", f"save_async={str(plan.beside).lower()}")
    by = Started(launcher=plan.launcher, restarts=0 if stays else DEATHS)
    started = begin_run(scope, "killed", RANKS, *given, injected=plan.deaths, survives=stays, started=by)
    try:
        run = started.end(_LIMIT)
    except TooSlow:
        run = started.ended()
    kills = [one for one in run.trace if one["what"] == "kill"]
    torn = len(_named(run.output) - {path.name for path in good_checkpoints(run.output)})
    problem = problem_of(run, whole, lost=len(kills))
    times = Times()
    if stays and not problem:
        times.add(run, [one["time"] for one in kills])
    steps, samples = lost(run, whole)
    return KilledRun(
        number=plan.number,
        launcher=plan.launcher,
        beside=plan.beside,
        points=tuple(f"rank {one['rank']}, step {one['step']}, {plan.named(one['rank'], one['step'])}" for one in kills),
        problem=problem,
        lost_steps=steps,
        lost_samples=samples,
        repeated_steps=repeated(run),
        torn=torn,
        noticed_ms=round(times.counts()["noticed_ms"], 1),
        recovered_ms=round(times.counts()["recovered_ms"], 1),
    )


def lost(run: Launched, whole: Launched) -> tuple[int, int]:
    """How many steps of the undisturbed run nobody has done with the same samples, and how many of its samples were missing there."""
    steps = samples = 0
    done = _samples_by_step(run)
    for step, wanted in _samples_by_step(whole).items():
        found = done.get(step, set())
        steps += found != wanted
        samples += len(wanted - found)
    return steps, samples


def repeated(run: Launched) -> int:
    """How many steps a rank has done more than once."""
    seen: set[tuple[int, int]] = set()
    again = set()
    for one in run.trace:
        if one["what"] == "trained":
            key = (one["rank"], one["step"])
            again |= {one["step"]} if key in seen else set()
            seen.add(key)
    return len(again)


def _samples_by_step(run: Launched) -> dict[int, set[tuple[int, int]]]:
    """(source, sample) of each step; a step in which ranks differ has more of them."""
    found: dict[int, set[tuple[int, int]]] = {}
    for one in run.trace:
        if one["what"] == "trained":
            found.setdefault(one["step"], set()).update((source, sample) for source, sample in one["more"])
    return found


def _named(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*") if ".tmp-" not in path.name}


def totals(runs: Sequence[KilledRun]) -> dict[str, Any]:
    """What all runs come to, by launcher and by the kind of point."""
    held = [run for run in runs if run.held]
    by_place: dict[str, int] = {}
    for run in runs:
        for point in run.points:
            place = point.rpartition(", ")[2].partition(" ")[0]
            by_place[place] = by_place.get(place, 0) + 1
    launchers = sorted({run.launcher for run in runs})
    return {
        "points": _points(runs),
        "bitwise_equal": _points(held),
        "lost_steps": sum(run.lost_steps for run in runs),
        "lost_samples": sum(run.lost_samples for run in runs),
        "torn": sum(run.torn for run in runs),
        "by_launcher": {one: _points([run for run in runs if run.launcher == one]) for one in launchers},
        "repeated_steps": {one: sum(run.repeated_steps for run in runs if run.launcher == one) for one in launchers},
        "by_place": dict(sorted(by_place.items())),
    }


def _points(runs: Sequence[KilledRun]) -> int:
    return sum(len(run.points) for run in runs)


def read_runs(path: Path) -> list[KilledRun]:
    """The runs beside a recording that were done as their plans now say."""
    if not raw_file(path).exists():
        return []
    runs = [KilledRun(**{**run, "points": tuple(run["points"])}) for run in json.loads(raw_file(path).read_text(encoding="utf-8"))]
    return [run for run in runs if _as_planned(run, plan_of(run.number))]


def _as_planned(run: KilledRun, plan: KillPlan) -> bool:
    connects = any(one.place == "connect" for one in plan.deaths)
    return (run.launcher, run.beside) == (plan.launcher, plan.beside) and connects == any(", connect " in point for point in run.points)


def write_runs(path: Path, runs: Sequence[KilledRun], environment: dict[str, Any]) -> None:
    """Write all runs to the file beside the recording, and the recording: what they come to, and those that did not hold."""
    replace_file(raw_file(path), json.dumps([asdict(run) for run in runs]))
    failed = [asdict(run) for run in runs if not run.held]
    result = {
        "name": "kill_points",
        "machine": environment,
        "wanted": WANTED,
        "totals": totals(runs),
        "times": times(runs),
        "failed": failed,
    }
    replace_file(path, as_json(result))


def times(runs: Sequence[KilledRun]) -> dict[str, dict[str, list[float]]]:
    """By launcher the spreads of milliseconds after the last kill until the others have noticed it, and until they go on."""
    found: dict[str, dict[str, list[float]]] = {}
    for launcher in sorted({run.launcher for run in runs if run.recovered_ms}):
        timed = [run for run in runs if run.launcher == launcher and run.recovered_ms]
        found[launcher] = {"noticed_ms": spread(run.noticed_ms for run in timed), "recovered_ms": spread(run.recovered_ms for run in timed)}
    return found


def go_through(made: DrillFolder, runs: list[KilledRun], until: int, path: Path) -> None:
    """Add runs until there are so many points, and write the file after each."""
    environment = machine()
    with tempfile.TemporaryDirectory(dir=made.folder) as own:
        scope = Scope(own, str(made.workshop), quick=False, start=made.start)
        whole = begin_run(scope, "whole", RANKS).end(_LIMIT)
        assert whole.status == 0, whole.log
        done = {run.number for run in runs}
        numbers = (number for number in itertools.count() if number not in done)
        while _points(runs) < until:
            number = next(numbers)
            with tempfile.TemporaryDirectory(dir=own) as folder:
                run = carried_out(plan_of(number), whole, Scope(folder, scope.workshop, quick=False, start=scope.start))
            runs.append(run)
            write_runs(path, sorted(runs, key=lambda one: one.number), environment)
            state = "equal" if run.held else f"NOT EQUAL: {run.problem or run}"
            print(f"run {number}, {run.launcher}, {len(run.points)} points: {state}", flush=True)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier call has ended")
    parser.add_argument("--most", type=int, help="end after about so many more points")
    given = parser.parse_args()
    path = given.json or (Path(tempfile.gettempdir()) / "kill_points-quick.json" if given.quick else RESULTS)
    runs = read_runs(path) if given.resume else []
    wanted = QUICK if given.quick else WANTED
    until = wanted if given.most is None else min(wanted, _points(runs) + given.most)
    with drill_folder() as made:
        go_through(made, runs, until, path)
    found = totals(runs)
    print(json.dumps(found, indent=1))
    if found["bitwise_equal"] != found["points"]:
        raise SystemExit("some points did not end with the same bits")


if __name__ == "__main__":
    main()
