"""Megatron's front end on mock GPUs: losses are the CPU's, in float32 and bfloat16, with Megatron's own MoE layers and with split weights.

Megatron's layers find CUDA there, so nothing of `hecate.megatron.without_cuda` takes part: they ask the mock device for streams and events.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.hecate.megatron.making import write_parts
from tests.mock_cuda.runs import Runs, do

SHAPE = "{kind: full, hidden: 32, ffn: 48, layers: 2, seq: 32, experts: 4, top_k: 2, query_width: 256, key_value_width: 128}\n"
"""four heads of 64 for queries, two for keys"""
STEPS = 3
BFLOAT16 = "model.dtype=bfloat16"
MEGATRONS = "fssdp.policy=megatron_ep"
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "alone": ("gradient_checkpointing=true",),
        "unpacked": ("data.packing=false", "gradient_accumulation_steps=2", "micro_batch_size=1"),
        "narrow": (BFLOAT16,),
        "narrow-triton": (BFLOAT16, "kernels=triton", "micro_batch_size=1"),
        "megatrons": (MEGATRONS,),
    },
    2: {
        "static_ep": ("fssdp.policy=static_ep",),
        "tensor": ("model.tensor_parallel=2", "micro_batch_size=4"),
        "narrow": (BFLOAT16, "fssdp.policy=static_ep"),
        "narrow-tensor": (BFLOAT16, "model.tensor_parallel=2", "micro_batch_size=4"),
        "megatrons": (MEGATRONS,),
        "narrow-megatrons": (MEGATRONS, BFLOAT16, "gradient_accumulation_steps=2", "micro_batch_size=1"),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("megatron")
    write_parts(made)
    (made / "tiny.yaml").write_text(SHAPE, encoding="utf-8")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("world", CASES)
def test_losses_are_those_of_the_cpu(folder: Path, world: int) -> None:
    overrides = {case: [f"max_steps={STEPS}", *changes] for case, changes in CASES[world].items()}
    for lines in overrides.values():
        lines += [] if BFLOAT16 in lines else ["model.dtype=float32"]
        lines += [] if MEGATRONS in lines or "kernels=triton" in lines else ["kernels=torch"]
    cpu = Runs(str(folder / "config.yaml"), str(folder / f"cpu{world}"), world, mock=False, overrides=overrides)
    mock = do(replace(cpu, folder=str(folder / f"mock{world}"), mock=True))
    do(cpu)
    for case in CASES[world]:
        got, wanted = mock.losses(case), cpu.losses(case)
        assert len(got) == STEPS, case
        for one, other in zip(got, wanted, strict=True):
            assert one == pytest.approx(other, rel=5e-3 if case.startswith("narrow") else 1e-6), case
        (step,) = mock.steps(case, rank=0)
        assert bool(step["launches"]) == (case == "narrow-triton"), "not the kernels that were chosen"
