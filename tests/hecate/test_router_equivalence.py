"""Training with every choice of a router, on any number of ranks, equals one plain process in float64 within 1e-10."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hecate.config import RouterConfig
from hecate.parallel.planners import POLICIES
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import Case
from tests.hecate.router_reference import check_routers

MOVED = 0.02
"""how far a balancing bias moves in a step: enough to change choices"""
LLAVA_MOLE = RouterConfig(bias="learned", weights="one", balance="sample")
CHOICES = (
    (1, LLAVA_MOLE),
    (2, RouterConfig(balance="sample")),
    (2, RouterConfig(score="sigmoid", bias="balancing", bias_rate=MOVED)),
    (2, RouterConfig(score="sigmoid", bias="balancing", bias_rate=MOVED, bias_in_weights=True)),
    (2, RouterConfig(score="sigmoid", bias="learned")),
    (1, RouterConfig(weights="gate")),
    (3, RouterConfig(dense=True, weights="gate")),
    (3, RouterConfig(score="sigmoid", dense=True)),
    (3, RouterConfig(bias="learned", dense=True, weights="gate", balance="sample")),
)
"""(experts of a token, of three; the choices)"""
SCENARIOS = ("balanced", "hot expert", "idle experts", "empty rank")
SLOW = [pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 3, 4)]


def cases(policy: str, scenario: str, **changes: object) -> list[Case]:
    return [replace(Case(policy, 3, k, scenario, router=router), **changes) for k, router in CHOICES]  # type: ignore[arg-type]


def test_two_ranks_equal_one_process() -> None:
    some = [*cases("hecate_paper", "balanced", steps=2)[:1], *cases("hecate_paper", "empty rank", steps=2)[3::3]]
    run_ranks(2, check_routers, some, timeout=240)


@pytest.mark.parametrize("world", SLOW)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_any_number_of_ranks_equals_one_process(world: int, scenario: str) -> None:
    run_ranks(world, check_routers, cases("hecate_paper", scenario), timeout=480)


@pytest.mark.slow
def test_in_sharding_groups_smaller_than_the_world() -> None:
    """Balance and counts are those of all ranks, not of a group."""
    run_ranks(4, check_routers, cases("hecate_paper", "empty rank", shard_size=2), timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_equals_one_process(policy: str) -> None:
    """Each with half of the choices."""
    half = cases(policy, "hot expert", steps=3)[sorted(POLICIES).index(policy) % 2 :: 2]
    run_ranks(3, check_routers, half, timeout=480)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_llava_moles_router_under_every_policy_while_owners_change(world: int) -> None:
    named = zip((*sorted(POLICIES), "elsewhere"), itertools.islice(itertools.cycle(SCENARIOS), world, None), strict=False)
    found = [Case(policy, 3, 1, scenario, router=LLAVA_MOLE, steps=3) for policy, scenario in named]
    run_ranks(world, check_routers, found, True, timeout=480)


@pytest.mark.slow
def test_whatever_runs_again_it_equals_one_process() -> None:
    """Layers run a second time in the backward pass, replicas come and go, plans wait for the router."""
    changes = {"checkpointing": True, "rematerialize": True, "plan": "exact", "steps": 3}
    run_ranks(2, check_routers, cases("llep", "idle experts", **changes), timeout=480)
