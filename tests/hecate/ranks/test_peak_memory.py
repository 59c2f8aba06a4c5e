"""The summary says which device's peak memory it gives."""

from __future__ import annotations

import pytest
import torch

from hecate.ranks.peak_memory import peak_memory


def test_on_a_gpu_the_gpus_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 + device.index)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 456 + device.index)
    assert peak_memory(torch.device("cuda", 1)) == {"peak GPU memory, allocated": 124, "peak GPU memory, reserved": 457}


def test_elsewhere_it_is_the_processs() -> None:
    (label, peak), *others = peak_memory(torch.device("cpu")).items()
    assert (label, others) == ("peak memory", [])
    assert peak > 1 << 20
