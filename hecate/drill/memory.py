"""Memory that changes by itself: R20."""

from __future__ import annotations

from hecate.drill.armed import Injected, flip_a_bit
from hecate.drill.outcome import Case, Outcome, Scope, outcome_of
from hecate.drill.ranks import begin_run, call_on_ranks
from hecate.drill.tiny_training import tiny_training
from hecate.elastic.backups import differing_backups
from hecate.ranks.ranks import Ranks


def flipped_in_memory(scope: Scope) -> Outcome:
    """R20"""
    world = 3
    cases = []
    for rank in (1,) if scope.quick else range(world):
        told = call_on_ranks(scope, world, flip_and_compare, scope.workshop, str(scope.path / f"flip-{rank}"), rank)
        (sound, owner, later), *others = told
        problem = "" if all(one == [sound, owner, later] for one in others) else "the ranks do not agree"
        if sound:
            problem = f"{sound[0]} differs though nothing was flipped"
        elif not problem and (len(owner) != 1 or not set(owner) <= set(later)):
            problem = f"found at once: {owner}; three steps later: {later}"
        cases.append(Case(f"owner on rank {rank}", problem))
    fault = Injected(action="flip", place="gradients", rank=1, step=2)
    run = begin_run(scope, "run", world, "save_steps=1", injected=[fault]).end()
    kept = sorted(path.name for path in run.output.glob("checkpoint-*"))
    problem = "" if kept == ["checkpoint-1", "checkpoint-2"] else f"saved {kept}"
    if run.status != 2 or "the copies on two ranks differ" not in run.log:
        problem = f"status {run.status}: {run.log.strip().splitlines()[-1]}"
    cases.append(Case("a run that saves after each step", problem))
    return outcome_of(cases, "the expert is named at the next save, and the damaged state is not saved")


def flip_and_compare(ranks: Ranks, workshop: str, output: str, rank: int) -> list[list[str]]:
    """The experts that differ from their backups before a bit of one on `rank` flips, after it, and three steps later."""
    run = tiny_training(ranks, workshop, output, "fssdp.redundancy=1")
    run.train_one()
    found = [differing_backups(run.parts.moe.engine, run.parts.optimizer)]
    if ranks.rank == rank:
        flip_a_bit(run.parts.optimizer)
    found.append(differing_backups(run.parts.moe.engine, run.parts.optimizer))
    for _ in range(3):
        run.train_one()
    found.append(differing_backups(run.parts.moe.engine, run.parts.optimizer))
    return found
