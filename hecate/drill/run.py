"""Run drills one after another, each in a process of its own that a fork server starts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hecate.drill.catalogue import DRILLS, Drill
from hecate.drill.outcome import Outcome, Scope
from hecate.errors import UserError
from hecate.launch.fork_server import forking
from hecate.launch.run_folder import run_folder

PROGRAM = "hecate.drill.program"
_LIMIT = 900.0
"""seconds that a drill may take"""


@dataclass(frozen=True)
class Report:
    """A drill that was run."""

    drill: Drill
    outcome: Outcome
    seconds: float


def chosen(names: Sequence[str], *, everything: bool) -> list[Drill]:
    """The drills of these names; without names all, or those that have a short form.

    Raises:
        UserError: there is no drill of a name.
    """
    if unknown := [name for name in names if name.upper() not in DRILLS]:
        raise UserError(f"no drill is called {unknown[0]}\n  hecate drill --list shows all {len(DRILLS)}: R1 to R{len(DRILLS)}")
    if names:
        return [DRILLS[name.upper()] for name in names]
    return [drill for drill in DRILLS.values() if everything or drill.quick]


def run_drills(drills: Sequence[Drill], *, quick: bool, tell: Callable[[Report], None] = lambda report: None) -> list[Report]:
    """Run drills in their order.

    Args:
        quick: in their short form.
        tell: is called after each of them.

    Raises:
        UserError: the tiny run cannot be made on this machine.
    """
    reports = []
    with run_folder() as folder, forking(folder, {**os.environ, "OMP_NUM_THREADS": "1"}, PROGRAM) as start:
        workshop = folder / "workshop"
        made = subprocess.run([*start, "workshop", str(workshop)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise UserError(f"the tiny run of the drills cannot be made here:\n  {(made.stderr.strip().splitlines() or ['?'])[-1]}")
        for drill in drills:
            own = folder / drill.name
            own.mkdir()
            report = _run_one(drill, Scope(str(own), str(workshop), quick, start))
            reports.append(report)
            tell(report)
    return reports


def _run_one(drill: Drill, scope: Scope) -> Report:
    result, log = scope.path / "outcome.json", scope.path / "log"
    started = time.monotonic()
    with open(log, "wb") as output:
        command = [*scope.start, "drill", drill.function, json.dumps(vars(scope)), str(result)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
    seconds = time.monotonic() - started
    if result.exists():
        value = json.loads(result.read_text(encoding="utf-8"))
        return Report(drill, Outcome(**{**value, "failures": tuple(value["failures"])}), seconds)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f"had not ended after {_LIMIT:.0f} s" if status is None else f"ended with status {status}"
    return Report(drill, Outcome(f"the drill itself {reason}", 0, 1, failures=tuple(lines[-3:])), seconds)
