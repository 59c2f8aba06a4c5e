"""The summary says which device's peak memory it gives."""

from __future__ import annotations

import pytest
import torch

from hecate.train.loop import peak_memory


def test_on_a_gpu_the_gpus_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 + device.index)
    assert peak_memory(torch.device("cuda", 1)) == (124, "peak GPU memory")


def test_elsewhere_it_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, label = peak_memory(torch.device("cpu"))
    assert label == "peak memory"
    assert peak > 1 << 20
