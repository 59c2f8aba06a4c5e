"""Run drills one after another, each in a process of its own that a fork server starts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hecate.apps.check.drill.catalogue import DRILLS, Drill
from hecate.apps.check.drill.outcome import DrillOutcome, Scope
from hecate.errors import UserError
from hecate.launch.fork_server import forking
from hecate.launch.run_folder import run_folder

PROGRAM = "hecate.apps.check.drill.program"
_LIMIT = 900.0
"""seconds that a drill may take"""
_ENDING = 30.0
"""seconds that one which has taken longer has to end its processes"""


@dataclass(frozen=True)
class DrillReport:
    """A drill that was run."""

    drill: Drill
    outcome: DrillOutcome
    seconds: float


def chosen_drills(names: Sequence[str]) -> list[Drill]:
    """The drills of these names; without names all.

    Raises:
        UserError: there is no drill of a name.
    """
    if unknown := [name for name in names if name.upper() not in DRILLS]:
        raise UserError(f"no drill is called {unknown[0]}\n  hecate drill --list shows all {len(DRILLS)}: {', '.join(DRILLS)}")
    return [DRILLS[name.upper()] for name in names] or list(DRILLS.values())


@dataclass(frozen=True)
class DrillFolder:
    """Where drills are run: a fork server, and the tiny run."""

    folder: Path
    start: tuple[str, ...]
    """see `Scope.start`"""

    @property
    def workshop(self) -> Path:
        return self.folder / "workshop"

    def run(self, drill: Drill, *, quick: bool, without: bool = False) -> DrillReport:
        """Run one drill, in its short form or in full.

        Args:
            without: without the feature that it is about (`hecate.apps.check.drill.prove`).
        """
        own = Path(tempfile.mkdtemp(prefix=f"{drill.name}-", dir=self.folder))
        start = (*self.start, "without", drill.name) if without else self.start
        return _run_one(drill, Scope(str(own), str(self.workshop), quick, start))


@contextmanager
def drill_folder() -> Iterator[DrillFolder]:
    """Make the folder in which drills are run; all of it is gone after the block.

    Raises:
        UserError: the tiny run cannot be made on this machine.
    """
    with run_folder() as folder, forking(folder, {**os.environ, "OMP_NUM_THREADS": "1"}, PROGRAM) as start:
        made = DrillFolder(folder, start)
        done = subprocess.run([*start, "workshop", str(made.workshop)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the tiny run of the drills cannot be made here:\n  {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        yield made


def _run_one(drill: Drill, scope: Scope) -> DrillReport:
    result, log = scope.path / "outcome.json", scope.path / "log"
    started = time.monotonic()
    with open(log, "wb") as output:
        command = [*scope.start, "drill", drill.function, json.dumps(vars(scope)), str(result)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            status = None
            process.terminate()  # it ends the processes that it has started
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING)
        finally:
            process.kill()
            process.wait()
    seconds = time.monotonic() - started
    if result.exists():
        value = json.loads(result.read_text(encoding="utf-8"))
        texts = {name: tuple(value[name]) for name in ("failures", "too_slow")}
        return DrillReport(drill, DrillOutcome(**{**value, **texts}), seconds)
    if status is None:
        why = f"the drill had not ended after {_LIMIT:.0f} s, nor {_ENDING:.0f} s after the signal to end"
        return DrillReport(drill, DrillOutcome("not decided: the machine was too slow", 0, 1, too_slow=(why,)), seconds)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    failures = tuple(lines[-3:]) or ("it printed nothing",)
    return DrillReport(drill, DrillOutcome(f"the drill itself ended with status {status}", 0, 1, failures=failures), seconds)
