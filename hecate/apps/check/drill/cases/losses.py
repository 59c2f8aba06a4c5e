"""Ranks that are lost in the midst of a run: R1, R2, R3, R12, R24."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from statistics import median

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.launchers import Launcher
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of, worst
from hecate.apps.check.drill.ranks import TOLERANCE, Launched, Started, begin_run, difference, loss_difference
from hecate.apps.check.drill.tiny_run import STEPS, save_random_moe
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
_AROUND: tuple[tuple[str, int, Place, int, int], ...] = (
    ("before the ranks have met", 1, "begin", 1, -1),
    ("when it has loaded", 2, "loaded", 1, -1),
    ("in the evaluation before the first step", 0, "evaluate", 1, -1),
    ("before the adapter is written", 0, "output", 1, STEPS - 1),
    ("when the adapter is written", 1, "output", 2, STEPS - 1),
)
"""before the first step and after the last: name, rank, place, call, step"""
_TWO_NODES = """\
nodes: [{devices: 2, flops: 3e9, memory: 3e9}, {devices: 2, flops: 3e9, memory: 3e9}]
intra_node: {bandwidth: 1e9, latency: 1e-5}
inter_node: {bandwidth: 1e8, latency: 1e-4}
"""
RANKS = 4
_NOTICED, _RECOVERED, _EVICTED = 250.0, 1000.0, 3000.0
"""ms, for the median of the cases"""


def kill_any_rank(scope: Scope) -> DrillOutcome:
    """R1"""
    whole = begin_run(scope, "whole", RANKS).end()
    assert whole.status == 0, whole.log
    steps = (2,) if scope.quick else (1, 2, 4)
    some = [(1, "backward"), (0, "optimizer")]
    wanted = some if scope.quick else [(rank, phase) for phase in PHASES for rank in range(RANKS)]
    cases, times = [], Times()
    for step in steps:
        for rank, phase in wanted:
            place, call = PHASES[phase]
            fault = Injected(action="kill", place=place, call=call, rank=rank, step=step)
            run = begin_run(scope, "killed", RANKS, injected=[fault]).end()
            cases.append(DrillCase(f"rank {rank}, step {step}, {phase}", problem := problem_of(run, whole, lost=1)))
            times.add(run, [] if problem else run.when("kill"))
    evaluating = (f"data.eval={scope.workshop}/up.eval.jsonl", "eval.on_start=true")
    for name, rank, place, call, step in _AROUND[1:2] if scope.quick else _AROUND:
        fault = Injected(action="kill", place=place, call=call, rank=rank, step=step)
        run = begin_run(scope, "around", RANKS, *(evaluating if place == "evaluate" else ()), injected=[fault]).end()
        problem = problem_of(run, whole, lost=1) or ("" if (run.output / "adapter").is_dir() else "no adapter was left")
        cases.append(DrillCase(f"rank {rank}, {name}", problem))
    for rank, phase in () if scope.quick else [(0, "backward"), (1, "reduce"), (2, "optimizer"), (3, "stepped")]:
        place, call = PHASES[phase]
        fault = Injected(action="kill", place=place, call=call, rank=rank, step=2)
        run = begin_run(scope, "groups", RANKS, "fssdp.shard_size=2", injected=[fault]).end()
        cases.append(DrillCase(f"rank {rank} of two sharding groups, {phase}", problem := problem_of(run, whole, lost=1)))
        times.add(run, [] if problem else run.when("kill"))
    cases += [] if scope.quick else _of_sharded_layers(scope)
    for rank, call in () if scope.quick else ((1, 1), (1, 5), (0, 3), (0, 60), (0, 110)):
        fault = Injected(action="kill", place="file", call=call, rank=rank, step=2)
        run = begin_run(scope, "saving", RANKS, "save_steps=3", injected=[fault]).end()
        cases.append(DrillCase(f"rank {rank}, operation {call} of a save", problem := problem_of(run, whole, lost=1)))
        times.add(run, [] if problem else run.when("kill"))
    cases += [] if scope.quick else _of_hecate_launch(scope, whole)
    cases += times.judged(scope)
    return outcome_of(cases, f"{RANKS - 1} ranks go on, 0 steps lost, results within {TOLERANCE:g} of the undisturbed run", times.counts())


def _of_sharded_layers(scope: Scope) -> list[DrillCase]:
    """Of an MoE model whose decoder layers are sharded, too."""
    save_random_moe(scope.path / "moe")
    given = (f"model.name_or_path={scope.path}/moe", "moe.family=moe_lora", "moe.train_router=true", "model.shard_non_experts=true")
    whole = begin_run(scope, "whole-sharded", RANKS, *given).end()
    assert whole.status == 0, whole.log
    cases = []
    for dying in ([(0, "backward")], [(3, "optimizer")], [(1, "norm"), (2, "backward")]):
        deaths = [
            Injected(action="kill", place=PHASES[phase][0], call=PHASES[phase][1], rank=rank, step=2 + number)
            for number, (rank, phase) in enumerate(dying)
        ]
        run = begin_run(scope, "sharded", RANKS, *given, injected=deaths).end()
        names = " and ".join(f"rank {rank}, {phase}" for rank, phase in dying)
        cases.append(DrillCase(f"sharded layers, {names}", problem_of(run, whole, lost=len(dying))))
    return cases


def _of_hecate_launch(scope: Scope, whole: Launched) -> list[DrillCase]:
    """On one node, and on two: a rank of the node that leads, one of the other, and both of the other at once."""
    (scope.path / "two.yaml").write_text(_TWO_NODES, encoding="utf-8")
    dying: list[tuple[Launcher, dict[int, str]]] = [
        ("node", {2: "norm"}),
        ("two_nodes", {0: "optimizer"}),
        ("two_nodes", {3: "backward"}),
        ("two_nodes", {2: "reduce", 3: "reduce"}),
    ]
    cases = []
    for launcher, phases in dying:
        deaths = [
            Injected(action="kill", place=PHASES[phase][0], call=PHASES[phase][1], rank=rank, step=2) for rank, phase in phases.items()
        ]
        # Backups are on the other node, so that they outlive a node.
        given = (f"topology={scope.path}/two.yaml",) if len(deaths) > 1 else ()
        run = begin_run(scope, launcher, RANKS, *given, injected=deaths, started=Started(launcher)).end()
        names = " and ".join(f"rank {rank}, {phase}" for rank, phase in phases.items())
        cases.append(DrillCase(f"hecate launch, {launcher.replace('_', ' ')}: {names}", problem_of(run, whole, lost=len(deaths))))
    return cases


def two_deaths(scope: Scope) -> DrillOutcome:
    """R2. The backups of rank r are on rank r + 1; with two backups on rank r + 2, too."""
    whole = begin_run(scope, "whole", RANKS).end()
    times, cases = Times(), []

    def dying(rank: int, step: int, place: Place = "norm") -> Injected:
        return Injected(action="kill", place=place, rank=rank, step=step)

    survived = {
        "at once, not neighbours": [dying(0, 2), dying(2, 2)],
        "the second while the others regroup": [dying(1, 2), dying(3, 2, "lost")],
        "one after the other": [dying(1, 1), dying(2, 3)],
        "one after the other, down to one rank": [dying(1, 1), dying(2, 2), dying(3, 3)],
    }
    for first, second in ((1, 3), (3, 1)):
        for call, at in enumerate(("before", "after the first group", "after all groups", "at the end"), start=1):
            dies = Injected(action="kill", place="connect", call=call, rank=second, step=2)
            survived[f"rank {first}, and rank {second} while the others connect: {at}"] = [dying(first, 2), dies]
    for name, deaths in list(survived.items())[: 1 if scope.quick else None]:
        run = begin_run(scope, "two", RANKS, injected=deaths).end()
        cases.append(DrillCase(name, problem := problem_of(run, whole, lost=len(deaths))))
        times.add(run, [] if problem else run.when("kill")[-1:])
    neighbours = [dying(1, 3), dying(2, 3)]
    if not scope.quick:
        for name, deaths in {"neighbours": neighbours, "rank 0 and the last": [dying(0, 2), dying(3, 2)]}.items():
            run = begin_run(scope, "three", RANKS, "fssdp.redundancy=2", injected=deaths).end()
            cases.append(DrillCase(f"at once, {name}, with two backups", problem_of(run, whole, lost=2)))
    run = begin_run(scope, "back", RANKS, "save_steps=2", injected=neighbours).end()
    cases.append(DrillCase("at once, neighbours, with a checkpoint", _fell_back(run, whole)))
    run = begin_run(scope, "nothing", RANKS, injected=neighbours).end()
    names_lost = "only copy of expert" in run.log and "save_steps" in run.log
    problem = "" if run.status == 2 and names_lost else f"status {run.status}: {run.last_line}"
    cases.append(DrillCase("at once, neighbours, without a checkpoint", problem))
    return outcome_of(cases, "goes on while each expert has a copy; else names the lost experts and goes back, or ends", times.counts())


def _fell_back(run: Launched, whole: Launched) -> str:
    if run.status:
        return f"ended with status {run.status}: {run.last_line}"
    if "because no copy is left of expert" not in run.log:
        return "the lost experts were not named"
    off = max(loss_difference(run.losses, whole.losses), difference(run.tensors, whole.tensors))
    return "" if off <= TOLERANCE else f"the result is off by {off:.2g}"


def stopped_rank(scope: Scope) -> DrillOutcome:
    """R3"""
    whole = begin_run(scope, "whole", RANKS).end()
    cases, evicted = [], []
    for rank in (2,) if scope.quick else range(RANKS):
        fault = Injected(action="stop", place="backward", rank=rank, step=2)
        run = begin_run(scope, "stopped", RANKS, injected=[fault]).end()
        problem = problem_of(run, whole, lost=1) or ("" if f"rank {rank} has been stopped" in run.log else "the rank was not named")
        cases.append(DrillCase(f"rank {rank}", problem))
        if not problem:
            evicted.append(1000 * (worst(run.when("lost")) - run.when("stop")[0]))
    if not scope.quick:
        fault = Injected(action="stop", place="backward", rank=2, step=2)
        run = begin_run(
            scope, "again", RANKS, "save_steps=1", injected=[fault], survives=False, started=Started("node_again", restarts=1)
        ).end()
        problem = "" if "rank 2 has been stopped" in run.log else f"the rank was not named: {run.last_line}"
        if not problem and (run.status or difference(run.tensors, whole.tensors) > TOLERANCE):
            problem = f"status {run.status}, or another result than the undisturbed run"
        cases.append(DrillCase("rank 2 under hecate launch, where all start again", problem))
        run = begin_run(scope, "two-nodes", RANKS, injected=[fault], started=Started("two_nodes")).end()
        problem = problem_of(run, whole, lost=1) or ("" if "rank 2 has been stopped" in run.log else "the rank was not named")
        cases.append(DrillCase("rank 2, on the second of two nodes", problem))
        if not problem:
            evicted.append(1000 * (worst(run.when("lost")) - run.when("stop")[0]))
    if not scope.quick and importlib.util.find_spec("ray") is not None:
        fault = Injected(action="stop", place="backward", rank=2, step=2)
        run = begin_run(scope, "ray", RANKS, injected=[fault], started=Started("ray")).end()
        problem = problem_of(run, whole, lost=1) or ("" if "(rank 2): the worker was stopped" in run.log else "the rank was not named")
        cases.append(DrillCase("rank 2 on Ray", problem))
        if not problem:
            evicted.append(1000 * (worst(run.when("lost")) - run.when("stop")[0]))
    counts = {"evicted_ms": _median(evicted), "evicted_worst_ms": worst(evicted)}
    if not scope.quick:
        cases.append(timely("evicted", counts["evicted_ms"], _EVICTED))
    return outcome_of(cases, "the launcher names the stopped rank and ends it; the others go on without losing a step", counts)


def each_sample_once(scope: Scope) -> DrillOutcome:
    """R12. One source of 120 samples, 8 a step: 15 steps an epoch."""
    epochs, an_epoch, samples = (1 if scope.quick else 3), 15, 120
    given = (
        f"data.train={scope.workshop}/up.train.jsonl",
        "data.packing=false",
        f"max_steps={epochs * an_epoch}",
    )
    kills = [(1, 7, "backward"), (3, 20, "optimizer"), (0, 33, "forward")][:epochs]
    deaths = [Injected(action="kill", place=PHASES[phase][0], call=PHASES[phase][1], rank=rank, step=step) for rank, step, phase in kills]
    run = begin_run(scope, "epochs", RANKS, *given, injected=deaths).end(240)
    assert run.status == 0, run.log
    assert len(run.when("kill")) == len(kills), run.log
    by_step: dict[int, list[list[int]]] = {}
    cases = []
    for one in run.trace:
        if one["what"] == "trained" and by_step.setdefault(one["step"], one["more"]) != one["more"]:
            cases.append(DrillCase(f"step {one['step']}", "ranks trained on different samples"))
    for epoch in range(epochs):
        steps = [by_step.get(step, []) for step in range(epoch * an_epoch, (epoch + 1) * an_epoch)]
        seen = Counter(sample for step in steps for _, sample in step)
        for sample in range(samples):
            cases.append(DrillCase(f"epoch {epoch + 1}, sample {sample}", "" if seen[sample] == 1 else f"trained {seen[sample]} times"))
    return outcome_of(cases, f"{len(kills)} ranks killed in {epochs} epochs", {"kills": len(kills), "steps": len(by_step)})


def no_rank_is_special(scope: Scope) -> DrillOutcome:
    """R24"""
    whole = begin_run(scope, "whole", RANKS).end()
    chains = {"rank 0 dies": [0], "each first rank dies in turn": [0, 1, 2]}
    cases = []
    for name, dying in list(chains.items())[: 1 if scope.quick else None]:
        deaths = [Injected(action="kill", place="backward", rank=rank, step=1 + at) for at, rank in enumerate(dying)]
        run = begin_run(scope, "first", RANKS, injected=deaths).end()
        problem = problem_of(run, whole, lost=len(dying))
        if not problem and set(run.losses) != set(whole.losses):
            problem = f"metrics.jsonl has steps {sorted(run.losses)}"
        if not problem and not (run.output / "adapter").is_dir():
            problem = "no adapter was left"
        cases.append(DrillCase(name, problem))
    return outcome_of(cases, "the next rank reports, saves and exports; metrics.jsonl has every step once")


class Times:
    """How long it took to notice losses and to go on, over several runs, in ms."""

    def __init__(self) -> None:
        self._noticed: list[float] = []
        self._recovered: list[float] = []
        self._next: list[float] = []

    def add(self, run: Launched, killed: Sequence[float]) -> None:
        """Count a run by the moment of its last kill; none: not at all."""
        if not killed:
            return
        lost, back = ([t for t in run.when(what) if t > killed[-1]] for what in ("lost", "regrouped"))
        if not lost or not back:  # all steps were done
            return
        self._noticed.append(1000 * (worst(lost) - killed[-1]))
        self._recovered.append(1000 * (worst(back) - killed[-1]))
        self._next += [1000 * (min(after) - killed[-1]) for after in [[t for t in run.when("stepped") if t > worst(back)]] if after]

    def counts(self) -> dict[str, float]:
        named = {"noticed": self._noticed, "recovered": self._recovered}
        found = {f"{name}_ms": _median(values) for name, values in named.items()}
        return found | {f"{name}_worst_ms": worst(values) for name, values in named.items()} | {"next_step_ms": _median(self._next)}

    def judged(self, scope: Scope) -> list[DrillCase]:
        """A case for each limit. In the short form no times are judged."""
        if scope.quick:
            return []
        return [timely("noticed", _median(self._noticed), _NOTICED), timely("recovered", _median(self._recovered), _RECOVERED)]


def timely(what: str, took: float, limit: float) -> DrillCase:
    return DrillCase(f"{what} in {limit:.0f} ms", too_slow="" if took <= limit else f"took {took:.0f} ms")


def problem_of(run: Launched, whole: Launched, lost: int) -> str:
    """What is wrong with a run that has lost so many ranks and went on with all steps; empty: nothing."""
    if run.status:
        return f"ended with status {run.status}: {run.last_line}"
    if len(run.when("kill")) + len(run.when("stop")) != lost:
        return f"{len(run.when('kill'))} ranks were killed, not {lost}"
    if "back at the last checkpoint" in run.log:
        return "it went back to a checkpoint"
    if len(run.losses) < len(whole.losses) - lost:  # a rank that reports may have died before it had reported its step
        return f"metrics.jsonl has steps {sorted(run.losses)}"
    if (off := loss_difference(run.losses, {step: whole.losses[step] for step in run.losses})) > TOLERANCE:
        return f"losses or norms are off by {off:.2g}"
    if (off := difference(run.tensors, whole.tensors)) > TOLERANCE:
        return f"parameters or moments are off by {off:.2g}"
    return ""


def _median(values: Sequence[float]) -> float:
    return float(median(values)) if values else 0.0
