"""Read every hostile and changed file, in a process of its own: `python -m tests.attacks.fuzz.run FOLDER MUTANTS [quick]`.

It prints what was wrong, a line each, and at last how many files there were. Its memory is bounded, which no test's process could be.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hecate.apps.check.drill.outcome import DrillCase
from tests.attacks.fuzz.cases import fuzz_cases
from tests.attacks.fuzz.forged_checkpoints import CHANGES, tried_checkpoint
from tests.attacks.fuzz.guard import limit_memory, most_grown
from tests.attacks.fuzz.hostile import HOSTILE, tried_file

_ROOM = 2**31 + 2**30
"""bytes of address space that the process may take beside what it has: more is promised by no file that is read"""


def main(folder: Path, mutants: int, *, quick: bool) -> int:
    """Try all files in an empty folder; the exit status is 1 if anything was wrong."""
    limit_memory(_ROOM)
    os.chdir(folder)
    outside = folder / "outside"
    os.mkfifo(outside)
    cases = [tried_checkpoint(folder, name, change) for name, change in CHANGES.items()]
    for number, one in enumerate(HOSTILE):
        (folder / f"file-{number}").mkdir()
        cases.append(tried_file(one, folder / f"file-{number}", outside))
    hostile = len(cases)
    cases += fuzz_cases(folder / "fuzz", mutants, quick=quick)
    changed = len(cases) - hostile
    ran = [str(path) for path in (Path("ran"), Path("/tmp/ran")) if path.exists()]
    cases.append(DrillCase("no code has run", f"{ran[0]} is there" if ran else ""))
    wrong = [f"{case.name}: {case.problem}" for case in cases if case.problem]
    print(*wrong, f"{hostile} hostile files, {changed} changed ones, {most_grown() / 2**20:.0f} MiB at most", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), quick="quick" in sys.argv[3:]))
