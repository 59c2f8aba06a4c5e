"""Profiles of real ranks with small messages, and the `hecate profile` command."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from hecate.cli import app
from hecate.config import load_config
from hecate.config.files.topology import build_topology
from hecate.errors import UserError
from hecate.launch.profile.probe import ProbeSizes
from hecate.launch.profile.run import profile
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import load_topology
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks
from tests.launch.profile.ranks import ranks_of

SIZES = ProbeSizes(matmul=64, copy_bytes=1 << 16, small_bytes=64, large_bytes=1 << 16, seconds=0.01)


def measure(rank: int, world_size: int, out: Path, hosts: list[str]) -> Topology:
    with mock.patch("socket.gethostname", return_value=hosts[rank]):
        return profile(ranks_of(rank, world_size), out, SIZES)


def test_two_ranks_write_a_file_that_a_run_takes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "measured.yaml"
    by_rank = run_ranks(2, measure, out, ["here", "here"])
    topology = load_topology(out)
    assert by_rank == [topology, topology], "ranks disagree, or the file does not say what they found"
    assert topology.node_of_rank == (0, 0)
    first, second = out.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# Measured by `hecate profile` on 2")
    assert torch.__version__ in first
    assert "gloo" in first
    assert second.startswith("# here: 2 x ")

    (tmp_path / "data.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{name_or_path: {tmp_path}/model}}\ndata: {{train: {tmp_path}/data.jsonl}}\n"
        f"output_dir: {tmp_path}/run\nmax_steps: 1\ntopology: {out}\n",
        encoding="utf-8",
    )
    ranks = Ranks(0, 2, torch.device("cpu"), groups=mock.Mock())
    assert build_topology(load_config(config, claim_output=False), ranks.world_size) == topology


def test_ranks_of_two_hosts(tmp_path: Path) -> None:
    """Two nodes of two and one rank, dealt in turn, so that uplinks are measured and the file must name the ranks."""
    out = tmp_path / "measured.yaml"
    by_rank = run_ranks(3, measure, out, ["left", "right", "left"])
    assert by_rank == [load_topology(out)] * 3
    assert by_rank[0].node_of_rank == (0, 1, 0)
    assert by_rank[0].inter_node.latency > 0
    text = out.read_text(encoding="utf-8")
    assert "# left: 2 x " in text
    assert "# right: 1 x " in text


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], int]]:
    calls: list[tuple[str, list[str], int]] = []

    def launch(program: str, arguments: list[str], ranks: int) -> int:
        calls.append((program, arguments, ranks))
        return 0

    monkeypatch.setattr("hecate.launch.local_launcher.launch_local", launch)
    monkeypatch.delenv("RANK", raising=False)
    return calls


def test_the_command_starts_local_ranks(tmp_path: Path, launched: list[tuple[str, list[str], int]]) -> None:
    out = tmp_path / "machine.yaml"
    assert CliRunner().invoke(app, ["profile", "--out", str(out), "--nproc", "3"]).exit_code == 0
    assert launched == [("hecate.launch.profile.rank_main", [str(out)], 3)]


def test_the_command_refuses_first_what_it_could_not_write_last(tmp_path: Path, launched: list[tuple[str, list[str], int]]) -> None:
    result = CliRunner().invoke(app, ["profile", "--out", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert str(tmp_path) in str(result.exception)
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(app, ["profile", "--out", str(tmp_path / "file" / "out.yaml")])
    assert isinstance(result.exception, UserError)
    assert launched == []


def test_torchrun_decides_on_the_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    result = CliRunner().invoke(app, ["profile", "--out", str(tmp_path / "out.yaml"), "--nproc", "3"])
    assert isinstance(result.exception, UserError)
    assert "--nproc-per-node" in str(result.exception)
