"""What is checked before ranks start."""

from __future__ import annotations

import pytest
import torch

from hecate.errors import UserError
from hecate.train.preflight import check_devices


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, "nproc")
    with pytest.raises(UserError) as refused:
        check_devices(3, "nproc")
    assert str(refused.value) == "nproc: 3 ranks, but this machine has 2 GPUs, and each rank takes one\n  set nproc to 2 at most"


def test_without_gpus_any_number_of_ranks_shares_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices(64, "nproc")
