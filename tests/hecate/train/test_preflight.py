"""What is checked before ranks start."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch

from hecate.config.schema import ModelConfig
from hecate.errors import UserError
from hecate.train import preflight
from hecate.train.preflight import check_attention, check_devices


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, "nproc")
    with pytest.raises(UserError) as refused:
        check_devices(3, "nproc")
    assert str(refused.value).startswith("nproc: 3 ranks, but this machine has 2 GPUs, and each rank takes one\n  set nproc to 2 at most")
    monkeypatch.setenv("HECATE_COLLECTIVES", "gloo")
    check_devices(3, "nproc")
    monkeypatch.setenv("HECATE_COLLECTIVES", "nccl")
    with pytest.raises(UserError):
        check_devices(3, "nproc")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    check_devices(3, "nproc")


def test_without_gpus_any_number_of_ranks_shares_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices(64, "nproc")


def test_without_a_gpus_driver_torch_is_not_imported() -> None:
    """The launcher has no other need of torch, whose import takes seconds."""
    program = (
        "import sys\nfrom hecate.config.schema import ModelConfig\nfrom hecate.train import preflight\n"
        "preflight._GPU_FILES = ('/nowhere',)\n"
        "preflight.check_devices(4, 'nproc')\npreflight.check_attention(ModelConfig(name_or_path=''))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(("ranks", "gpu", "warned"), [(64, False, True), (4, False, False), (64, True, False)])
def test_many_more_ranks_than_cores_are_warned_of(
    ranks: int, gpu: bool, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(preflight, "_GPU_FILES", ("/dev/null",) if gpu else ())
    preflight.warn_of_cores(ranks, "nproc")
    expected = "hecate: warning: nproc: 64 ranks on 2 cores wait for each other; nproc=2 is faster\n" if warned else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("asked", "why"), [("flex", "has no backward pass on a CPU"), ("flash", "does not run on a CPU")])
def test_attention_that_needs_a_gpu_is_refused_without_one(
    asked: Literal["flex", "flash"], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{asked} {why}"):
        check_attention(ModelConfig(name_or_path="", attention=asked))
    check_attention(ModelConfig(name_or_path="", attention="sdpa"))


def test_flash_attention_in_float32_is_refused_where_auto_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="the model is in float32"):
        check_attention(ModelConfig(name_or_path="", attention="flash"))
