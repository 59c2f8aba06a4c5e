"""Ranks get threads for the cores that they may use, not for the machine's (`hecate.ranks.cores`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hecate.launch.local_launcher import _environment
from hecate.ranks.cores import usable_cores


@pytest.mark.parametrize(("cpu_max", "cores"), [("max 100000", 6), ("400000 100000", 4), ("50000 100000", 1), (None, 6)])
def test_a_containers_share_and_the_affinity_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str | None, cores: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr("hecate.ranks.cores._CGROUP", tmp_path)
    if cpu_max is not None:
        (tmp_path / "cpu.max").write_text(f"{cpu_max}\n")
    assert usable_cores() == cores
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
