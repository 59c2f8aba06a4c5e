"""Random faults for an hour: does a training end as one without them does?

    python -m benchmarks.soak [--minutes 60] [--quick] [--json FILE]

One tiny training with `deterministic: true` and `fssdp.redundancy: 1` goes on in legs of some steps each. A leg resumes the last
checkpoint on 1 to 4 ranks, and meets the faults that its seeded plan says: ranks killed (up to all of them), a rank stopped by SIGSTOP, a
disk that is full from some save on, its launcher killed, or none; in every third leg ranks that the launcher starts in the place of lost
ones join. Whatever a leg ends with, the next one goes on. One step in twenty has a loss that is not a number, and is skipped.

At the end another run goes through all steps with four ranks, without any of this but for the same losses that are no numbers, since a step
that is skipped changes the training. Losses, norms, parameters and moments must be the same, bit for bit.
"""

from __future__ import annotations

import errno
import json
import math
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.cases.losses import PHASES
from hecate.apps.check.drill.outcome import Scope, TooSlow
from hecate.apps.check.drill.ranks import Launched, Started, begin_run, difference
from hecate.apps.check.drill.run import drill_folder
from hecate.checkpoint import good_checkpoints, read_manifest

SEED, RANKS = 20, 4
LEG_STEPS = 8
KINDS = ("none", "kill", "kill", "stop", "disk", "launcher")
GIVEN = ("save_steps=2", "save_total_limit=3")
_LIMIT = 900.0
"""seconds that a leg may take; one that takes more hangs"""


@dataclass(frozen=True)
class Leg:
    """What a leg meets."""

    number: int
    ranks: int
    kind: str
    joins: bool
    injected: tuple[Injected, ...]
    launcher_dies_at: int
    """the step after which the launcher is killed; only of kind launcher"""


@dataclass
class Soaked:
    """What became of the legs."""

    legs: Counter[str] = field(default_factory=Counter)
    """by kind"""
    faults: Counter[str] = field(default_factory=Counter)
    """that were carried out"""
    went_back: int = 0
    """legs in which ranks that were left had to go back to a checkpoint"""
    resizes: int = 0
    problems: list[str] = field(default_factory=list)
    steps: int = 0


def is_poisoned(step: int) -> bool:
    """Whether a step's loss is not a number, in whatever leg it is done."""
    return bool(np.random.default_rng([SEED, 1, step]).random() < 0.05)


def poison(first: int, end: int) -> tuple[Injected, ...]:
    """On all ranks, so that it does not matter how many there are."""
    return tuple(
        Injected(action="fill", place="loss", step=step, call=0, value=math.nan) for step in range(first, end) if is_poisoned(step)
    )


def leg_of(number: int, first: int) -> Leg:
    """The plan of a leg that begins after `first` steps; the first leg of a run meets nothing, so that there is a checkpoint."""
    random = np.random.default_rng([SEED, number])
    kind = str(random.choice(KINDS)) if number else "none"
    ranks = 1 + int(random.integers(RANKS)) if number else RANKS
    steps = [first + int(step) for step in random.permutation(LEG_STEPS)]
    places = list(PHASES.values())

    def struck(action: Any, rank: int, step: int) -> Injected:
        place, call = places[random.integers(len(places))]
        return Injected(action=action, place=place, call=call, rank=rank, step=step)

    faults: list[Injected] = []
    if kind == "kill":
        dying = random.permutation(ranks)[: 1 + random.integers(ranks)]
        faults = [struck("kill", int(rank), step) for rank, step in zip(dying, steps, strict=False)]
    elif kind == "stop":
        faults = [struck("stop", int(random.integers(ranks)), steps[0])]
    elif kind == "disk":
        full = {"action": "fail", "place": "file", "call": 0, "rank": int(random.integers(ranks)), "value": float(errno.ENOSPC)}
        faults = [Injected(**full, step=step) for step in range(steps[0], first + LEG_STEPS)]
    return Leg(number, ranks, kind, number % 3 == 2, tuple(faults), first + int(random.integers(1, LEG_STEPS)))


