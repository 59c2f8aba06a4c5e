"""Drifting loads drift as they are called, and a row of the comparison has each way to plan and the best other policy that fits."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drift import CHOICES, compare, summary
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.workloads import DRIFTING
from testing.plan_cases import EXPERTS, kinds, plan_input, topologies


def moved(name: str, steps: int) -> np.ndarray:
    """By step, the share of assignments that go to other experts than in the step before."""
    share_SE = DRIFTING[name](steps, 1, 4, EXPERTS, 100_000, 2, 0)[:, 0].sum(-1)
    share_SE = share_SE / share_SE.sum(1, keepdims=True)
    return np.asarray(np.abs(np.diff(share_SE, axis=0)).sum(1) / 2)


@pytest.mark.parametrize("period", [10, 50])
def test_a_topic_lasts_its_steps(period: int) -> None:
    found = moved(f"topic_every_{period}", period + 2)
    assert found.argmax() == period - 1
    assert np.sort(found)[-2] < 0.1 * found.max()


def test_noise_is_as_large_as_it_says() -> None:
    small, medium, large = (moved(f"noise_{share}", 5).mean() for share in (5, 20, 50))
    assert medium == pytest.approx(4 * small, rel=0.4)
    assert large == pytest.approx(2.5 * medium, rel=0.4)


def test_a_router_collapses_in_its_first_hundred_steps() -> None:
    loads_SE = DRIFTING["router_collapse"](120, 1, 2, EXPERTS, 10_000, 2, 0)[:, 0].sum(-1)
    over_mean_S = loads_SE.max(1) / loads_SE.mean(1)
    assert over_mean_S[0] < 1.5
    assert over_mean_S[100] > 4 * over_mean_S[0]
    assert over_mean_S[110:] == pytest.approx(over_mean_S[101], rel=0.1)


def test_a_row_has_each_way_and_the_best_other_policy_that_fits() -> None:
    topology, kind = topologies()["8x1"], kinds(4)[0]
    loads = DRIFTING["topic_every_10"](4, 1, 8, EXPERTS, 512, 4, 0)
    slots_D = plan_input(topology, kind.cost, loads[0, 0], 2).slots_D
    (row,) = compare(Setting(topology=topology, cost=kind.cost, slots_D=slots_D, run_steps=4), loads)
    assert all(row[choice] > 0 for choice in CHOICES)
    assert not row["which"].startswith("full"), "there is room for two replicas"
    rows = [row | {"workload": "topic_every_10"}, row | {"workload": "trained_steady"}]
    assert summary(rows)["history_over_best_other_worst"] == pytest.approx(row["history"] / row["best_other"])
