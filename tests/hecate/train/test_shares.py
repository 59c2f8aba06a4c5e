"""Ranks of different speed and memory get different shares of tokens and experts, and training equals that of equal ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.config import load_config
from hecate.data.encode import IGNORED
from hecate.parallel.cluster.topology import Link, Topology
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop

Step = tuple[float, float, float]
OVERRIDES = ("model.dtype=float64", "data.eval=[]", "eval.generate=false", "moe.num_experts=8", "gradient_accumulation_steps=2")
STEPS = 4


def machines(*flops: float, memory: tuple[float, ...] = (1e9,) * 4) -> Topology:
    return Topology((0, 0, 1, 1), flops, memory, Link(1e9, 0.0), Link(3e7, 0.0))


EQUAL = machines(1e9, 1e9, 1e9, 1e9)
UNEQUAL = machines(3e9, 3e9, 1e9, 1e9, memory=(3e9, 3e9, 1e9, 1e9))
ONE_SO_SLOW = machines(1e9, 1e9, 1e9, 1e3)


def train(rank: int, world: int, workshop: str, name: str, courses: list[Topology], policy: str) -> tuple[list[Step], list[int], int]:
    """Steps under each topology in turn: (loss, aux loss, gradient norm) of each, this rank's rows of each, experts owned at first."""
    overrides = (*OVERRIDES, f"fssdp.policy={policy}", f"output_dir={workshop}/runs/{name}")
    default = dist.group.WORLD
    assert default is not None
    ranks = Ranks(rank, world, torch.device("cpu"), ExpertGroups(default, dist.new_group()))
    run = Training(load_config(f"{workshop}/config.yaml", overrides, claim_output=False), ranks, courses[0])
    owned, steps, rows = len(run.parts.moe.engine.shards.named_parameters()), [], []
    dealt = run.micro_batches

    def counted(step_rows: list) -> list:  # type: ignore[type-arg]
        batches = dealt(step_rows)
        rows.append(sum(int((batch.targets != IGNORED).any(1).sum()) for batch in batches))
        return batches

    run.micro_batches = counted  # type: ignore[method-assign]
    for topology in courses:
        run.plan_for(topology)
        result = run.train_one().result
        steps.append((result.loss, result.aux_loss, result.grad_norm))
    return steps, rows, owned


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


@pytest.fixture(scope="module")
def equal(workshop: str) -> list[Step]:
    results = run_ranks(4, train, workshop, "equal", [EQUAL] * STEPS, "hecate_paper")
    assert [(rows, owned) for _, rows, owned in results] == [([4] * STEPS, 4)] * 4  # two micro-steps of two rows; 16 experts
    steps = results[0][0]
    assert steps[0][0] - steps[-1][0] > 1e-3, "it must have learnt, or nothing was shown"
    return steps


@pytest.mark.parametrize("policy", [pytest.param("hecate_paper", marks=pytest.mark.slow), "static_ep"])
def test_shares_of_3_3_1_1_give_the_losses_of_equal_ones(workshop: str, equal: list[Step], policy: str) -> None:
    results = run_ranks(4, train, workshop, f"unequal-{policy}", [UNEQUAL] * STEPS, policy)
    assert [rows for _, rows, _ in results] == [[6] * STEPS, [6] * STEPS, [2] * STEPS, [2] * STEPS]
    assert [owned for *_, owned in results] == [6, 6, 2, 2]
    for steps, _, _ in results:
        assert torch.tensor(steps).sub(torch.tensor(equal)).abs().max() <= 1e-10


def test_shares_may_change_between_steps_and_a_rank_may_have_none(workshop: str, equal: list[Step]) -> None:
    results = run_ranks(4, train, workshop, "changing", [EQUAL, UNEQUAL, ONE_SO_SLOW, EQUAL], "hecate_paper")
    assert [rows for _, rows, _ in results] == [[4, 6, 6, 4], [4, 6, 6, 4], [4, 2, 4, 4], [4, 2, 0, 4]]
    assert torch.tensor(results[0][0]).sub(torch.tensor(equal)).abs().max() <= 1e-10
