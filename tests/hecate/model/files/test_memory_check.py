"""The check before a whole model is loaded asks the device that will hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hecate.model.files import memory_check
from hecate.model.files.memory_check import free_bytes


def test_free_memory_is_the_gpus_on_a_gpu_and_the_hosts_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + device.index, 1000))
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n", encoding="ascii")
    monkeypatch.setattr(memory_check, "_MEMINFO", tmp_path / "meminfo")
    assert free_bytes(torch.device("cuda", 2)) == 102
    assert free_bytes(torch.device("cpu")) == 5 * 1024
    monkeypatch.setattr(memory_check, "_MEMINFO", tmp_path / "missing")
    assert free_bytes(torch.device("cpu")) is None
