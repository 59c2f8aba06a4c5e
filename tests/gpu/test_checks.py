"""What each check of gpu-check makes of what its trainings and programs have found: right results pass, and one that is off fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device_checks, several_gpus, training_checks
from tests.gpu.bench import LAYERS, Bench, Check, Failed, Figures, Skipped
from tests.host_waits import expected_waits

GOOD = (5.0, 1.0, 2.0)
STEPS = 4


@dataclass
class Canned:
    """Runs that have been done already."""

    off: float
    """added to the last loss"""
    waits: dict[str, int]

    def losses(self, name: str) -> list[tuple[float, float, float]]:
        return [GOOD] * (STEPS - 1) + [(GOOD[0] + self.off, *GOOD[1:])]

    def steps(self, name: str, rank: int) -> list[dict[str, Any]]:
        return [{"waits": self.waits}]

    def evaluations(self, name: str) -> list[dict[str, dict[str, float]]]:
        return [{"up.eval": {"loss": 4.0 + self.off}}]

    def answered(self, name: str) -> dict[str, str]:
        return {"answer": "ab", "printed": "up.eval"}


@dataclass
class CannedBench(Bench):
    """Trains nothing. The trainings whose name has `wrong` in it are off."""

    wrong: str = "none"
    waits: dict[str, int] = field(default_factory=lambda: dict(expected_waits(layers=LAYERS, micro_steps=1)))
    figures: Figures = field(default_factory=dict)
    """of programs on the device"""
    trained: list[str] = field(default_factory=list)

    def train(self, name: str, cases: Any, **_: Any) -> Any:
        self.trained.append(name)
        return Canned(0.5 if self.wrong in name else 0.0, self.waits)

    def on_device(self, module: str, *arguments: str) -> str:
        return "a line of torch's\n" + json.dumps(self.figures)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., CannedBench]:
    return lambda **facts: CannedBench(tmp_path, **{"mock": False, "gpus": 2, "seconds": 600.0, **facts})


TRAINED: dict[Check, str] = {
    training_checks.float64_losses: "torch",
    training_checks.float32_losses: "triton",
    training_checks.bfloat16_losses: "triton",
    training_checks.freed_replicas: "uncached",
    training_checks.save_and_resume: "resumed",
    several_gpus.two_gpus: "gpu",
}
"""check -> a training of it that must not be off"""


@pytest.mark.parametrize("check", TRAINED, ids=lambda check: check.__name__)
def test_a_training_that_is_off_fails(bench: Callable[..., CannedBench], check: Check) -> None:
    assert all(isinstance(value, str) or value == 0 for value in check(bench()).values())
    with pytest.raises(Failed, match=r"losses differ by|held-out loss"):
        check(bench(wrong=TRAINED[check]))


def test_one_wait_more_fails(bench: Callable[..., CannedBench]) -> None:
    assert set(training_checks.host_waits(bench()).values()) == {2.0}
    more = dict(expected_waits(layers=LAYERS, micro_steps=1)) | {"hecate/experts/layer.py:forward": 1}
    with pytest.raises(Failed, match=r"hecate/experts/layer\.py:forward"):
        training_checks.host_waits(bench(waits=more))


def test_side_streams_show_nothing_where_memory_is_not_used_again(bench: Callable[..., CannedBench]) -> None:
    assert device_checks.side_streams(bench(figures={"freed_memory_was_used_again": 1.0}))
    with pytest.raises(Skipped, match="nothing was shown"):
        device_checks.side_streams(bench(figures={"freed_memory_was_used_again": 0.0}))
    assert device_checks.side_streams(bench(figures={"freed_memory_was_used_again": 0.0}, mock=True)), "a mock GPU has no streams"


@pytest.mark.parametrize("check", [several_gpus.two_gpus, several_gpus.uneven_exchanges, several_gpus.killed_rank])
def test_one_gpu_is_not_enough(bench: Callable[..., CannedBench], check: Check) -> None:
    with pytest.raises(Skipped, match="needs 2 GPUs, and there is 1"):
        check(bench(gpus=1))


def test_figures_of_both_ways_of_padding(bench: Callable[..., CannedBench]) -> None:
    found = device_checks.profile(bench(figures={"idle_share": 0.5}))
    assert found == {"packed_idle_share": 0.5, "padded_idle_share": 0.5}
    with pytest.raises(Skipped, match="a mock GPU"):
        device_checks.profile(bench(mock=True))


def test_a_program_that_fails_or_hangs(tmp_path: Path) -> None:
    real = Bench(tmp_path, mock=False, gpus=1, seconds=60)
    assert real.program(["sh", "-c", "echo said"]) == "said\n"
    with pytest.raises(Failed, match=r"(?s)exit status 3.*why"):
        real.program(["sh", "-c", "echo why >&2; exit 3"])
    with pytest.raises(Failed, match="did not end in 1 seconds"):
        real.program(["sleep", "20"], seconds=0.1)
    assert real.program(["sh", "-c", "echo $PYTHONPATH"], first_path=tmp_path).startswith(f"{tmp_path}:")
