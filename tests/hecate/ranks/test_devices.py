"""What ranks read about their machines and devices, and tell each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hecate.config import load_config
from hecate.engine.from_config import job_topology
from hecate.parallel.cluster.gpu_memory import CONTEXT_BYTES, nccl_bytes
from hecate.parallel.cluster.mesh import Mesh
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
        names.append(devices._node_name())
    monkeypatch.setattr(devices, "_BOOT_ID", tmp_path / "missing")
    assert [*names, devices._node_name()] == ["localhost first", "localhost second", "localhost"]


def test_a_gpu_gives_its_name_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="NVIDIA L4", total_memory=23), SimpleNamespace(name="NVIDIA A10", total_memory=22)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device.index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 + device.index, 23))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 + device.index)
    seen = [devices._gpu(torch.device("cuda", index)) for index in range(2)]
    assert seen == [("NVIDIA L4", 0, 10, 5), ("NVIDIA A10", 1, 11, 6)]


def tell_memory(rank: int, world_size: int, hosts: str, rows: list[tuple[str | None, int, int, int]]) -> list[RankDevice]:
    with mock.patch("socket.gethostname", return_value=hosts[rank]), mock.patch.object(devices, "_gpu", return_value=rows[rank]):
        return devices.gather_devices(ranks_of(rank, world_size))


def test_memory_is_what_tensors_can_have_and_what_the_forecast_takes_for_taken() -> None:
    """Ranks 0 and 2 share a GPU of 80 GB, of which 40 GB are free; rank 1 has another one, of another machine, for itself."""
    rows = [("H100", 0, 40 * 10**9, 10**9), ("H100", 0, 60 * 10**9, 15 * 10**9), ("H100", 0, 40 * 10**9, 0)]
    told, *others = run_ranks(3, tell_memory, "aba", rows)
    assert others == [told, told], "ranks disagree"
    taken = CONTEXT_BYTES + nccl_bytes(Mesh(3, 3), (0, 1, 0), sharded_layers=False)
    for device, own, estimate in zip(told, (21e9, 75e9, 20e9), taken.tolist(), strict=True):
        assert device.memory is not None
        assert 0 <= own + estimate - device.memory < 256 * 2**20
        assert device.memory % (256 * 2**20) == 0, "a run that goes on would be planned otherwise"
