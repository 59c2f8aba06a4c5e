"""FSDP over experts beside expert parallelism, by hand, and the memory that it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hecate.apps.foresee.cases import Case, Options, synthetic_cases
from hecate.apps.foresee.fsdp_ep import fsdp_ep_bytes, fsdp_ep_sizes
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost

CLUSTER = """
nodes: [{{devices: 2, flops: 1.0e+9, memory: {memory}}}, {{devices: 2, flops: 1.0e+9, memory: {memory}}}]
intra_node: {{bandwidth: 1.0e+8, latency: {latency}}}
inter_node: {{bandwidth: 1.0e+7, latency: 1.0e-3}}
"""
MODEL = "{kind: full, hidden: 8, ffn: 16, layers: 3, seq: 8, experts: 4, top_k: 1}"
OPTIONS = Options(policies=("fsdp_ep",), steps=3, run_steps=3)
EXPERT, STATE = 3 * 8 * 16 * 2, 3 * 3 * 8 * 16 * 4
"""bytes of an expert's parameters, of which there are three matrices, and of its masters and moments"""


def case(folder: Path, memory: float = 1e9, latency: float = 1e-4) -> Case:
    (folder / "cluster.yaml").write_text(CLUSTER.format(memory=memory, latency=latency))
    (folder / "small.yaml").write_text(MODEL)
    (found,) = synthetic_cases(str(folder / "cluster.yaml"), str(folder / "small.yaml"), ["balanced"], 64)
    return found


@pytest.mark.parametrize("resharded", [False, True])
@pytest.mark.parametrize(("latency", "fastest"), [(1e-4, 1), (1e-5, 2)])
def test_seconds_by_hand(tmp_path: Path, latency: float, fastest: int, resharded: bool) -> None:
    """In groups of one each rank sends three quarters of all four experts to the next rank, which for one of a node's two is far.

    In groups of two, a node each, a rank sends half of its two experts to its partner over there: both of a node through its uplink. Half
    of the tokens go to the other rank of the node, in messages whose latency decides. That is so in three layers: their gathers, before the
    backward pass again if they were freed, and their gradients.
    """
    one = case(tmp_path, latency=latency)
    execution = ExecutionMode(rematerialize=resharded)
    (row,) = one.run(replace(OPTIONS, execution=execution))
    assert (fsdp_ep_sizes(4, 4), fsdp_ep_sizes(4, 6)) == ([1, 2, 4], [1, 2])
    cost = one.model.layer_cost(64)
    attention = cost.non_moe_flops / 1e9
    sizes = {1: (4, 3 / 4, 1), 2: (2, 1 / 2, 2)}  # experts of a rank, the share of them that it sends, rings through an uplink
    seconds = {}
    for size, (owned, share, rings) in sizes.items():
        transfer = owned * share * EXPERT * rings / 1e7 + 1e-3 + (latency if size == 1 else 0.0)
        back = 2 * transfer if resharded else transfer
        exposed = max(transfer - attention, 0.0) + max(back - 2 * attention, 0.0)
        compute = 64 * cost.assignment_flops * 3 / 1e9
        moved = 32 * cost.row_bytes / 1e8
        tokens = 4 * moved + 8 * latency if size == 2 else 0.0
        optimizer = owned * (EXPERT + 2 * STATE) / (1e9 / 150) / (4 / size)
        seconds[size] = 3 * (3 * attention + compute + tokens + exposed + optimizer)
        if row["shard_size"] == size:
            assert row["seconds"]["gather"] == pytest.approx(3 * transfer)
            assert row["seconds"]["reduce"] == pytest.approx(3 * transfer)
            assert row["seconds"]["exposed"] == pytest.approx(3 * exposed)
            assert row["seconds"]["optimizer"] == pytest.approx(3 * optimizer)
            passes = 3 if resharded else 2
            assert row["bytes"]["busiest_uplink"] == pytest.approx(3 * passes * owned * share * EXPERT * rings)
    assert row["shard_size"] == fastest
    assert row["step_seconds"] == pytest.approx(seconds[row["shard_size"]])
    assert row["step_seconds"] == pytest.approx(min(seconds.values()))
    assert row["first_seconds"] == pytest.approx(row["step_seconds"])


def test_memory_by_hand() -> None:
    """Two experts of a rank in three layers, with 4 + 5 + 7 bytes of parameters, gradients and state, halved; two layers gathered."""
    cost, mesh = LayerCost(trainable_bytes=4.0, gradient_bytes=5.0, state_bytes=7.0), make_mesh(4, 2)
    sizes = {"num_layers": 3, "num_experts": 4}
    assert fsdp_ep_bytes(cost, mesh, **sizes, resharded=True) == 2 * (3 * 12 / 2 + 2 * 4 + 2 * 5)
    assert fsdp_ep_bytes(cost, mesh, **sizes, resharded=False) == 2 * (3 * 12 / 2 + 3 * 4 + 2 * 5)
    assert fsdp_ep_bytes(cost, make_mesh(4), **sizes, resharded=True) == 3 * (4 + 12), "one group: nothing is shared"


def test_what_memory_refuses(tmp_path: Path) -> None:
    """Each size, freed or kept, is taken only where it fits; where none does the row is that of the least memory, and says so."""
    roomy = case(tmp_path)
    cost = roomy.model.layer_cost(64)
    held = {
        (size, resharded): roomy.model.replicated_bytes()
        + fsdp_ep_bytes(cost, make_mesh(4, size), num_layers=3, num_experts=4, resharded=resharded)
        for size in (1, 2, 4)
        for resharded in (False, True)
    }
    (best,) = roomy.run(OPTIONS)
    assert best["fits_memory"]
    assert best["memory_bytes"] == max(held.values()), "everything is kept"
    for memory in sorted(set(held.values())):
        (row,) = case(tmp_path, memory).run(OPTIONS)
        assert row["fits_memory"]
        assert row["memory_bytes"] <= memory
        assert row["step_seconds"] >= best["step_seconds"]
    least = min(held.values())
    (refused,) = case(tmp_path, least - 1).run(OPTIONS)
    assert (refused["fits_memory"], refused["memory_bytes"]) == (False, least)
