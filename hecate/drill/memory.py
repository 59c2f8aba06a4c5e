"""Memory that changes by itself: R20."""

from __future__ import annotations

from pathlib import Path

from hecate.drill.armed import Injected, flip_a_bit
from hecate.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.drill.ranks import begin_run, call_on_ranks
from hecate.drill.tiny_training import tiny_training
from hecate.elastic.backups import differing_backups
from hecate.errors import UserError
from hecate.ranks.ranks import Ranks

_SAID = "the copies on two ranks differ"


def flipped_in_memory(scope: Scope) -> DrillOutcome:
    """R20"""
    world = 3
    cases = []
    for rank in (1,) if scope.quick else range(world):
        told = call_on_ranks(scope, world, flip_and_compare, scope.workshop, str(scope.path / f"flip-{rank}"), rank)
        (sound, at_once, later, said, saved), *others = told
        problem = "" if all(one == told[0] for one in others) else "the ranks do not agree"
        if sound:
            problem = f"{sound[0]} differs though nothing was flipped"
        elif len(at_once) != 1 or not set(at_once) <= set(later):
            problem = f"found at once: {at_once}; three steps later: {later}"
        elif _SAID not in said or at_once[0] not in said:
            problem = f"a save says: {said}"
        elif saved:
            problem = f"{saved[0]} was saved all the same"
        cases.append(DrillCase(f"owner on rank {rank}", problem))
    if not scope.quick:
        cases.append(DrillCase("a run that saves after each step", _in_a_run(scope, world)))
    return outcome_of(cases, "the expert is named at the next save, and the damaged state is not saved")


def _in_a_run(scope: Scope, world: int) -> str:
    fault = Injected(action="flip", place="gradients", rank=1, step=2)
    run = begin_run(scope, "run", world, "save_steps=1", injected=[fault]).end()
    if run.status != 2 or _SAID not in run.log:
        return f"status {run.status}: {run.log.strip().splitlines()[-1]}"
    kept = sorted(path.name for path in run.output.glob("checkpoint-*"))
    return "" if kept == ["checkpoint-1", "checkpoint-2"] else f"saved {kept}"


def flip_and_compare(ranks: Ranks, workshop: str, output: str, rank: int) -> tuple[list[str], list[str], list[str], str, list[str]]:
    """The experts that differ from their backups before a bit of one on `rank` flips, after it, and three steps later; what a save says
    then, and what it has left."""
    run = tiny_training(ranks, workshop, output, "fssdp.redundancy=1")
    run.train_one()
    found = [differing_backups(run.parts.moe.engine, run.parts.optimizer)]
    if ranks.rank == rank:
        flip_a_bit(run.parts.optimizer)
    found.append(differing_backups(run.parts.moe.engine, run.parts.optimizer))
    for _ in range(3):
        run.train_one()
    found.append(differing_backups(run.parts.moe.engine, run.parts.optimizer))
    said = "nothing"
    try:
        run.save()
    except UserError as error:
        said = str(error)
    ranks.barrier()
    return found[0], found[1], found[2], said, [path.name for path in Path(output).glob("checkpoint-*")]
