"""Numbers that go wrong, and routers that send all tokens one way: R13, R14, R15."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hecate import faults
from hecate.apps.check.drill.armed import Action, Armed, Injected
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import call_on_ranks
from hecate.apps.check.drill.tiny_training import Held, tiny_training
from hecate.faults import Place
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training

_BROKEN: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_POISONED: tuple[Place, ...] = ("loss", "router", "experts", "gradients")
_SOUND = ("router", "-inf")
"""a logit of -inf is an expert that a token never goes to; all that follows is finite"""


def poisoned(scope: Scope) -> DrillOutcome:
    """R13"""
    world = 2 if scope.quick else 4
    values = ["nan"] if scope.quick else list(_BROKEN)
    pairs = [(place, value) for place in _POISONED for value in values if (place, value) != _SOUND]
    wanted = [[place, value, rank] for place, value in pairs for rank in ((1,) if scope.quick else range(world))]
    told = call_on_ranks(scope, world, poison, scope.workshop, str(scope.path / "out"), wanted, timeout=300)
    cases = []
    for number, (place, value, rank) in enumerate(wanted):
        problems = [f"rank {where}: {found[number]}" for where, found in enumerate(told) if found[number]]
        cases.append(DrillCase(f"{value} at {place} of rank {rank}", "; ".join(problems)))
    (stopped,) = {text for (text,) in call_on_ranks(scope, world, too_many, scope.workshop, str(scope.path / "many"), timeout=300)}
    cases.append(DrillCase("ten in a row", "" if "the last 10 steps" in stopped else f"the run did not stop: {stopped}"))
    return outcome_of(cases, "skipped by all ranks, every bit of the state unchanged, counted; the next step trains", {"world_size": world})


def poison(ranks: Ranks, workshop: str, output: str, wanted: list[list[Any]]) -> list[str]:
    """What is wrong on this rank with a step in which a number of one rank is not finite, for each case."""
    run = tiny_training(ranks, workshop, output, "fssdp.redundancy=1", "max_steps=1000")
    run.train_one()
    problems = []
    for place, value, rank in wanted:
        before, skipped = Held.by(run.parts.optimizer), run.run_state.skipped
        fault = Injected(action="fill", place=place, rank=rank, value=_BROKEN[value])
        result = armed_step(run, ranks, fault)
        changed = before.changed(Held.by(run.parts.optimizer))
        problem = ""
        if changed:
            problem = f"{len(changed)} tensors have changed, such as {changed[0]}"
        if not result.skipped or run.run_state.skipped != skipped + 1:
            problem = f"the step was not skipped (norm {result.grad_norm}, loss {result.loss})"
        sound = run.train_one().result
        if not problem and (sound.skipped or not math.isfinite(sound.loss) or not before.changed(Held.by(run.parts.optimizer))):
            problem = "the next step does not train"
        problems.append(problem)
    return problems


def too_many(ranks: Ranks, workshop: str, output: str) -> list[str]:
    """What the run says when no step has finite gradients."""
    run = tiny_training(ranks, workshop, output)
    for _ in range(20):
        result = armed_step(run, ranks, Injected(action="fill", place="router", rank=0, call=0, value=math.nan))
        if run.skipped_too_often:
            return [str(run.too_many_skipped(result)).splitlines()[0]]
    return ["20 steps were skipped"]


def armed_step(run: Training, ranks: Ranks, *injected: Injected) -> Any:
    """The result of one step with faults in it."""
    faults.arm(Armed(injected, ranks.rank))
    try:
        return run.train_one().result
    finally:
        faults.arm(None)


SPIKES: dict[str, tuple[Place, Action, float]] = {
    "none": ("experts", "scale", 1.0),
    "hidden states times 1e3": ("experts", "scale", 1e3),
    "hidden states times 1e60": ("experts", "scale", 1e60),
    "hidden states times 1e200": ("experts", "scale", 1e200),
    "logits times 1e6": ("router", "scale", 1e6),
}


def spiked(scope: Scope) -> DrillOutcome:
    """R14"""
    sizes = (1, 3) if scope.quick else (1, 2, 3, 4)
    told = {}
    for size in sizes:
        told[size] = call_on_ranks(scope, size, spike, scope.workshop, str(scope.path / f"on-{size}"), timeout=300)
    cases = []
    for number, name in enumerate(SPIKES):
        decisions = {size: [rank[number][:2] for rank in told[size]] for size in sizes}
        same = {str(one) for of_size in decisions.values() for one in of_size}
        cases.append(DrillCase(name, "" if len(same) == 1 else f"(skipped, clipped) by number of ranks: {decisions}"))
    kinds = [told[sizes[0]][0][number][:2] for number in range(len(SPIKES))]
    counts = {"skipped": sum(one[0] for one in kinds), "clipped": sum(one[1] for one in kinds)}
    missing = [name for name, count in counts.items() if not count]
    cases.append(DrillCase("there are skipped and clipped steps", f"none was {missing[0]}" if missing else ""))
    return outcome_of(cases, f"the same steps are skipped and clipped on {', '.join(map(str, sizes))} ranks", counts)


def spike(ranks: Ranks, workshop: str, output: str) -> list[list[Any]]:
    """(skipped, clipped, norm) of a step for each spike."""
    found = []
    run = tiny_training(ranks, workshop, output, "max_steps=1000")
    # As many on every number of ranks.
    run.parts.stream.sequences_per_step = 12 * run.parts.config.gradient_accumulation_steps
    run.plan_for(run.parts.moe.engine.shards.config.topology)
    for place, action, value in SPIKES.values():
        result = armed_step(run, ranks, Injected(action=action, place=place, call=0, value=value))
        limit = run.parts.config.max_grad_norm
        clipped = math.isfinite(result.grad_norm) and limit is not None and result.grad_norm > limit
        found.append([result.skipped, clipped, repr(result.grad_norm)])
    return found


EXTREMES: dict[str, tuple[str, ...]] = {
    "paper's policy": (),
    "expert parallelism": ("fssdp.policy=static_ep",),
    "all experts everywhere": ("fssdp.policy=full",),
    "no slot for replicas": ("fssdp.memory_slots=0",),
    "one slot": ("fssdp.memory_slots=1",),
    "planned after the router": ("fssdp.plan=exact",),
    "fewer experts than ranks": ("moe.num_experts=2",),
    "one expert a token": ("moe.top_k=1",),
    "every token to every expert": ("moe.top_k=5",),
}


def one_way(scope: Scope) -> DrillOutcome:
    """R15"""
    world = 3
    chosen = ["all experts everywhere", "one slot"] if scope.quick else list(EXTREMES)
    cases, most = [], 0
    for number, name in enumerate(chosen):
        told = call_on_ranks(scope, world, all_to_one, scope.workshop, str(scope.path / f"out-{number}"), *EXTREMES[name], timeout=300)
        problem = next((text for text, _ in told if text), "")
        cases.append(DrillCase(name, problem))
        most = max(most, *(foreign for _, foreign in told))
    return outcome_of(cases, "finite; no more replicas than slots; idle experts bitwise unchanged", {"most_replicas": most})


def all_to_one(ranks: Ranks, workshop: str, output: str, *overrides: str) -> tuple[str, int]:
    """What is wrong on this rank with steps whose tokens all go to one expert first, then to another; and the most replicas of a layer."""
    run = tiny_training(ranks, workshop, output, "deterministic=false", *overrides)  # with it every rank has all experts
    shards = run.parts.moe.engine.shards
    slots = run.parts.config.fssdp.memory_slots
    most = 0
    for step, expert in enumerate((0, 0, 1, 1)):
        before = Held.by(run.parts.optimizer)
        result = armed_step(run, ranks, Injected(action="one_expert", place="router", call=0, value=expert))
        after = Held.by(run.parts.optimizer)
        if result.skipped or not math.isfinite(result.loss + result.grad_norm):
            return f"step {step}: loss {result.loss}, norm {result.grad_norm}", most
        for unit, loads_ED in result.loads.items():
            load_E = loads_ED.sum(1)
            if load_E.argmax() != expert and load_E[expert] != load_E.max():
                return f"step {step}: the fault did not reach layer {unit}", most
            idle = np.flatnonzero((load_E == 0) & (shards.owners[unit] == shards.rank))
            moved = [name for name in before.changed(after) for e in idle if name.startswith(f"owned/{unit}.{e}")]
            if moved:
                return f"step {step}: {moved[0]} has changed, but no token reached it", most
            placement = shards.placements[unit]
            foreign = len(placement.experts_on(shards.rank)) - len(placement.owned_by(shards.rank))
            most = max(most, foreign)
            if slots is not None and foreign > slots:
                return f"step {step}: {foreign} replicas in {slots} slots", most
    return "", most
