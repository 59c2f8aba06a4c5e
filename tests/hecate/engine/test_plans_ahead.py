"""The next step's plans are made while the backward pass runs, and are those that the step would have made."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.profiler import record_function

from hecate.elastic.move_experts import move_experts
from hecate.engine.engine import Engine
from hecate.engine.plans_ahead import THREAD, Answers, PlansAhead
from hecate.engine.step_plans import PlannerError
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, Plan, PlanInput
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks
from hecate.train.steps.step_profile import BEFORE, STEPS, StepProfile
from testing.ranks import run_ranks
from tests.hecate.engine.planning_ahead import plans_ahead, plans_of, steps_planned
from tests.hecate.equivalence_cases import LEARNING_RATE, WEIGHT_DECAY, Case, random_owners, sharded, step_of_rows
from tests.hecate.experts.making import HIDDEN, engine

NUM_STEPS, EVALUATED, MOVED, CHANGED = 5, 1, 2, 3
"""steps, and those after which something happens that the next one depends on"""


def _trained(rank: int, world: int, case: Case, *, disturbed: bool) -> tuple[list[Any], dict[str, torch.Tensor], list[int]]:
    """The plans, losses and norms of each step, the last parameters and moments of this rank, and the steps planned ahead and anew."""
    moe, head = sharded(case, world)
    engine = moe.engine
    optimizer = ExpertOptimizer(
        Trainables(owned_parameters(engine), moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE),
        torch.device("cpu"),
    )
    found = []
    for step in range(NUM_STEPS):
        result = step_of_rows(moe, head, optimizer, step, rank=rank, world=world, empty_rows=range(0))
        found.append([plans_of(engine.shards.plans), result.loss, result.aux_loss, result.grad_norm])
        if disturbed and step == EVALUATED:
            with engine.evaluation():
                pass
        if disturbed and step == MOVED:
            move_experts(engine, optimizer, random_owners(moe, seed=5))
        if disturbed and step == CHANGED:
            config = engine.shards.config
            engine.shards.config = replace(config, memory_slots=3, topology=replace(config.topology, inter_node=Link(2e7, 0.0)))
    return found, optimizer.state_tensors(), steps_planned(engine.shards.plans)


CASES = (
    Case("hecate_paper", 8, 2, "hot expert", rematerialize=True, checkpointing=True),
    Case("flexmoe", 8, 2, "hot expert"),  # it goes on from its last placement
    Case("auto", 3, 1, "hot expert", plan="calibrated"),
    Case("hecate_paper", 3, 1, "hot expert", plan="exact", checkpointing=True),
    Case("hecate_paper", 8, 2, "hot expert", plan="auto", rematerialize=True),
)


def _alike(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        with plans_ahead(False):
            wanted, wanted_state, counts = _trained(rank, world, case, disturbed=True)
        assert counts == [0, NUM_STEPS], f"{case}: {counts}"
        with plans_ahead(True):
            got, state, counts = _trained(rank, world, case, disturbed=True)
        for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert one == other, f"{case}, step {step}"
        assert state.keys() == wanted_state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted_state.items()), case
        # An evaluation leaves all that plans are made from; other owners, of which one rank has none, and other devices do not.
        anew = 3 if world > 1 else 2
        assert counts == [NUM_STEPS - anew, anew], f"{case}: {counts}"


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_the_same_bit_for_bit_whatever_happens_between_steps(world: int) -> None:
    run_ranks(world, _alike, CASES, timeout=400)


def _ordinary(rank: int, world: int) -> list[list[int]]:
    with plans_ahead(True):
        return [_trained(rank, world, case, disturbed=False)[2] for case in (*CASES[1:], WITHOUT_HISTORY)]


WITHOUT_HISTORY = Case("llep", 8, 2, "balanced", plan="exact", prefetch=0)


def test_in_an_ordinary_run_all_steps_but_the_first_are_planned_ahead() -> None:
    wanted = [[NUM_STEPS - 1, 1]] * (len(CASES) - 1) + [[0, 0]]  # the last case plans nothing from the history
    assert run_ranks(2, _ordinary, timeout=240) == [wanted] * 2


LAYERS = {Unit(0): 3, Unit(2): 5}


def _engine_of(planner: Any) -> Engine:
    made = engine(LAYERS)
    made.shards.config = replace(made.shards.config, planner=planner)
    return made


def _step(made: Engine, number: int, backward: Any = None) -> None:
    """A step of two tokens; `backward` is called within its backward pass."""
    step = made.begin_step(number)
    micro = step.begin_micro_step()
    total = torch.zeros((), dtype=torch.float64)
    for unit in LAYERS:
        x = torch.ones(2, HIDDEN, dtype=torch.float64, requires_grad=True)
        total = total + micro.experts(unit, x, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.float64), torch.arange(2)).sum()
    if backward is not None:
        total.register_hook(lambda _: backward())
    micro.backward(total)
    step.finish()


def in_thread() -> bool:
    return threading.current_thread().name == THREAD


def test_a_planners_error_is_raised_by_the_step_that_needs_the_plan(one_rank: dist.ProcessGroup) -> None:
    asked = []

    def planner(given: PlanInput) -> Plan:
        asked.append(in_thread())
        owner_LE = given.owner_LE + 1 if in_thread() else given.owner_LE
        return replace(POLICIES["full"](given), owner_LE=owner_LE)

    with plans_ahead(True):
        made = _engine_of(planner)
        _step(made, 0)
        with pytest.raises(PlannerError, match="its plan moves expert 0 of layer 0 from its owner, rank 0, to rank 1"):
            made.begin_step(1)
    assert asked.count(True) == 1
    assert asked[-1], "the step has not asked again"


def test_an_error_of_an_input_that_is_no_more_is_none(one_rank: dist.ProcessGroup) -> None:
    def planner(given: PlanInput) -> Plan:
        assert not in_thread()
        return POLICIES["full"](given)

    with plans_ahead(True):
        made = _engine_of(planner)
        _step(made, 0)
        made.shards.config = replace(made.shards.config, memory_slots=1)
        _step(made, 1)
        with pytest.raises(AssertionError):
            made.begin_step(2)


def test_what_keeps_the_thread_from_asking_is_raised() -> None:
    def make(answers: Answers) -> None:
        raise ZeroDivisionError("no loads")

    with pytest.raises(ZeroDivisionError, match="no loads"):
        PlansAhead(make).wait()


def test_a_thread_that_never_ends_keeps_no_process() -> None:
    """As with a lost rank, whose loads never come."""
    never = threading.Event()
    ahead = PlansAhead(lambda _: never.wait(60))
    assert not ahead.is_ready
    assert ahead._thread.daemon
    never.set()
    ahead.wait()
    assert ahead.is_ready


def test_ranks_that_rejoin_have_nothing_planned(one_rank: dist.ProcessGroup) -> None:
    with plans_ahead(True):
        made = _engine_of(POLICIES["full"])
        _step(made, 0)
        shards = made.shards
        assert shards.plans._ahead is not None
        chunks = {unit: dict(enumerate(store.parameters)) for unit, store in shards.stores.items()}
        made.rejoin(shards.config.topology, shards.groups, shards.owners, chunks)
        assert shards.plans._ahead is None
        _step(made, 1)
        assert steps_planned(shards.plans) == [0, 1]


def test_a_timeline_shows_the_next_steps_plan_within_the_backward_pass(one_rank: dist.ProcessGroup, tmp_path: Path) -> None:
    """The planner waits for the backward pass, and the backward pass for the planner, so that neither can come after the other."""
    began, came = threading.Semaphore(0), threading.Semaphore(0)

    def planner(given: PlanInput) -> Plan:
        if in_thread() and given.num_experts == LAYERS[Unit(0)]:
            began.release()
            assert came.acquire(timeout=60), "the backward pass did not begin"
        return POLICIES["full"](given)

    def backward() -> None:
        assert began.acquire(timeout=60), "nothing was planned before the backward pass"
        with record_function("in the backward pass"):
            pass
        came.release()

    ranks = mock.create_autospec(Ranks, instance=True, rank=0, world_size=1, is_first=True, device=torch.device("cpu"))
    profile = StepProfile(tmp_path, ranks, wanted=True)
    with plans_ahead(True):
        made = _engine_of(planner)
        for number in range(BEFORE + STEPS):
            with profile.step():
                _step(made, number, backward)
    assert steps_planned(made.shards.plans) == [BEFORE + STEPS - 1, 1]
    events = json.loads(gzip.decompress((tmp_path / "profile-rank-0.json.gz").read_bytes()))["traceEvents"]

    def named(name: str) -> list[dict[str, Any]]:
        return sorted((event for event in events if event.get("name") == name and event["ph"] == "X"), key=lambda event: event["ts"])

    planned, computed, waits = named("hecate: plan ahead"), named("in the backward pass"), named("hecate: wait for plan ahead")
    assert len(computed) == len(waits) == STEPS
    assert len(planned) >= STEPS - 1, "the last may not have ended when the timeline did"
    for ahead, inside, wait in zip(planned[: STEPS - 1], computed, waits[1:], strict=False):
        assert ahead["tid"] != inside["tid"]
        assert ahead["ts"] <= inside["ts"] <= ahead["ts"] + ahead["dur"]
        assert inside["ts"] <= wait["ts"], "the next step waits after the backward pass"


GIVEN = PlanInput(
    np.array([[0, 1]]),
    np.ones((1, 2, 2)),
    Topology((0, 0), (1.0, 1.0), (1e9, 1e9), Link(1.0, 0.0), Link(1.0, 0.0)),
    LayerCost(trainable_bytes=10.0),
    np.full(2, 2),
)


@pytest.mark.parametrize(
    "other",
    [
        replace(GIVEN, owner_LE=np.array([[1, 0]])),
        replace(GIVEN, loads_LED=np.full((1, 2, 2), 2.0)),
        replace(GIVEN, loads_LED=None),
        replace(GIVEN, topology=replace(GIVEN.topology, flops=(1.0, 2.0))),
        replace(GIVEN, cost=LayerCost(trainable_bytes=11.0)),
        replace(GIVEN, slots_D=np.full(2, 1)),
        replace(GIVEN, resident_LED=np.ones((1, 2, 2), dtype=bool)),
        replace(GIVEN, max_imbalance=2.0),
        replace(GIVEN, execution=replace(GIVEN.execution, prefetch=2)),
        replace(GIVEN, present_LED=np.ones((1, 2, 2), dtype=bool)),
    ],
)
def test_an_answer_is_taken_for_an_equal_input_alone(other: PlanInput) -> None:
    answers, steps = Answers(), ({Unit(0): np.ones(2)},)
    assert answers.ask((GIVEN, steps), lambda: 1) == 1
    equal = replace(GIVEN, owner_LE=GIVEN.owner_LE.copy(), topology=replace(GIVEN.topology), cost=replace(GIVEN.cost))
    assert answers.ask((equal, tuple(steps)), lambda: 2) == 1
    assert answers.ask((other, steps), lambda: 3) == 3
    assert answers.ask((equal, ({Unit(0): np.ones(2)},)), lambda: 4) == 4, "loads are those of a step only if they are its object"
    assert answers.made == 3
