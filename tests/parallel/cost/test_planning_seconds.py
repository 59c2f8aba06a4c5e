"""How long ranks wait for plans: as long as they were measured to take, in the order of magnitude, and on a slow host longer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cost.planning_seconds import planning_seconds


def test_it_is_what_was_recorded() -> None:
    """Within a factor of two at each size: the formula has two numbers for each way to plan."""
    found = json.loads((Path(__file__).parents[3] / "benchmarks/results/planner.json").read_text(encoding="utf-8"))["summary"]
    for experts, ranks in ((8, 4), (64, 32), (256, 320), (256, 1024)):
        seconds = planning_seconds("calibrated", experts, local_topology(ranks, cuda=False))
        recorded = found[f"auto_after_router_ms_e{experts}_d{ranks}"] / 1e3
        assert recorded / 2 <= seconds <= 2 * recorded, (experts, ranks)


def test_history_is_planned_beside_other_work() -> None:
    assert planning_seconds("history", 256, local_topology(8, cuda=False)) == 0


def test_a_slow_host_takes_longer() -> None:
    topology = local_topology(8, cuda=False)
    once = planning_seconds("exact", 64, topology)
    assert planning_seconds("exact", 64, replace(topology, planning_slowdown=3.0)) == pytest.approx(3 * once)
