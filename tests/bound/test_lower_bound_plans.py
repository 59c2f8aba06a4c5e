"""The bound is below every plan (random, improved, or a policy's), and near the best one, found by brute force if there are few plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES, Plan, PlanInput
from testing.bound.lower_bound import lower_bound
from testing.plain_flows import even_quota

scipy_optimize = pytest.importorskip("scipy.optimize")

ROUNDING = 1e-9
COSTS = {
    "full experts": LayerCost(trainable_bytes=40.0, state_bytes=20.0, row_bytes=2.0, assignment_flops=1.0),
    "adapters over a dense base": LayerCost(trainable_bytes=3.0, state_bytes=5.0, row_bytes=2.0, row_flops=1.0, assignment_flops=0.1),
    "adapters over frozen experts": LayerCost(
        trainable_bytes=2.0, frozen_bytes=300.0, state_bytes=5.0, row_bytes=2.0, assignment_flops=1.0, assignment_backward=1.0
    ),
}


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    world, experts = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    nodes = [0, *draw(st.lists(st.integers(0, 2), min_size=world - 1, max_size=world - 1))]
    number = {n: i for i, n in enumerate(sorted(set(nodes)))}
    scale = st.sampled_from([0.5, 1.0, 1.0, 3.0])

    def some(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(scale, min_size=count, max_size=count)))

    latency = st.sampled_from([0.0, 0.0, 0.3, 5.0])
    topology = Topology(
        tuple(number[n] for n in nodes),
        some(world),
        (1.0,) * world,
        Link(10.0, draw(latency)),
        Link(2.0, draw(latency)),
        port_bandwidth=tuple(10 * s for s in some(world)),
        uplink_bandwidth=tuple(draw(st.sampled_from([1.0, 4.0, 20.0])) * s for s in some(len(number))),
        nic_bandwidth=tuple(3 * s for s in some(world)),
        memory_bandwidth=tuple(50 * s for s in some(world)),
        overlap_slowdown=draw(st.sampled_from([1.0, 1.3, 2.0])),
    )
    top_k = draw(st.integers(1, min(3, experts)))
    weight = draw(st.sampled_from([0.1, 1.0, 10.0]))
    cost = draw(st.sampled_from(list(COSTS.values())))
    cost = replace(
        cost,
        top_k=top_k,
        trainable_bytes=cost.trainable_bytes * weight,
        frozen_bytes=cost.frozen_bytes * weight,
        chunk_numel=draw(st.sampled_from([1, 12])),
        row_bytes=cost.row_bytes * draw(st.sampled_from([0.0, 1.0, 5.0])),
        non_moe_flops=draw(st.sampled_from([0.0, 2.0, 30.0])),
    )
    heat = np.array(draw(st.lists(st.sampled_from([0, 1, 1, 2, 8]), min_size=experts, max_size=experts)))
    sources = np.array(draw(st.lists(st.sampled_from([0, 1, 1, 3]), min_size=world, max_size=world)))
    seed = draw(st.integers(0, 2**31))
    loads_ED = np.random.default_rng(seed).poisson(5.0 * np.outer(sources, heat)).T.astype(float)
    pairs = (1, experts, world)
    resident = draw(st.none() | st.just(np.random.default_rng(seed + 1).random(pairs) < 0.4))
    return PlanInput(
        np.array([draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts))]),
        loads_ED[None],
        topology,
        cost,
        np.array(draw(st.lists(st.integers(0, experts), min_size=world, max_size=world))),
        resident_LED=resident,
    )


def copies(given_: PlanInput, count: int) -> PlanInput:
    """The first layer, `count` times: as many plans are judged at once."""
    resident = given_.resident_LED
    return replace(
        given_,
        owner_LE=np.repeat(given_.owner_LE[:1], count, 0),
        loads_LED=np.repeat(given_.expected_LED[:1], count, 0),
        resident_LED=None if resident is None else np.repeat(resident[:1], count, 0),
    )


def within_slots(given_: PlanInput, wish_LED: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The owners, and of the other replicas wished for as many on a rank as it has slots, the likeliest ones."""
    owned_LED = given_.owned_LED
    order_LED = np.argsort(np.argsort(np.where(owned_LED, -1.0, random.random(wish_LED.shape) - 2.0 * wish_LED + 4.0), axis=1), axis=1)
    owned_LD = owned_LED.sum(1)
    return owned_LED | ((wish_LED > 0) & (order_LED < (owned_LD + given_.slots_D)[:, None, :]))


