"""Ranks that do something else than the others, or are slow: R18, R19."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from hecate import faults
from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of, worst
from hecate.apps.check.drill.ranks import begin_run, call_on_ranks
from hecate.apps.check.drill.tiny_training import tiny_training
from hecate.faults import Place
from hecate.ranks.ranks import Ranks, connect

_CHECKS = "TORCH_DISTRIBUTED_DEBUG"
_LIMIT_SECONDS, _END_SECONDS = 2.0, 1.0
"""until the mismatch is named; from then until all processes of a run have ended"""
_STEPS = 10
"""within which a slow rank is to be named"""


def mismatched(scope: Scope) -> DrillOutcome:
    """R18. A run notices it by itself; with TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares before each collective."""
    stray = Injected(action="stray", place="reduce", rank=1, step=2)
    run = begin_run(scope, "stray", 3, injected=[stray]).end()
    ended = time.monotonic()
    named = "rank 1 is in barrier; ranks 0, 2 are in" in run.log
    problem = "" if named and run.status == 2 else f"status {run.status}: {run.last_line}"
    took = [1000 * (ended - at) for at in run.when("stray")]
    late = not scope.quick and worst(took) > 1000 * (_LIMIT_SECONDS + _END_SECONDS)
    cases = [DrillCase("another order, in a run as it is", problem, f"after {worst(took) / 1000:.1f} s" if late else "")]
    if not scope.quick:
        given = ["deterministic=false"]  # without backups the others' next collective is in another group than the stray one
        run = begin_run(scope, "other", 3, *given, injected=[replace(stray, value=7)], survives=False).end()
        named = "in different groups: rank 1 is in all_reduce of Float [7]" in run.log
        cases.append(DrillCase("another group, in a run as it is", "" if named else f"status {run.status}: {run.last_line}"))
    for kind in () if scope.quick else ("shape", "operation", "order"):
        told = call_on_ranks(scope, 3, mismatch, scope.workshop, str(scope.path / kind), kind)
        for rank, (seconds, text) in enumerate(told):
            checked = re.search(r"Rank (\d+) is running collective.*Rank (\d+) is running collective", text, re.DOTALL)
            problem = (
                "" if checked and "1" in checked.groups() and "OpType" in text else f"neither rank nor operation is named: {text[:100]}"
            )
            late = seconds > _LIMIT_SECONDS
            name = f"another {kind}, as rank {rank} says it with {_CHECKS}=DETAIL"
            cases.append(DrillCase(name, problem, f"after {seconds:.1f} s" if late else ""))
    return outcome_of(cases, "rank 1, its collective and that of the others are named, and the run ends", {"ended_after_ms": worst(took)})


def mismatch(ranks: Ranks, workshop: str, output: str, kind: str) -> tuple[float, str]:
    """The seconds until this rank had an error, and its text, where rank 1 does another collective in the midst of a step."""
    ranks.leave()
    os.environ[_CHECKS] = "DETAIL"
    dist.set_debug_level_from_env()
    checked = connect(dist.FileStore(f"{output}-store", ranks.world_size), ranks.rank, ranks.world_size)
    run = tiny_training(checked, workshop, output)
    run.train_one()

    def go_astray(place: Place, _subject: object) -> None:
        if place != "reduce" or ranks.rank != 1:
            return
        group = checked.groups.world
        if kind == "shape":
            dist.all_reduce(torch.ones(7), group=group)
        elif kind == "operation":
            dist.broadcast(torch.ones(7), src=0, group=group)
        else:
            dist.barrier(group=group)

    faults.arm(go_astray)
    began = time.monotonic()
    try:
        run.train_one()
    except RuntimeError as error:
        return time.monotonic() - began, str(error)[:2000]
    return time.monotonic() - began, "no error"


def straggler(scope: Scope) -> DrillOutcome:
    """R19. All ranks wait in each layer as long as a device of theirs would compute, so that the load of the machine does not matter."""
    world, seconds = 3, 0.03
    everyone = Injected(action="sleep", place="layer", call=0, value=seconds)
    cases = []
    for slow in (1,) if scope.quick else (None, *range(world)):
        more = [] if slow is None else [Injected(action="sleep", place="layer", rank=slow, call=0, value=2 * seconds)]
        run = begin_run(scope, f"slow-{slow}", world, f"max_steps={_STEPS}", injected=[everyone, *more]).end()
        said = {int(rank) for rank in re.findall(r"straggler: rank (\d+)", run.log)}
        problem = "" if said == ({slow} - {None}) else f"named: {sorted(said)}"
        if run.status:
            problem = f"status {run.status}: {run.last_line}"
        cases.append(DrillCase("no slow rank" if slow is None else f"rank {slow} three times as slow", problem))
    return outcome_of(cases, "the first rank names the slow one, and no other, within ten steps")
