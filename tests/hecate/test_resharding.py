"""Re-sharding changes no result: training with experts that change their owners on the way is the training without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.checkpoint.train_state import adopt_owners
from hecate.elastic.move_experts import check_room, move_experts, reshard_if_it_pays
from hecate.engine.step_plans import PlannerError
from hecate.errors import UserError
from hecate.model.causal_head import LanguageModelHead
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.planners import Plan, PlanInput
from hecate.report.events import Resharding, StepResult
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Case,
    assert_groups_equal,
    random_owners,
    sharded,
    step_of_rows,
)

STEPS, EXPERTS = 4, 6


class Training:
    """One model and its optimizer on this rank."""

    def __init__(self, case: Case, rank: int, world: int) -> None:
        self.rank, self.world, self.case = rank, world, case
        self.moe: MoeModel
        self.head: LanguageModelHead
        self.moe, self.head = sharded(case, world)
        self.optimizer = ExpertOptimizer(
            Trainables(owned_parameters(self.moe.engine), self.moe.replicated_parameters()),
            AdamW(weight_decay=WEIGHT_DECAY),
            LearningRate(LEARNING_RATE, lambda step: 1 / (1 + step)),
            torch.device("cpu"),
        )

    def step(self, number: int) -> StepResult:
        return step_of_rows(self.moe, self.head, self.optimizer, number, rank=self.rank, world=self.world, empty_rows=range(0))

    def state(self) -> dict[str, torch.Tensor]:
        """All parameters and moments of the job, by name; an owned one that two ranks of a sharding group have is an error."""
        assert_groups_equal(self.moe, self.optimizer)
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(self.moe.engine.shards.world_size)]
        mine = {name: tensor.clone() for name, tensor in self.optimizer.state_tensors().items()}
        dist.all_gather_object(parts, mine, group=self.moe.engine.shards.groups.tokens)
        owned = [name for part in parts for name in part if name.startswith("owned/")]
        assert len(owned) == len(set(owned)), "two ranks own one expert"
        return {name: tensor for part in parts for name, tensor in part.items()}


def _moved(rank: int, world: int, cases: list[Case]) -> list[int]:
    """Training with two moves, against training with none. Returns the number of experts without moments at each first move."""
    never_stepped = []
    for number, case in enumerate(cases):
        still, moving = Training(case, rank, world), Training(case, rank, world)
        for step in range(STEPS):
            wanted, got = still.step(step), moving.step(step)
            for name in ("loss", "aux_loss", "grad_norm"):
                assert abs(getattr(got, name) - getattr(wanted, name)) <= 1e-10, f"{case}, step {step}: {name}"
            if step in (1, 2):
                owners = random_owners(moving.moe, seed=10 * number + step + world)
                before = moving.state()
                changed = sum(int((owners[layer] != old).sum()) for layer, old in moving.moe.engine.shards.owners.items())
                done = move_experts(moving.moe.engine, moving.optimizer, owners)
                after = moving.state()
                assert after.keys() == before.keys(), f"{case}, step {step}: moments appeared or were lost"
                assert all(torch.equal(after[name], before[name]) for name in before), f"{case}, step {step}: changed on the way"
                assert done.experts == changed
                for layer, owner_E in owners.items():
                    here = [expert for (at, expert) in moving.moe.engine.shards.named_parameters() if at == layer]
                    assert here == np.flatnonzero(owner_E == moving.moe.engine.shards.rank).tolist()
                masters = [f"owned/{layer}.{expert}" for layer in owners for expert in range(EXPERTS)]
                if step == 1:
                    never_stepped.append(sum(f"{name}/step" not in after for name in masters))
        wanted_state, got_state = still.state(), moving.state()
        assert got_state.keys() == wanted_state.keys()
        for name, tensor in wanted_state.items():
            error = float((got_state[name] - tensor).abs().max()) if tensor.numel() else 0.0
            assert error <= 1e-10, f"{case}: {name} off by {error:.2e}"
    return never_stepped


@pytest.mark.parametrize(
    ("world", "shard_size"),
    [(1, None), (3, None), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in ((2, None), (4, None), (4, 2)))],
)
def test_training_with_moves_is_training_without(world: int, shard_size: int | None) -> None:
    cases = [Case(policy, EXPERTS, 2, scenario) for policy, scenario in (("hecate_paper", "idle experts"), ("static_ep", "hot expert"))]
    cases.append(Case("full", EXPERTS, 1, "balanced", checkpointing=True))
    if world == 3:
        cases = cases[:1]  # the others are trained on other numbers of ranks
        cases.append(Case("llep", EXPERTS, 2, "hot expert", plan="exact", rematerialize=True, checkpointing=True))
        cases.append(Case("hecate_paper", EXPERTS, 2, "hot expert", plan="calibrated", prefetch=2))
    cases = [replace(case, shard_size=shard_size) for case in cases]
    never_stepped = run_ranks(world, _moved, cases, timeout=240)[0]
    assert never_stepped[0] == 2 * 2, "experts 2 and 4 of each layer were to stay idle"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_other_pairs_and_gradient_rules_train_alike_with_moves_and_without(world: int) -> None:
    """What is drawn is the same wherever an expert goes, and blocks of pools move as experts do."""
    systems = ({"pairs": "fixed_a"}, {"pairs": "nola"}, {"pairs": "shards"}, {"eta": 1.5})
    cases = [replace(Case("hecate_paper", EXPERTS, 2, "idle experts"), **system) for system in systems]
    run_ranks(world, _moved, cases, timeout=240)


def _resumed(rank: int, world: int) -> None:
    """A job that takes over owners and state in force after a move goes on bit for bit."""
    case = Case("hecate_paper", EXPERTS, 2, "idle experts")
    whole = Training(case, rank, world)
    for step in range(2):
        whole.step(step)
    move_experts(whole.moe.engine, whole.optimizer, random_owners(whole.moe, seed=3))
    saved = whole.state()
    history, owners = (
        whole.moe.engine.shards.history.state_dict(),
        {layer: owner_E.copy() for layer, owner_E in whole.moe.engine.shards.owners.items()},
    )

    resumed = Training(case, rank, world)
    adopt_owners(resumed.moe.engine, resumed.optimizer, owners)
    resumed.optimizer.load_state_tensors(saved, steps_done=2)
    resumed.moe.engine.shards.history.load_state_dict(history)
    for step in range(2, STEPS):
        wanted, got = whole.step(step), resumed.step(step)
        assert (got.loss, got.aux_loss, got.grad_norm) == (wanted.loss, wanted.aux_loss, wanted.grad_norm)
    wanted_state, got_state = whole.state(), resumed.state()
    assert got_state.keys() == wanted_state.keys()
    assert all(torch.equal(got_state[name], wanted_state[name]) for name in wanted_state)


def test_resuming_with_the_owners_in_force_is_bitwise() -> None:
    run_ranks(3, _resumed)


def _decided(rank: int, world: int, shard_size: int | None) -> tuple[Resharding | None, Resharding | None, list[float]]:
    """All experts on rank 0 at first, on devices so slow that balance pays; then again, from where they are."""
    training = Training(Case("static_ep", EXPERTS, 2, "balanced", shard_size=shard_size), rank, world)
    engine = training.moe.engine
    on = Topology((0,) * world, (1e6,) * world, (1e9,) * world, Link(1e9, 1e-6), Link(1e9, 1e-6))
    engine.shards.config = replace(engine.shards.config, topology=on)
    move_experts(engine, training.optimizer, {layer: np.zeros(EXPERTS, dtype=np.int64) for layer in engine.shards.families})
    assert reshard_if_it_pays(engine, training.optimizer, 100) is None, "no load is known yet"
    for step in range(2):
        before = training.step(step)
    assert reshard_if_it_pays(engine, training.optimizer, 0) is None, "no step is left to repay it"
    first = reshard_if_it_pays(engine, training.optimizer, 100)
    second = reshard_if_it_pays(engine, training.optimizer, 100)
    engine.begin_step(2)
    return first, second, [len(training.optimizer.owned), engine.shards.plans.imbalance(before.loads)]


@pytest.mark.parametrize("groups", [1, 2])
def test_experts_move_when_it_pays_and_then_stay(groups: int) -> None:
    """The same ones in every sharding group."""
    results = run_ranks(2 * groups, _decided, None if groups == 1 else 2)
    for first, second, (owned, skew) in results:
        assert first is not None
        assert second is None
        assert owned == EXPERTS, "half of the experts of two layers"
        assert groups > 1 or skew < 1.5, "all on one of two ranks was 2"  # of several groups: what the last step's own plans made of it
        assert (first.move, first.gain) == (results[0][0].move, results[0][0].gain)
        # Half of both layers' experts leave rank 0: master, two moments, in fp64, and a count of steps in fp32.
        layout_numel = 3 * 3 * (16 + 24)
        assert first.move.experts == EXPERTS
        assert first.move.num_bytes == groups * EXPERTS * (3 * 8 * layout_numel + 4)


def _without_room(rank: int, world: int) -> list[bool]:
    """As `_decided`, where it would pay, on devices whose memory holds no expert."""
    training = Training(Case("static_ep", EXPERTS, 2, "balanced"), rank, world)
    engine = training.moe.engine
    on = Topology((0,) * world, (1e6,) * world, (1.0,) * world, Link(1e9, 1e-6), Link(1e9, 1e-6))
    engine.shards.config = replace(engine.shards.config, topology=on)
    move_experts(engine, training.optimizer, {layer: np.zeros(EXPERTS, dtype=np.int64) for layer in engine.shards.families})
    for step in range(2):
        training.step(step)
    with pytest.raises(UserError, match="memory"):
        check_room(engine)
    return [reshard_if_it_pays(engine, training.optimizer, 100) is None, len(training.optimizer.owned) == (0 if rank else 2 * EXPERTS)]


def test_without_room_a_re_shard_that_is_ordered_moves_nothing_and_ends_nothing() -> None:
    assert run_ranks(2, _without_room) == [[True, True]] * 2


def _disagreeing(rank: int, world: int) -> str:
    training = Training(Case("static_ep", EXPERTS, 2, "balanced"), rank, world)
    move_experts(
        training.moe.engine, training.optimizer, {layer: np.zeros(EXPERTS, dtype=np.int64) for layer in training.moe.engine.shards.families}
    )
    training.step(0)
    try:
        reshard_if_it_pays(training.moe.engine, training.optimizer, steps=10**9 * rank)  # so that it pays on rank 1 alone
    except UserError as error:
        return str(error).splitlines()[0]
    return ""


def test_ranks_that_come_to_other_owners_are_noticed() -> None:
    assert run_ranks(2, _disagreeing) == ["the ranks planned different owners for the experts of layer 0, 1, so no expert was moved"] * 2


def _moving_planner(given: PlanInput) -> Plan:
    owner_LE = (given.owner_LE + 1) % given.world_size
    return Plan(owner_LE, owner_LE[..., None] == np.arange(given.world_size))


def _refused(rank: int, world: int) -> None:
    training = Training(Case("static_ep", EXPERTS, 2, "balanced"), rank, world)
    training.moe.engine.shards.config = replace(training.moe.engine.shards.config, planner=_moving_planner)
    moved = "planner _moving_planner: its plan moves expert 0 of layer 0 from its owner, rank 0, to rank 1"
    with pytest.raises(PlannerError, match=moved):
        training.moe.engine.begin_step(0)


def test_a_planner_that_moves_owners_is_refused() -> None:
    run_ranks(2, _refused)
