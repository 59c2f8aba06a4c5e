"""Checkpoints that are damaged: R8."""

from __future__ import annotations

import os
import random
from pathlib import Path

from hecate.apps.check.drill.cases.resuming import save_at
from hecate.apps.check.drill.cases.saves import load
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import call_on_ranks
from hecate.checkpoint import CheckpointError


def bit_flips(scope: Scope) -> DrillOutcome:
    """R8. Of a checkpoint that a run of two ranks has saved; the small files are hit as often as the large ones."""
    call_on_ranks(scope, 2, save_at, scope.workshop, str(scope.path / "run"))
    folder = scope.path / "run" / "checkpoint-2"
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_size)
    draw, left = random.Random(0), 200 if scope.quick else 10_000
    counts, cases = {}, []
    for number, path in enumerate(files):
        sound = path.read_bytes()
        bits = draw.sample(range(8 * len(sound)), min(left // (len(files) - number), 8 * len(sound)))
        counts[path.name], left = len(bits), left - len(bits)
        for bit in bits:
            _write_byte(path, bit // 8, sound[bit // 8] ^ 1 << bit % 8)
            found = refused(folder)
            _write_byte(path, bit // 8, sound[bit // 8])
            cases.append(DrillCase(f"{path.name}, bit {bit}", "" if found else "was not found"))
    cases.append(DrillCase("the sound checkpoint", "is refused" if refused(folder) else ""))
    seen = "every flipped bit is found, in tensors, headers, manifest and COMMIT"
    return outcome_of(cases, seen, {"flips": sum(counts.values()), **counts})


def refused(folder: Path) -> bool:
    """Whether a checkpoint is refused."""
    try:
        load(folder)
    except CheckpointError:
        return True
    return False


def _write_byte(path: Path, at: int, byte: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, bytes([byte]), at)
    os.close(descriptor)
