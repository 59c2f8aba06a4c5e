"""A layer's frozen parts are fetched once a placement, whatever object says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hecate.engine.step_plans import EngineConfig, StepPlans
from hecate.experts.family import Site
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.transfer.residency import FrozenMove
from hecate.parallel.transfer.transfer_plan import plan_chunks
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.loads import LoadHistory
from hecate.parallel.values.units import Unit
from testing.unit_cases import unit_topology

LAYER = Unit(0)
OWNERS = np.array([0, 1, 1])


def everything_on_rank_1(given: PlanInput) -> Plan:
    where_LED = given.owner_LE[:, :, None] == np.arange(given.world_size)
    where_LED[:, :, 1] = True
    return Plan(given.owner_LE, where_LED, None)


def plans(slots: int) -> StepPlans:
    """Of one layer over a frozen base on two ranks, as rank 1 holds them."""
    shape = FfnShape(hidden=4, ffn=6, activation="silu")
    site = Site(LAYER, len(OWNERS), shape, 0, torch.float64, torch.float64, torch.device("cpu"))
    pairs = PlainPairs(LoraShape(rank=1, scale=1.0, dropout=0.0), ("gate_proj",), FfnSizes(shape.hidden, shape.ffn))
    family = MoeLoraExperts(site, lambda _: torch.zeros(shape.numel, dtype=torch.float64), pairs)
    config = EngineConfig(everything_on_rank_1, unit_topology([0, 0]), memory_slots=slots)
    return StepPlans({LAYER: family}, config, {LAYER: OWNERS.copy()}, LoadHistory(1), make_mesh(2, 2), 0, 1)


def experts_moved(move: FrozenMove) -> tuple[list[int], list[int]]:
    """Experts that this rank sends, and that it receives."""
    assert move.exchange is not None
    return sorted(move.exchange.sent.expert_M.tolist()), sorted(move.exchange.received.expert_M.tolist())


def test_an_equal_placement_in_a_new_object_moves_nothing() -> None:
    step_plans = plans(slots=1)
    moves = []
    for _ in range(3):
        step_plans.begin(0, micro_steps=1)
        moves.append(step_plans.fetch_frozen(LAYER))
        plan_chunks.cache_clear()  # which else returns the same placement for an equal one
    first, *others = moves
    assert first is not None
    assert experts_moved(first) == ([], [0])
    assert others == [None, None], "the placement was taken for another one"
    assert step_plans.residency[LAYER].clock == 1


def test_what_is_borrowed_is_returned_and_fetched_anew() -> None:
    """Without a slot, what an evaluation needs of others is given up after it."""
    step_plans = plans(slots=0)
    step_plans.place_for_evaluation(on_owners=False)
    borrowed = step_plans.borrow_frozen(LAYER)
    assert experts_moved(borrowed) == ([1, 2], [0])
    assert borrowed.copies == 3, "rank 1 lacks one expert and rank 0 two"
    assert step_plans.fetch_frozen(LAYER) is None
    assert step_plans.return_frozen(LAYER).dropped == (0,)
    again = step_plans.fetch_frozen(LAYER)
    assert again is not None, "the placement is the same, but what it needs was given up"
    assert again.copies == 3


def test_other_owners_fetch_what_they_lack() -> None:
    step_plans = plans(slots=1)
    move = step_plans.change_owners(LAYER, np.array([1, 0, 1]))
    assert move is not None
    assert (move.copies, experts_moved(move)) == (2, ([1], [0]))
    assert move.dropped == (), "what left its owner has a slot"
    step_plans.begin(0, micro_steps=1)
    fetched = step_plans.fetch_frozen(LAYER)
    assert fetched is not None
    assert fetched.copies == 0, "rank 1 holds all it needs"
    step_plans.change_owners(LAYER, np.array([0, 0, 0]))
    step_plans.change_owners(LAYER, np.array([1, 0, 1]))
    step_plans.begin(0, micro_steps=1)
    assert step_plans.fetch_frozen(LAYER) is not None, "the placement is that of before, but what is held is not"


def test_slots_follow_memory_where_no_number_is_given() -> None:
    """Two sharding groups of two ranks: each rank of a group counts on what there is room for in every group."""
    by_memory = {2: np.array([1, 0]), 4: np.array([5, 2, 2, 9])}

    def slots(world: int, **given: Any) -> list[int]:
        step_plans = plans(slots=0)
        config = EngineConfig(
            everything_on_rank_1, unit_topology([0] * world), slots_by_memory=lambda on: by_memory[on.world_size], **given
        )
        step_plans.mesh = make_mesh(world, 2)
        step_plans.config = config
        return step_plans.slots(step_plans._families[LAYER]).tolist()

    assert slots(2) == [1, 0]
    assert slots(4) == [2, 2]
    assert slots(2, memory_slots=2) == [2, 2], "the number that is given"
    by_memory[2] = np.array([9, 9])
    assert slots(2) == [3, 3], "no more than experts"
