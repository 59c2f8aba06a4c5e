"""How other systems divide tokens among replicas, worked by hand, and what their plans then cost."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.cost.cost_loops import LOCAL, OWN, SERVED
from hecate.parallel.cost.cost_numbers import FAR_OUT, NEAR_OUT
from hecate.parallel.cost.flows import token_split
from hecate.parallel.planners import POLICIES, ROWS, WITH_OURS, Plan, PlanInput
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitLayerPlan, SplitRule, even_shares
from hecate.parallel.values.placement import Placement
from testing.plain_flows import quotas_of
from tests.parallel.planners.rival_inputs import inputs, plan_input

TWO_SOURCES = [[12.0, 0.0], [4.0, 0.0]]
"""of expert 0, rank 0's: 12 assignments are rank 0's own and 4 are rank 1's"""


def sent(plan: Plan, given_: PlanInput) -> list[list[float]]:
    """Assignments of expert 0 of the only layer: a row a source, a column a rank."""
    one = plan.layer(given_, 0)
    rows = [one.split(given_.topology, source)[0] * load for source, load in enumerate(given_.expected_LED[0, 0])]
    return [[round(float(assignments), 9) for assignments in row] for row in rows]


@pytest.mark.parametrize(("policy", "rows"), [("echo", [[6, 6], [2, 2]]), ("eplb", [[6, 6], [2, 2]]), ("flexmoe", [[6, 6], [2, 2]])])
def test_what_a_source_sends_does_not_depend_on_where_it_is(policy: str, rows: list[list[float]]) -> None:
    """Half of 16 assignments is served on each rank. Here rank 1 would serve its own 4 and four more."""
    given_ = plan_input([0, 1], TWO_SOURCES, [1, 1])
    assert sent(ROWS[policy](given_), given_) == rows
    assert sent(WITH_OURS[f"{policy}+ours"](given_), given_) == [[8, 4], [0, 4]]


def test_moonep_deals_assignments_in_the_order_of_the_sources() -> None:
    """Worked example B of MoonEP's rule: the ranks serve 16, 4, 8 and 12 of expert 0's, which come 11, 10, 9 and 10 from the sources."""
    given_ = plan_input([0, 1, 2, 3], [[11, 3, 1, 1], [10, 3, 2, 1], [9, 4, 2, 1], [10, 2, 3, 1]], [1] * 4)
    plan = ROWS["moonep"](given_)
    assert sent(plan, given_) == [[11, 0, 0, 0], [5, 4, 1, 0], [0, 0, 7, 2], [0, 0, 0, 10]]


def test_llep_gives_the_first_assignments_to_the_owner() -> None:
    """Rank 1 owns the expert of which each rank has 8 assignments. It serves the first 8, rank 0's, and rank 0 those of rank 1."""
    given_ = plan_input([1, 0], [[8.0, 0.0], [8.0, 0.0]], [1, 1], max_imbalance=1.0)
    plan = ROWS["llep"](given_)
    assert sent(plan, given_) == [[0, 8], [8, 0]]
    assert plan.price(given_).rows.near[0].tolist() == [[8, 8]]
    ours = WITH_OURS["llep+ours"](given_)
    assert sent(ours, given_) == [[8, 0], [0, 8]]
    assert ours.price(given_).rows.near[0].tolist() == [[0, 0]]


def test_llep_spills_one_chunk_after_the_other() -> None:
    """16 of rank 0's 24 assignments are too many: chunks of 8 for ranks 1 and 2, of which the last are source 2's."""
    given_ = plan_input([0, 0], [[10.0, 0.0], [2.0, 0.0], [12.0, 0.0]], [1] * 3, max_imbalance=1.0)
    assert sent(ROWS["llep"](given_), given_) == [[8, 2, 0], [0, 2, 0], [0, 4, 8]]


def test_laer_splits_over_its_nodes_copies_and_counts_a_copy_twice_if_there_are_two() -> None:
    """Ranks 0, 1 | 2, 3 | 4, and copies 2 on rank 0, one each on 2 and 3."""
    split = SourceSplit("in_node", np.array([[2.0, 0.0, 1.0, 1.0, 0.0]]))
    given_ = plan_input([0], [[4.0]] * 5, [1] * 5, nodes=(0, 0, 1, 1, 2))
    where_ED = split.weight_ED > 0
    share_ESD = split.shares(where_ED, where_ED * 5.0, given_.expected_LED[0], given_.topology)
    assert share_ESD[0].tolist() == [[1, 0, 0, 0, 0]] * 2 + [[0, 0, 0.5, 0.5, 0]] * 2 + [[0.5, 0, 0.25, 0.25, 0]]


def test_true_loads_are_split_by_the_shares_of_the_plan() -> None:
    """Planned for 8 and 8 in a line, rank 1 first; a source that was expected to have nothing keeps its own, as the expert is there."""
    given_ = plan_input([1, 0], [[8.0, 0.0], [8.0, 0.0]], [1, 1], max_imbalance=1.0)
    plan = ROWS["llep"](given_)
    traffic_LXD = plan.traffic(given_.expected_LED, np.array([[[2.0, 20.0], [0.0, 0.0]]]), given_.topology)
    assert traffic_LXD[0, SERVED].tolist() == [20, 2]
    half = plan_input([1, 0], [[16.0, 0.0], [0.0, 0.0]], [1, 1], max_imbalance=1.0)
    traffic_LXD = ROWS["llep"](half).traffic(half.expected_LED, np.array([[[2.0, 20.0], [0.0, 0.0]]]), given_.topology)
    assert traffic_LXD[0, SERVED].tolist() == [1, 21]


