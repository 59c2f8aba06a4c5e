"""Ranks that are lost in the midst of a run under the local launcher: R1, R2, R3, R12, R24."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from hecate.drill.armed import Injected
from hecate.drill.outcome import Case, Outcome, Scope, outcome_of, worst
from hecate.drill.ranks import TOLERANCE, Launched, begin_run, difference, loss_difference
from hecate.drill.tiny_run import STEPS
from hecate.faults import Place

PHASES: dict[str, tuple[Place, int]] = {
    "forward": ("experts", 2),
    "backward": ("backward", 2),
    "reduce": ("reduce", 1),
    "norm": ("norm", 1),
    "optimizer": ("optimizer", 1),
    "stepped": ("stepped", 1),
}
"""name -> the place, and at which of its calls in the step; twice a step runs through two layers"""
RANKS = 4
_NOTICED, _RECOVERED, _EVICTED = 250.0, 1000.0, 3000.0
"""ms, for the median of the cases"""


def kill_any_rank(scope: Scope) -> Outcome:
    """R1"""
    whole = begin_run(scope, "whole", RANKS).end()
    assert whole.status == 0, whole.log
    steps = (2,) if scope.quick else (1, 2, 4)
    wanted = [(1, "backward"), (0, "optimizer"), (3, "norm")] if scope.quick else [(rank, phase) for phase in PHASES for rank in range(RANKS)]
    cases, noticed, recovered, resumed = [], [], [], []
    for step in steps:
        for rank, phase in wanted:
            place, call = PHASES[phase]
            run = begin_run(scope, "killed", RANKS, injected=[Injected(action="kill", place=place, call=call, rank=rank, step=step)]).end()
            name = f"rank {rank}, step {step}, {phase}"
            problem = _problem(run, whole, lost=[rank])
            cases.append(Case(name, problem))
            if not problem:
                killed = run.when("kill")[0]
                noticed.append(1000 * (worst(run.when("lost")) - killed))
                recovered.append(1000 * (worst(run.when("regrouped")) - killed))
                resumed.append(1000 * (min(t for t in run.when("stepped") if t > killed + recovered[-1] / 1000) - killed))
    counts = {
        "noticed_ms": _median(noticed),
        "noticed_worst_ms": worst(noticed),
        "recovered_ms": _median(recovered),
        "recovered_worst_ms": worst(recovered),
        "next_step_ms": _median(resumed),
    }
    cases += _timely(scope, {"noticed": (counts["noticed_ms"], _NOTICED), "recovered": (counts["recovered_ms"], _RECOVERED)})
    return outcome_of(cases, f"{RANKS - 1} ranks go on, 0 steps lost, results within {TOLERANCE:g} of the undisturbed run", counts)


def _problem(run: Launched, whole: Launched, lost: Sequence[int]) -> str:
    """What is wrong with a run that has lost ranks and went on with all steps; empty: nothing."""
    if run.status:
        return f"ended with status {run.status}: {_last_line(run.log)}"
    if len(run.when("kill")) + len(run.when("stop")) != len(lost):
        return f"{len(run.when('kill'))} ranks were killed, not {len(lost)}"
    if "back at the last checkpoint" in run.log:
        return "it went back to a checkpoint"
    if (off := loss_difference(run.losses, whole.losses)) > TOLERANCE:
        return f"losses or norms are off by {off:.2g}"
    if (off := difference(run.tensors, whole.tensors)) > TOLERANCE:
        return f"parameters or moments are off by {off:.2g}"
    return ""


def _timely(scope: Scope, limits: dict[str, tuple[float, float]]) -> list[Case]:
    """A case for each time in ms and its limit. In the short form no times are judged."""
    if scope.quick:
        return []
    return [Case(f"{what} in {limit:.0f} ms", "" if took <= limit else f"took {took:.0f} ms") for what, (took, limit) in limits.items()]


def _median(values: Sequence[float]) -> float:
    return float(median(values)) if values else 0.0


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1][:200]
