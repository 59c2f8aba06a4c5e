"""Adapters of several sources, trained at once: each is what it would be alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from hecate.data.batches import Batch
from hecate.parallel.planners import POLICIES
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import Case, sharded
from tests.hecate.linear_cases import LinearCase, sharded_linears
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
@pytest.mark.parametrize("world", [2, 3, 4])
def test_under_every_policy(world: int) -> None:
    """At 3 ranks all of them with both kinds of units, at 2 and at 4 with one kind each."""
    cases = []
    for number, policy in enumerate(sorted(POLICIES)):
        both = (given_case, given_linear_case)
        cases += [made(policy, "idle experts", steps=3) for made in (both if world == 3 else (both[(number + world // 2) % 2],))]
    run_ranks(world, check_all_separate, cases, timeout=480)


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


def trained(
    case: Case | LinearCase, batches_of: Callable[[int], list[Batch]], only: int | None = None, others_than: int | None = None
) -> dict[str, torch.Tensor]:
    """Parameters and moments after some steps.

    Args:
        only: the one source whose micro-steps are taken; None: all.
        others_than: the one adapter that begins as ever, while all others begin with other values; None: all begin as ever.
    """
    moe, head = sharded_linears(case, 1) if isinstance(case, LinearCase) else sharded(case, 1)
    optimizer = optimizer_of(moe, case)
    for (_, expert), chunk in moe.engine.shards.named_parameters().items():
        if others_than not in (None, expert):
            chunk.data.mul_(-1.5)
    for step in range(STEPS):
        batches = [batch for batch in batches_of(step) if only is None or int(batch.task.max()) == only]
        if batches:
            one_step(moe, head, optimizer, batches, step)
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}


def same_of(source: int, state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """The number of first moments that an adapter has. Raises AssertionError: something of it differs from what `other` has."""
    moved = 0
    for name, tensor in state.items():
        if int(name.split("/")[1].rpartition(".")[2]) == source:
            assert torch.equal(tensor, other[name]), f"adapter {source}: {name}"
            moved += tensor.numel() > 0 and name.endswith("exp_avg")
    return moved


over_both_units = pytest.mark.parametrize("made", [given_case, given_linear_case])


@over_both_units
def test_on_one_rank_each_adapter_is_the_same_to_the_bit(one_rank: dist.ProcessGroup, made: Callable[..., Case | LinearCase]) -> None:
    case = made("hecate_paper", "idle experts", dtype=torch.float32)
    together = trained(case, one_source_each)
    moved = [same_of(source, trained(case, one_source_each, only=source), together) for source in range(SOURCES)]
    assert min(moved) >= 2, "not every adapter has trained"


@over_both_units
def test_in_mixed_micro_batches_no_bit_of_an_adapter_depends_on_the_others(
    one_rank: dist.ProcessGroup, made: Callable[..., Case | LinearCase]
) -> None:
    """Alone, it would train in matrix products of other sizes, whose sums may be in another order. So the others are there, but differ."""

    def mixed(step: int) -> list[Batch]:
        return [mixed_batch(step, micro, range(0), idle=True) for micro in range(2)]

    case = made("hecate_paper", "idle experts", dtype=torch.float32)
    together = trained(case, mixed)
    for source in range(SOURCES):
        changed = trained(case, mixed, others_than=source)
        assert same_of(source, changed, together) >= 2
        with pytest.raises(AssertionError, match=r"adapter \d: "):
            same_of((source + 1) % SOURCES, changed, together)