def quotas(given_: PlanInput, where_LED: np.ndarray, weight_LED: np.ndarray, local_L11: np.ndarray) -> np.ndarray:
    """Some of the assignments where they are, if their expert is; the rest over the replicas in proportion to the weights."""
    loads_LED = given_.expected_LED
    local_LED = np.where(where_LED, loads_LED, 0.0) * local_L11
    share_LED = np.where(where_LED, weight_LED + 1e-9, 0.0)
    rest_LE1 = (loads_LED - local_LED).sum(-1, keepdims=True)
    return local_LED + rest_LE1 * share_LED / share_LED.sum(-1, keepdims=True)


def improved_plans(given_: PlanInput, seed: int, *, rounds: int = 12, count: int = 48) -> Iterator[tuple[Plan, np.ndarray]]:
    """Generations of plans and their seconds: random ones first, then changed copies of the better ones."""
    random = np.random.default_rng(seed)
    many = copies(given_, count)
    shape = many.owned_LED.shape
    wish = (random.random(shape) < random.random((count, 1, 1))).astype(float)
    weight, local = random.random(shape) ** 4, random.choice([0.0, 0.5, 1.0, 1.0], (count, 1, 1))
    for number in range(rounds):
        where = within_slots(many, wish, random)
        plan = Plan(many.owner_LE, where, quotas(many, where, weight, local))
        seconds = plan.seconds(many).total
        yield plan, seconds
        best = np.argsort(seconds)[: count // 6]
        parent = random.choice(best, count)
        change = random.random(shape) < (0.3 if number % 2 else 0.08)
        wish = np.where(change, random.random(shape) < 0.5, where[parent]).astype(float)
        weight = np.abs(weight[parent] + np.where(random.random(shape) < 0.3, random.normal(0, 0.4, shape), 0.0))
        local = np.where(random.random((count, 1, 1)) < 0.8, local[parent], random.random((count, 1, 1)))


@settings(max_examples=30)
@given(inputs(), st.integers(0, 2**31))
def test_no_plan_is_below_it(given_: PlanInput, seed: int) -> None:
    bound = lower_bound(given_, 0)
    assert bound >= 0
    for plan, seconds in improved_plans(given_, seed):
        assert ((plan.where_LED & ~copies(given_, len(seconds)).owned_LED).sum(1) <= given_.slots_D).all()
        assert seconds.min() >= bound * (1 - ROUNDING)


@settings(max_examples=15)
@given(inputs())
def test_no_policy_is_below_it(given_: PlanInput) -> None:
    """As they train: with the split that the bound is made for."""
    bound = lower_bound(given_, 0)
    for name, policy in POLICIES.items():
        plan = policy(given_)
        owned_LED = plan.owner_LE[..., None] == np.arange(given_.world_size)
        used_D = (plan.where_LED & ~owned_LED)[0].sum(0)
        same = bool((plan.owner_LE == given_.owner_LE).all())
        if not same or (used_D > given_.slots_D).any():
            # Another problem: other owners, or more slots than there are.
            mine = replace(given_, owner_LE=plan.owner_LE, slots_D=np.maximum(given_.slots_D, used_D))
            limit = lower_bound(mine, 0)
        else:
            mine, limit = given_, bound
        assert plan.seconds(mine).total[0] >= limit * (1 - ROUNDING), name
        again = replace(mine, execution=replace(mine.execution, rematerialize=True))
        assert plan.seconds(again).total[0] >= limit * (1 - ROUNDING), name


def best_by_brute_force(given_: PlanInput) -> float:
    """The least seconds of any plan of one node with one assignment a token: every placement, and the best quotas of each.

    There a row is an assignment, so seconds are convex in the quotas: a linear program finds the best, formulated here on its own.
    """
    topology, cost = given_.topology, given_.cost
    assert topology.num_nodes == 1
    assert cost.top_k == 1
    loads_ED, owned_ED = given_.expected_LED[0], given_.owned_LED[0]
    experts, ranks = loads_ED.shape
    work_D = (cost.row_flops * (1 + cost.row_backward) + cost.assignment_flops * (1 + cost.assignment_backward)) / np.array(topology.flops)
    travel_D = 4 * cost.row_bytes / np.array(topology.port_bandwidth)
    least = np.inf
    free = np.argwhere(~owned_ED)
    for chosen in product([False, True], repeat=len(free)):
        where_ED = owned_ED.copy()
        where_ED[tuple(free.T)] = chosen
        if ((where_ED & ~owned_ED).sum(0) > given_.slots_D).any():
            continue
        parts = Plan(given_.owner_LE, where_ED[None]).seconds(given_)  # of which exposed and optimizer know no quotas
        other = float(parts.exposed[0] + parts.optimizer[0])
        if (where_ED | (loads_ED == 0)).all():
            asks = 0.0 if where_ED.all() else 8 * topology.intra_node.latency
            least = min(least, other + asks + float((loads_ED.sum(0) * work_D).max()))
        # x: local [E, D], remote [E, D], compute, dispatch
        size = experts * ranks
        local, remote = np.arange(size).reshape(experts, ranks), size + np.arange(size).reshape(experts, ranks)
        A, a, B = [], [], []
        for d in range(ranks):
            for columns, factor, last, constant in (
                ([*local[:, d], *remote[:, d]], work_D[d], 2 * size, 0.0),
                (list(remote[:, d]), travel_D[d], 2 * size + 1, 0.0),
                (list(local[:, d]), -travel_D[d], 2 * size + 1, -travel_D[d] * loads_ED[:, d].sum()),
            ):
                row = np.zeros(2 * size + 2)
                row[columns], row[last] = factor, -1.0
                A.append(row)
                a.append(constant)
        for e in range(experts):
            row = np.zeros(2 * size + 2)
            row[local[e]] = row[remote[e]] = 1.0
            B.append(row)
        upper = [*np.where(where_ED, loads_ED, 0.0).ravel(), *np.where(where_ED, loads_ED.sum(), 0.0).ravel(), np.inf, np.inf]
        costs = np.zeros(2 * size + 2)
        costs[-2:] = 1.0
        result = scipy_optimize.linprog(costs, np.array(A), a, np.array(B), loads_ED.sum(1), [(0, u) for u in upper])
        least = min(least, other + result.fun + 8 * topology.intra_node.latency)
    return least


@st.composite
def small_inputs(draw: st.DrawFn) -> PlanInput:
    given_ = draw(inputs().filter(lambda g: g.world_size in (2, 3) and g.num_experts <= 3 and g.expected_LED.any()))
    topology = replace(given_.topology, node_of_rank=(0,) * given_.world_size, uplink_bandwidth=())
    return replace(given_, topology=topology, cost=replace(given_.cost, top_k=1))


@settings(max_examples=20)
@given(small_inputs())
def test_it_is_near_the_best_plan_of_few(given_: PlanInput) -> None:
    best, bound = best_by_brute_force(given_), lower_bound(given_, 0)
    assert best / 1.25 <= bound <= best * (1 + ROUNDING)


PARTS = 4
"""into which an expert's assignments are cut"""


def every_plan(given_: PlanInput) -> Plan:
    """A layer for each plan: every placement within the slots; assignments where they are as far as may be, or in quarters in every way."""
    owned_ED, loads_ED = given_.owned_LED[0], given_.expected_LED[0]
    experts, ranks = owned_ED.shape
    options: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for e in range(experts):
        mine = []
        for others in product([False, True], repeat=ranks - 1):
            where_D = np.insert(np.array(others, dtype=bool), given_.owner_LE[0, e], True)
            mine.append((where_D, even_quota(where_D[None], loads_ED[[e]], given_.topology)[0]))
            for ranks_of_parts in combinations_with_replacement(np.flatnonzero(where_D), PARTS):
                parts_D = np.bincount(np.array(ranks_of_parts), minlength=ranks)
                mine.append((where_D, parts_D * loads_ED[e].sum() / PARTS))
        options.append(mine)
    plans = list(product(*options))
    where_LED = np.array([[where_D for where_D, _ in plan] for plan in plans])
    quota_LED = np.array([[quota_D for _, quota_D in plan] for plan in plans])
    fits_L = ((where_LED & ~owned_ED).sum(1) <= given_.slots_D).all(1)
    return Plan(np.repeat(given_.owner_LE, fits_L.sum(), 0), where_LED[fits_L], quota_LED[fits_L])


def is_tiny(given_: PlanInput) -> bool:
    return given_.world_size in (2, 3) and given_.num_experts <= 2 and given_.topology.num_nodes > 1


@st.composite
def tiny_inputs(draw: st.DrawFn) -> PlanInput:
    return draw(inputs().filter(is_tiny))


@settings(max_examples=20, suppress_health_check=[HealthCheck.filter_too_much])
@given(tiny_inputs())
def test_it_is_near_the_best_of_all_plans_over_several_nodes(given_: PlanInput) -> None:
    plan = every_plan(given_)
    best = float(plan.seconds(copies(given_, len(plan.where_LED))).total.min())
    bound = lower_bound(given_, 0)
    assert best / 1.6 <= bound <= best * (1 + ROUNDING)  # quarters are coarse: of ten assignments to one expert a part is 2.5