def go_through(scope: Scope, output: Path, minutes: float) -> Soaked:
    """Do legs for so long."""
    found, until, before = Soaked(), time.monotonic() + 60 * minutes, RANKS
    while time.monotonic() < until or not found.legs:
        first, started = steps_saved(output), time.monotonic()
        leg = leg_of(found.legs.total(), first)
        run = carried_out(scope, output, leg, first)
        found.legs[leg.kind] += 1
        found.resizes += (leg.ranks != before) + sum("ranks go on" in line for line in run.log.splitlines())
        found.went_back += "back at the last checkpoint" in run.log
        found.faults.update(one["what"] for one in run.trace if one["what"] in ("kill", "stop"))
        if "No space left on device" in run.log:
            found.faults["full disk"] += 1
        if leg.kind == "launcher" and run.status == -signal.SIGKILL:
            found.faults["launcher killed"] += 1
        if problem := problem_of_leg(leg, run):
            found.problems.append(f"leg {leg.number}, {leg.kind}: {problem}")
        before = leg.ranks
        took = time.monotonic() - started
        print(f"leg {leg.number}: {leg.ranks} ranks, {leg.kind}: steps {first} to {steps_saved(output)}, {took:.0f} s", flush=True)
    return found


def carried_out(scope: Scope, output: Path, leg: Leg, first: int) -> Launched:
    """Do one leg."""
    end = first + LEG_STEPS
    given = (*GIVEN, f"max_steps={end}", f"resume={str(first > 0).lower()}")
    injected = (*leg.injected, *poison(first, end))
    run = begin_run(scope, "leg", leg.ranks, *given, injected=injected, started=Started(joins=leg.joins), output=output)
    if leg.kind == "launcher":
        with suppress(AssertionError, TooSlow):  # it has ended before; the leg's status says how
            run.wait_for(f"step {leg.launcher_dies_at}/", _LIMIT)
        run.process.kill()
    with suppress(TooSlow):
        return run.end(_LIMIT)
    return run.ended()


def problem_of_leg(leg: Leg, run: Launched) -> str:
    """What is wrong with the way in which a leg has ended; that it ended early is not."""
    if "Traceback" in run.log:
        return f"a traceback: {run.log.strip().splitlines()[-1][:200]}"
    if leg.kind != "launcher" and run.status == -signal.SIGKILL:
        return f"it had not ended after {_LIMIT:.0f} s"
    survives = leg.kind in ("none", "stop") and leg.ranks > 1
    survives |= leg.kind == "kill" and len(leg.injected) < leg.ranks
    if survives and run.status:
        return f"status {run.status}: {(run.log.strip().splitlines() or ['?'])[-1][:200]}"
    return ""


def steps_saved(output: Path) -> int:
    newest = next(good_checkpoints(output), None)
    return 0 if newest is None else read_manifest(newest).step


def compare(scope: Scope, output: Path, found: Soaked, given: tuple[str, ...] = GIVEN) -> None:
    """Finish the run to a leg's end, do it without faults, and note what differs."""
    found.steps = steps_saved(output) + LEG_STEPS
    last = Leg(found.legs.total(), RANKS, "none", False, (), 0)
    disturbed = carried_out(scope, output, last, found.steps - LEG_STEPS)
    whole = begin_run(scope, "whole", RANKS, *given, f"max_steps={found.steps}", injected=poison(0, found.steps)).end(3600)
    for run in (disturbed, whole):
        if run.status:
            found.problems.append(f"the last run ended with status {run.status}: {(run.log.strip().splitlines() or ['?'])[-1][:200]}")
            return
    missing = sorted(set(whole.losses) - set(disturbed.losses))  # whoever reports may have died before it had
    other = [step for step, values in disturbed.losses.items() if json.dumps(values) != json.dumps(whole.losses.get(step))]
    if other:
        found.problems.append(f"losses or norms of {len(other)} steps differ, of step {other[0]} first")
    if len(missing) > found.faults["kill"] + found.faults["stop"]:
        found.problems.append(f"metrics.jsonl lacks steps {missing[:5]}")
    if off := difference(disturbed.tensors, whole.tensors):
        found.problems.append(f"parameters or moments are off by {off:.2g}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long faults come; the comparison takes some minutes more")
    options = parser.parse_args()
    minutes = min(1.0, options.minutes) if options.quick else options.minutes
    with drill_folder() as made, tempfile.TemporaryDirectory(dir=made.folder) as own:
        scope = Scope(own, str(made.workshop), quick=False, start=made.start)
        output = Path(own) / "soaked"
        found = go_through(scope, output, minutes)
        compare(scope, output, found)
    rows = [{"leg": kind, "legs": number} for kind, number in sorted(found.legs.items())]
    summary = {
        "minutes": minutes,
        "steps": float(found.steps),
        "poisoned_steps": float(sum(map(is_poisoned, range(found.steps)))),
        "resizes": float(found.resizes),
        "went_back": float(found.went_back),
        **{f"faults: {name}": float(number) for name, number in sorted(found.faults.items())},
        "problems": float(len(found.problems)),
    }
    finish("soak", rows, summary, options.json)
    if found.problems:
        raise SystemExit("\n".join(found.problems))
    print("it ended with the same bits as a run without faults")


if __name__ == "__main__":
    main()
