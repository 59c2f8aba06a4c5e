"""What ranks read about their machines and devices, and tell each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hecate.config import load_config
from hecate.engine.from_config import job_topology
from hecate.parallel.cluster.topology_cards import RankDevice, SeenTopology
from hecate.ranks import devices
from testing.ranks import run_ranks
from tests.launch.profile.ranks import ranks_of

CONFIG = "model: {{name_or_path: {folder}/model}}\ndata: {{train: {folder}/data.jsonl}}\noutput_dir: {folder}/run\nmax_steps: 1\n"


def tell(rank: int, world_size: int, config_path: Path, hosts: list[str]) -> tuple[list[RankDevice], SeenTopology]:
    with mock.patch("socket.gethostname", return_value=hosts[rank]):
        ranks = ranks_of(rank, world_size)
        return devices.gather_devices(ranks), job_topology(load_config(config_path, claim_output=False), ranks)


def test_ranks_of_two_machines_see_two_nodes(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    by_rank = run_ranks(3, tell, tmp_path / "config.yaml", ["left", "a right one, öfter", "left"])
    assert by_rank[0] == by_rank[1] == by_rank[2], "ranks disagree"
    told, seen = by_rank[0]
    assert [device.node.split(",")[0].split(" ")[0] for device in told] == ["left", "a", "left"]
    assert "öfter" in told[1].node
    assert [device.card for device in told] == [None] * 3
    assert seen.topology.node_of_rank == (0, 1, 0)


def test_machines_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    names = []
    for boot in ("first", "second"):
        (tmp_path / boot).write_text(f"{boot}\n", encoding="ascii")
        monkeypatch.setattr(devices, "_BOOT_ID", tmp_path / boot)
        names.append(devices.device_of(torch.device("cpu")).node)
    monkeypatch.setattr(devices, "_BOOT_ID", tmp_path / "missing")
    assert [*names, devices.device_of(torch.device("cpu")).node] == ["localhost first", "localhost second", "localhost"]


def test_a_gpu_gives_its_name_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="NVIDIA L4", total_memory=23), SimpleNamespace(name="NVIDIA A10", total_memory=22)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device.index])
    seen = [devices.device_of(torch.device("cuda", index)) for index in range(2)]
    assert [(device.card, device.memory) for device in seen] == [("NVIDIA L4", 23.0), ("NVIDIA A10", 22.0)]
