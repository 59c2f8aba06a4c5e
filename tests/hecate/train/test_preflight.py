"""What is checked before ranks start."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hecate.errors import UserError
from hecate.train import preflight
from hecate.train.preflight import check_devices


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, "nproc")
    with pytest.raises(UserError) as refused:
        check_devices(3, "nproc")
    assert str(refused.value) == "nproc: 3 ranks, but this machine has 2 GPUs, and each rank takes one\n  set nproc to 2 at most"


def test_without_gpus_any_number_of_ranks_shares_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices(64, "nproc")


def test_without_a_gpus_driver_torch_is_not_imported() -> None:
    """The launcher has no other need of torch, whose import takes seconds."""
    program = (
        "import sys\nfrom hecate.train import preflight\npreflight._GPU_FILES = ('/nowhere',)\n"
        "preflight.check_devices(4, 'nproc')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
