"""Routing that samples bring: training with what the routers would choose anyway is plain training, and plans are made of it ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hecate.data.batches import Batch
from hecate.engine.step import MicroStep
from hecate.engine.step_plans import StepPlans
from hecate.experts.forward_pass import OrderError
from hecate.experts.pass_routing import differing, expert_counts
from hecate.experts.routers.router import Routing
from hecate.model.causal_head import LanguageModelHead
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.values.units import Unit
from hecate.report.events import StepResult
from hecate.train.extensions.replayed_routing import ReplayedRouting
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import (
    AUX_COEF,
    LEARNING_RATE,
    MAX_NORM,
    MICRO_STEPS,
    ROWS,
    WEIGHT_DECAY,
    Case,
    micro_batch,
    planner_of,
    recorded,
    rows_of,
    sharded,
)

UNITS = [Unit(0), Unit(1)]
CASE = Case("llep", 8, 2, "hot expert", plan="replay")


def trainer(case: Case, world: int) -> tuple[MoeModel, LanguageModelHead, ExpertOptimizer]:
    moe, head = sharded(case, world)
    rule, rate = AdamW(weight_decay=WEIGHT_DECAY), LearningRate(LEARNING_RATE)
    return moe, head, ExpertOptimizer(Trainables.of(moe), rule, rate, torch.device("cpu"))


def one_step(
    trained: tuple[MoeModel, LanguageModelHead, ExpertOptimizer], step: int, own: Sequence[Batch], labels: int, replay: Any
) -> StepResult:
    batches, rules = StepBatches(number=step, micro_batches=own, num_labels=labels), StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM)
    return train_step(*trained, batches, rules, [] if replay is None else [ReplayedRouting(replay, trained[0].engine.shards.device)])


def batches_of(rank: int, world: int, step: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches, the last rank's without tokens, and the label tokens of the step."""
    empty = range((world - 1) * ROWS // world, ROWS) if world > 1 else range(0)
    batches = [micro_batch(step, micro, empty) for micro in range(MICRO_STEPS)]
    return [rows_of(batch, rank, world) for batch in batches], sum(int((batch.targets != -100).sum()) for batch in batches)


@contextmanager
def noted_choices() -> Iterator[list[torch.Tensor]]:
    """What routers choose, layer after layer and micro-step after micro-step."""
    chosen: list[torch.Tensor] = []
    note = MicroStep.note_routing

    def noted(self: MicroStep, unit: Unit, routing: Routing) -> None:
        chosen.append(routing.expert_TK)
        note(self, unit, routing)

    with mock.patch.object(MicroStep, "note_routing", noted):
        yield chosen


def with_choices(own: Sequence[Batch], chosen: Sequence[torch.Tensor]) -> list[Batch]:
    """The batches with these choices, which are those of their tokens without padding."""
    found = []
    for micro, batch in enumerate(own):
        layers = chosen[micro * len(UNITS) : (micro + 1) * len(UNITS)]
        routed = torch.zeros(*batch.task.shape, len(UNITS), layers[0].shape[1], dtype=torch.int16)
        routed[batch.segment_ids > 0] = torch.stack(list(layers), dim=1).to(torch.int16)
        found.append(replace(batch, routed=routed))
    return found


def _own_choice(rank: int, world: int) -> None:
    plain = trainer(replace(CASE, plan="history"), world)
    replayed = {name: trainer(case, world) for name, case in {"force": CASE, "check": replace(CASE, rematerialize=True)}.items()}
    for step in range(3):
        own, labels = batches_of(rank, world, step)
        with noted_choices() as chosen:
            wanted = one_step(plain, step, own, labels, None)
        known = with_choices(own, chosen)
        for replay, trained in replayed.items():
            got = one_step(trained, step, known, labels, replay)
            assert (got.loss, got.grad_norm, got.aux_loss) == pytest.approx((wanted.loss, wanted.grad_norm, wanted.aux_loss), rel=1e-10)
            assert got.differing == (0 if replay == "check" else None), "the router would choose the same again"
            tensors = trained[2].state_tensors()
            for name, tensor in plain[2].state_tensors().items():
                torch.testing.assert_close(tensors[name], tensor, rtol=1e-10, atol=1e-10, msg=f"{replay}, {name} after step {step}")


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_replaying_the_routers_own_choice_is_plain_training(world: int) -> None:
    run_ranks(world, _own_choice, timeout=240)


def _ahead(rank: int, world: int) -> None:
    asked: list[PlanInput] = []
    ahead: list[dict[Unit, np.ndarray]] = []
    plan_ahead = StepPlans.ahead

    def planner(given: PlanInput) -> Plan:
        asked.append(given)
        return planner_of("llep")(given)

    def noted(self: StepPlans, loads: dict[Unit, np.ndarray]) -> None:
        ahead.append(loads)
        plan_ahead(self, loads)

    trained = trainer(CASE, world)
    shards = trained[0].engine.shards
    shards.config = replace(shards.config, planner=planner)
    for step in range(2):
        own, labels = batches_of(rank, world, step)
        with mock.patch.object(StepPlans, "ahead", noted):
            result = one_step(trained, step, [recorded(batch, 8, 2) for batch in own], labels, "force")
        assert len(ahead) == len(asked) == MICRO_STEPS, "one plan of all layers in each micro-step, and none after a router"
        for unit, loads_ED in result.loads.items():
            assert loads_ED.sum() > 0
            assert np.array_equal(sum(loads[unit] for loads in ahead), loads_ED), "what was planned for is what came"
        for loads, given in zip(ahead, asked, strict=True):
            assert given.loads_LED is not None
            assert np.array_equal(given.loads_LED, np.stack([loads[unit] for unit in UNITS]))
        # Another layer's loads, or another micro-step's, would be others.
        assert not np.array_equal(ahead[0][UNITS[0]], ahead[1][UNITS[0]])
        ahead.clear()
        asked.clear()


@pytest.mark.parametrize("world", [1, 2])
def test_loads_that_are_planned_for_ahead_are_those_that_come(world: int) -> None:
    run_ranks(world, _ahead, timeout=120)


def test_only_experts_that_are_none_of_the_known_ones_differ() -> None:
    known = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert int(differing(torch.tensor([[1, 0], [2, 9], [8, 9]]), known)) == 3
    assert expert_counts(known[:2], 5).tolist() == [1, 1, 1, 1, 0]


def _checked(rank: int, world: int) -> None:
    trained = trainer(replace(CASE, plan="history"), world)
    own, labels = batches_of(rank, world, 0)
    with noted_choices() as chosen:
        one_step(trained, 0, own, labels, None)
    first = chosen[0].clone()
    if rank == 0:
        first[:3, 1] = (first[:3].sum(1) + 1) % 8  # another expert in the place of three tokens' second one
        first[:3, 1] = torch.where(first[:3, 1] == first[:3, 0], (first[:3, 1] + 1) % 8, first[:3, 1])
    moved = int((first[:, 1] != chosen[0][:, 1]).sum())
    turned = [first.flip(1), *chosen[1:]]  # the order of a token's experts does not matter
    again = one_step(trainer(CASE, world), 0, with_choices(own, turned), labels, "check")
    total = torch.tensor([moved])
    torch.distributed.all_reduce(total)
    assert 0 < int(total) <= 3
    assert again.differing == int(total)


def test_in_check_mode_the_assignments_of_all_ranks_that_differ_are_counted() -> None:
    run_ranks(2, _checked, timeout=120)


def _unknown(rank: int, world: int) -> str:
    moe, _ = sharded(CASE, world)
    with pytest.raises(OrderError) as error:
        moe.engine.begin_step(0, 1).begin_micro_step()
    return str(error.value)


def test_a_micro_step_that_brings_no_routing_is_not_planned_ahead() -> None:
    (text,) = run_ranks(1, _unknown)
    assert "plans each micro-step from the routing of its tokens, but they bring none" in text
