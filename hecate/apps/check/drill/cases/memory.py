"""Memory that changes by itself: R20."""

from __future__ import annotations

from pathlib import Path

from hecate.apps.check.drill.armed import Injected, flip_a_bit
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import begin_run, call_on_ranks
from hecate.apps.check.drill.tiny_training import Held, tiny_training
from hecate.errors import UserError
from hecate.ranks.ranks import Ranks

_NOT_KNOWN = "which one is not known, and nothing was saved"
_WORLD = 3


def flipped_in_memory(scope: Scope) -> DrillOutcome:
    """R20"""
    cases = []
    for rank in (1,) if scope.quick else range(_WORLD):
        for held in ("owner",) if scope.quick else ("owner", "backup"):
            told = call_on_ranks(scope, _WORLD, flip_and_train, scope.workshop, str(scope.path / f"{held}-{rank}"), rank, held)
            problem = ""
            for changed, restored in told:
                if [one.partition(" on ")[2] for one in restored] != [f"rank {rank}"]:
                    problem = f"restored: {restored}"
                elif changed:
                    problem = f"{changed[0]} is not that of an undisturbed run"
            cases.append(DrillCase(f"{held} on rank {rank}, compared in each step", problem))
    for backups in (1, 2):
        told = call_on_ranks(scope, _WORLD, flip_and_save, scope.workshop, str(scope.path / f"saved-{backups}"), backups)
        wanted = _NOT_KNOWN if backups == 1 else "restored 0."
        problem = "" if all(wanted in said and (backups == 2) == saved for said, saved in told) else f"a save says: {told[0]}"
        cases.append(DrillCase(f"{backups + 1} copies, compared before a save only", problem))
    if not scope.quick:
        cases += [DrillCase(f"a run that saves after each step{also}", _in_a_run(scope, every)) for also, every in _RUNS.items()]
    return outcome_of(cases, "the expert is named, and restored where the right copy is known; the damaged one is never saved")


_RUNS = {"": "null", ", and compares in each": "1"}


def _in_a_run(scope: Scope, every: str) -> str:
    """What went otherwise than expected in a run whose rank 1 has a flipped bit in step 2."""
    given = ("save_steps=1", f"fssdp.verify_copies_steps={every}")
    run = begin_run(scope, f"run-{every}", _WORLD, *given, injected=[Injected(action="flip", place="gradients", rank=1, step=2)]).end()
    if every != "null":
        return "" if run.status == 0 and "memory has changed by itself" in run.log else f"status {run.status}: {run.last_line}"
    if run.status != 2 or _NOT_KNOWN not in run.log:
        return f"status {run.status}: {run.last_line}"
    kept = sorted(path.name for path in run.output.glob("checkpoint-*"))
    return "" if kept == ["checkpoint-1", "checkpoint-2"] else f"saved {kept}"


def flip_and_train(ranks: Ranks, workshop: str, output: str, rank: int, held: str) -> tuple[list[str], list[str]]:
    """What differs from an undisturbed run after a bit has flipped on `rank`, in its own expert or in a backup, and what was restored."""
    whole = tiny_training(ranks, workshop, f"{output}-whole", "fssdp.redundancy=1")
    run = tiny_training(ranks, workshop, output, "fssdp.redundancy=1", "fssdp.verify_copies_steps=1")
    for step in range(4):
        whole.train_one()
        if step == 2 and ranks.rank == rank:
            flip_a_bit(run.parts.optimizer, backup=held == "backup")
        run.train_one()
    return Held.by(whole.parts.optimizer).changed(Held.by(run.parts.optimizer)), run.copies.take_restored()


def flip_and_save(ranks: Ranks, workshop: str, output: str, backups: int) -> tuple[str, bool]:
    """What a save says that comes some steps after a bit has flipped on rank 1, and whether it has left something."""
    run = tiny_training(ranks, workshop, output, f"fssdp.redundancy={backups}")
    run.train_one()
    if ranks.rank == 1:
        flip_a_bit(run.parts.optimizer)
    for _ in range(3):
        run.train_one()
    try:
        run.save()
        said = f"restored {', '.join(run.copies.take_restored())}"
    except UserError as error:
        said = str(error)
    ranks.barrier()
    return said, any(Path(output).glob("checkpoint-*"))
