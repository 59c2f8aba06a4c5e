"""The collectives of fully sharded experts, and those of other systems' rows, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost
from hecate.parallel.planners import COLLECTIVES, ROWS, Plan, PlanInput
from hecate.parallel.planners.rivals.sharded_gather import shard_ports
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import simulate
from testing.plan_cases import price_row
from testing.unit_cases import layer_input, unit_topology

COST = LayerCost(trainable_bytes=6.0, chunk_numel=6, assignment_flops=1.0, non_moe_flops=2.0)
"""of one rank's attention two seconds, which hide a gather"""


def test_parts_of_copies_through_every_port() -> None:
    """Ranks 0, 1 | 2, 3 compute with 2, 1, 1, 1 experts: a quarter of each comes from each rank, its own included."""
    copies_ED = np.array([[True, True, False, False], [True, False, True, True]])
    ports = shard_ports(copies_ED, unit_topology((0, 0, 1, 1)))
    assert ports.near_in_D.tolist() == [0.5, 0.25, 0.25, 0.25]
    assert ports.near_out_D.tolist() == [0.25, 0.5, 0.25, 0.25]
    assert ports.far_in_D.tolist() == [1, 0.5, 0.5, 0.5]
    assert ports.far_out_D.tolist() == [0.5, 0.5, 0.75, 0.75]


def everywhere(given_: PlanInput) -> Plan:
    """Every rank has the only expert, rank 0's, and serves its own."""
    return Plan(given_.owner_LE, np.ones((1, 1, 4), dtype=bool), given_.expected_LED.copy())


@pytest.mark.parametrize(
    ("name", "gather"),
    [
        # Each rank gets three quarters of 6 bytes, its own copy's too.
        ("laer", 4.5),
        # The owner sends 6 bytes to each of three ranks.
        ("llep", 18.0),
        # It sends a third to each, 6 s, which these then exchange, 4 s.
        ("laer+ours", 10.0),
        ("auto", 10.0),
    ],
)
def test_rows_have_the_collectives_of_their_systems(name: str, gather: float) -> None:
    given_ = layer_input([0], [[5.0]] * 4, 1, on=unit_topology((0,) * 4), cost=COST)
    seconds = price_row(name, everywhere(given_), given_).seconds
    # Attention hides two seconds of the gather, and twice as many of the reduction.
    assert (float(seconds.gather[0]), float(seconds.reduce[0]), float(seconds.exposed[0])) == (gather, gather, 2 * gather - 2 - 4)
    loads = np.full((1, 1, 1, 4), 5)
    (row,) = simulate(loads, {name: everywhere}, Setting(topology=given_.topology, cost=COST, slots_D=given_.slots_D), COLLECTIVES)
    assert (row.seconds.gather, row.seconds.reduce, row.seconds.exposed) == (gather, gather, 2 * gather - 2 - 4)
    (ours,) = simulate(loads, {name: everywhere}, Setting(topology=given_.topology, cost=COST, slots_D=given_.slots_D))
    assert ours.seconds.gather == 10.0, "without a collective of its own"


def test_replicas_that_come_twice() -> None:
    """With rematerialization the second gather of 4.5 s goes beside the reduction, and four seconds of both are hidden."""
    given_ = layer_input([0], [[5.0]] * 4, 1, on=unit_topology((0,) * 4), cost=COST, execution=ExecutionMode(rematerialize=True))
    seconds = price_row("laer", everywhere(given_), given_).seconds
    assert float(seconds.exposed[0]) == 4.5 - 2 + 9 - 4
    late = replace(given_, execution=ExecutionMode(rematerialize=True, prefetch=0))
    assert float(price_row("laer", everywhere(late), late).seconds.exposed[0]) == 4.5 + 4.5 - 4 + 4.5


def test_a_route_that_is_given_holds_for_every_row() -> None:
    given_ = layer_input([0], [[5.0]] * 4, 1, on=unit_topology((0,) * 4), cost=COST, execution=ExecutionMode(route="sliced"))
    assert {float(price_row(name, everywhere(given_), given_).seconds.gather[0]) for name in ROWS} == {10.0}
