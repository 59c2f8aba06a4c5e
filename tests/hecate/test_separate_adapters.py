"""Adapters of several sources, trained at once: each is what it would be alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.data.batches import Batch
from hecate.parallel.planners import POLICIES
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import sharded
from tests.hecate.separate_adapters import (
    SOURCES,
    check_all_separate,
    first_sample,
    given_case,
    given_linear_case,
    mixed_batch,
    one_step,
    optimizer_of,
)

SCENARIOS = ("balanced", "idle experts", "empty rank")
STEPS = 4


def test_on_two_ranks_each_adapter_is_what_it_is_alone() -> None:
    cases = [given_case("hecate_paper", "idle experts", steps=2), given_linear_case("hecate_paper", "idle experts", steps=2)]
    run_ranks(2, check_all_separate, cases, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_on_any_number_of_ranks(world: int) -> None:
    cases = [given_case("hecate_paper", scenario) for scenario in SCENARIOS]
    again = {"checkpointing": True, "rematerialize": True, "plan": "exact"}
    cases += [given_case("llep", "empty rank", **again), given_linear_case("llep", "empty rank", **again)]
    cases += [given_linear_case("hecate_paper", scenario) for scenario in SCENARIOS]
    run_ranks(world, check_all_separate, cases, timeout=480)


@pytest.mark.slow
def test_under_every_policy() -> None:
    cases = [made(policy, "idle experts", steps=3) for policy in sorted(POLICIES) for made in (given_case, given_linear_case)]
    run_ranks(3, check_all_separate, cases, timeout=480)


@pytest.mark.slow
def test_in_sharding_groups() -> None:
    run_ranks(4, check_all_separate, [given_case("hecate_paper", "idle experts", shard_size=2)], timeout=480)


def one_source_each(step: int) -> list[Batch]:
    """A micro-step of one row for each sample of a step, so that matrix products have the same sizes with and without other sources."""
    found = []
    for micro in range(2):
        batch = mixed_batch(step, micro, range(0), idle=True)
        found += [first_sample(batch, row) for row in range(4)]
    return found


def trained(only: int | None) -> dict[str, torch.Tensor]:
    """Parameters and moments after some steps, with all sources' micro-steps or those of one."""
    case = given_case("hecate_paper", "idle experts", dtype=torch.float32)
    moe, head = sharded(case, 1)
    optimizer = optimizer_of(moe, case)
    for step in range(STEPS):
        batches = [batch for batch in one_source_each(step) if only is None or int(batch.task.max()) == only]
        if batches:
            one_step(moe, head, optimizer, batches, step)
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}


@pytest.mark.usefixtures("one_rank")
def test_on_one_rank_each_adapter_is_the_same_to_the_bit(one_rank: dist.ProcessGroup) -> None:
    together = trained(None)
    moved = 0
    for source in range(SOURCES):
        alone = trained(source)
        for name, tensor in alone.items():
            if int(name.split("/")[1].rpartition(".")[2]) == source:
                assert torch.equal(tensor, together[name]), f"adapter {source}: {name}"
                moved += tensor.numel() > 0 and name.endswith("exp_avg")
    assert moved >= 2 * SOURCES, "not every adapter has trained"