def test_counts_are_exchanged_wherever_a_token_may_leave() -> None:
    """Both ranks have the only expert: LLEP sends all tokens across, and with our split none leaves."""
    given_ = plan_input([1], [[8.0], [8.0]], [1, 1], max_imbalance=1.0)
    for name, travels in (("llep", True), ("llep+ours", False)):
        plan = ROWS[name](given_)
        assert plan.where_LED.all()
        assert plan.layer(given_, 0).dispatches(given_.topology) is travels


@pytest.mark.parametrize("rule", ["alike", "in_node", "in_order"])
def test_a_sources_shares_are_those_of_all_together_to_the_bit(rule: SplitRule) -> None:
    """Of 19 ranks, as sums of 8 numbers and more depend on how they lie in memory. Of one expert no rank has a weight."""
    random, ranks = np.random.default_rng(5), 19
    topology = plan_input([0], None, [0] * ranks, nodes=tuple(np.arange(ranks) // 11)).topology
    quota_ED, planned_ED = random.random((2, 6, ranks))
    weight_ED = np.cumsum(quota_ED, axis=1) - quota_ED if rule == "in_order" else quota_ED * (random.random(quota_ED.shape) < 0.5)
    weight_ED[0] = 0.0
    split = SourceSplit(rule, weight_ED)
    share_ESD = split.shares(quota_ED > 0, quota_ED, planned_ED, topology)
    for source in range(ranks):
        own_E1D = split.shares(quota_ED > 0, quota_ED, planned_ED, topology, slice(source, source + 1))
        assert np.array_equal(own_E1D, share_ESD[:, source : source + 1])


@pytest.mark.parametrize("rule", ["alike", "in_node", "in_order"])
def test_a_training_step_makes_no_array_of_all_sources(rule: SplitRule) -> None:
    """64 experts on 256 ranks: 32 MiB for the shares of all sources, 128 KiB for those of one."""
    ranks, experts = 256, 64
    topology = plan_input([0], None, [0] * ranks, nodes=tuple(np.arange(ranks) // 8)).topology
    where_ED, loads_ED = np.ones((experts, ranks), dtype=bool), np.ones((experts, ranks))
    begin_ED = np.broadcast_to(np.arange(float(ranks)), loads_ED.shape)  # each rank serves its own
    split = SourceSplit(rule, begin_ED if rule == "in_order" else loads_ED)
    one = SplitLayerPlan(Placement(np.zeros(experts, np.int64), where_ED), loads_ED, loads_ED, source_split=split)
    tracemalloc.start()
    assert one.dispatches(topology) is (rule != "in_order")
    one.split(topology, 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 << 20


@pytest.mark.parametrize("name", sorted(ROWS))
@given(given_=inputs())
def test_every_split_serves_the_quotas(name: str, given_: PlanInput) -> None:
    """Under the loads that a plan was made for; and a layer alone says the same as all together."""
    plan, topology, loads_LED = ROWS[name](given_), given_.topology, given_.expected_LED
    traffic_LXD = plan.traffic(loads_LED, loads_LED, topology)
    quota_LED = quotas_of(plan, loads_LED, topology)
    np.testing.assert_allclose(traffic_LXD[:, SERVED], quota_LED.sum(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(traffic_LXD[:, OWN], loads_LED.sum(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(traffic_LXD[:, [LOCAL, NEAR_OUT, FAR_OUT]].sum(1), loads_LED.sum(1), rtol=1e-6, atol=1e-6)
    for layer in range(given_.num_layers):
        one = plan.layer(given_, layer)
        alone_XD = one.traffic(loads_LED[layer], topology)
        np.testing.assert_allclose(alone_XD, traffic_LXD[layer], rtol=1e-9, atol=1e-9)
        by_source = np.stack([one.split(topology, source) for source in range(given_.world_size)], axis=1) * loads_LED[layer][..., None]
        np.testing.assert_allclose(by_source.sum(1), quota_LED[layer], rtol=1e-6, atol=1e-6)
        if not one.dispatches(topology):
            np.testing.assert_allclose(alone_XD[LOCAL], loads_LED[layer].sum(0), rtol=1e-9)


def test_a_run_trains_under_a_policy_with_this_projects_split() -> None:
    """The rule by which a system divides its tokens is the simulator's alone."""
    given_ = plan_input([1, 0], [[8.0, 0.0], [8.0, 0.0]], [1, 1], max_imbalance=1.0)
    for name, planner in POLICIES.items():
        assert type(planner(given_)) is Plan, name
    assert sent(POLICIES["llep"](given_), given_) == [[8, 0], [0, 8]]


@given(st.integers(0, 2**32))
def test_shares_of_topology_aware_dispatch(seed: int) -> None:
    random = np.random.default_rng(seed)
    where_ED = random.random((4, 5)) < 0.4
    where_ED[np.arange(4), random.integers(0, 5, 4)] = True
    topology = plan_input([0], None, [0] * 5, nodes=(0, 0, 1, 1, 2)).topology
    for source in range(5):
        np.testing.assert_allclose(even_shares(where_ED, topology)[:, source], token_split(where_ED, None, None, topology, source))
