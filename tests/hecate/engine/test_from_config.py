"""Each key of the configuration that the engine plans with reaches it, under the engine's own name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hecate.config import Config, DataConfig, DataSource, FssdpConfig, ModelConfig, MoeConfig
from hecate.engine.from_config import engine_config
from hecate.engine.step_plans import EngineConfig
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES

TOPOLOGY = "nodes: [{devices: 2, flops: 7e9, memory: 3e9}]\nintra_node: {bandwidth: 5e9, latency: 1e-6}\n"


def config(**changes: Any) -> Config:
    fssdp = FssdpConfig(policy="laer", plan="calibrated", rematerialize=True, prefetch=3, max_imbalance=1.25, load_window=7, memory_slots=2)
    return Config(
        model=ModelConfig(name_or_path="m"),
        data=DataConfig(train=(DataSource(path="a.jsonl", name="a"),)),
        output_dir="runs/a",
        max_steps=1,
        moe=MoeConfig(num_experts=8, top_k=3),
        fssdp=fssdp,
        **changes,
    )


def test_the_engine_plans_with_what_is_configured() -> None:
    ranks: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    given = local_topology(2, cuda=False)
    assert engine_config(config(), ranks, 12.5, given) == EngineConfig(
        planner=POLICIES["laer"],
        topology=given,
        load_window=7,
        memory_slots=2,
        max_imbalance=1.25,
        top_k=3,
        non_moe_flops=12.5,
        plan="calibrated",
        rematerialize=True,
        prefetch=3,
        max_steps=1,
    )


def test_the_configured_topology_is_read_where_none_is_given(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TOPOLOGY, encoding="utf-8")
    ranks: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    topology = engine_config(config(topology=str(tmp_path / "two.yaml")), ranks, 0.0).topology
    assert (topology.node_of_rank, topology.flops, topology.intra_node.bandwidth) == ((0, 0), (7e9, 7e9), 5e9)
