"""Megatron's front end on mock GPUs: losses are the CPU's, in float32 and bfloat16, with Megatron's own MoE layers and with split weights.

Megatron's layers find CUDA there, so nothing of `hecate.apps.megatron.without_cuda` takes part: they ask the mock device for streams and
events.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hecate.apps.megatron.making import FOUR_HEADS, write_parts
from tests.mock_cuda.runs import Runs, do

STEPS = 3
FLOAT64, BFLOAT16 = "model.dtype=float64", "model.dtype=bfloat16"
MEGATRONS, OWNERS, TENSOR = "fssdp.policy=megatron_ep", "fssdp.policy=static_ep", "model.tensor_parallel=2"
ACCUMULATED = ("gradient_accumulation_steps=2", "micro_batch_size=1")
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "checkpointed": (FLOAT64, "gradient_checkpointing=true"),
        "padded": (FLOAT64, "data.packing=false", *ACCUMULATED),
        "megatrons": (FLOAT64, MEGATRONS),
        "bfloat16": (BFLOAT16,),
        "bfloat16-triton": (BFLOAT16, "micro_batch_size=1"),
    },
    2: {
        "owners": (FLOAT64, OWNERS),
        "tensor": (FLOAT64, TENSOR, "micro_batch_size=4"),
        "megatrons": (FLOAT64, MEGATRONS),
        "bfloat16": (BFLOAT16, OWNERS),
        "bfloat16-tensor": (BFLOAT16, TENSOR, "micro_batch_size=4"),
        "bfloat16-megatrons": (BFLOAT16, MEGATRONS, *ACCUMULATED),
    },
}
"""number of ranks -> runs; hecate's experts compute in torch, those of a run called triton in Triton kernels on the mock GPU"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("megatron")
    write_parts(made)
    (made / "tiny.yaml").write_text(FOUR_HEADS, encoding="utf-8")
    return made


def kernels_of(case: str, on_mock: bool) -> list[str]:
    """Setting of a run's kernels; Megatron's own layers have none."""
    if "megatrons" in case:
        return []
    return ["kernels=triton" if on_mock and "triton" in case else "kernels=torch"]


def runs(folder: Path, world: int, *, on_mock: bool) -> Runs:
    overrides = {case: [f"max_steps={STEPS}", *settings, *kernels_of(case, on_mock)] for case, settings in CASES[world].items()}
    name = "mock" if on_mock else "cpu"
    return Runs(str(folder / "config.yaml"), str(folder / f"{name}{world}"), world, mock=on_mock, overrides=overrides)


@pytest.mark.slow
@pytest.mark.parametrize("world", CASES)
def test_losses_are_those_of_the_cpu(folder: Path, world: int) -> None:
    mock, cpu = do(runs(folder, world, on_mock=True)), do(runs(folder, world, on_mock=False))
    for case, settings in CASES[world].items():
        got, wanted = mock.losses(case), cpu.losses(case)
        assert len(got) == STEPS, case
        for one, other in zip(got, wanted, strict=True):
            assert one == pytest.approx(other, rel=5e-3 if BFLOAT16 in settings else 1e-9), case
        (step,) = mock.steps(case, rank=0)
        assert bool(step["launches"]) == ("triton" in case), "not the kernels that were chosen"
