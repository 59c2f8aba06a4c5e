"""Runs of several ranks in bfloat16: near those in float32, alike on all ranks, resumed bit for bit, with parts and without."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import FOUR_HEADS, config_of, tensor_ranks_of, write_parts

pytestmark = pytest.mark.slow
STEPS, SAVED = 4, 2
COMMON = (f"max_steps={STEPS}", "max_grad_norm=0.5")
BFLOAT16 = "model.dtype=bfloat16"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "owners": (1, ("fssdp.policy=static_ep", "micro_batch_size=2")),
    "accumulating": (1, ("fssdp.policy=full", "fssdp.rematerialize=true", "micro_batch_size=1", "gradient_accumulation_steps=2")),
    "megatrons": (1, ("fssdp.policy=megatron_ep", "micro_batch_size=1", "gradient_accumulation_steps=2")),
    "tensor": (2, ("model.tensor_parallel=2", "micro_batch_size=4", "gradient_checkpointing=true")),
}
"""tensor groups of how many ranks, and settings"""

Steps = list[tuple[float, float, float]]
"""loss, aux loss and gradient norm of each"""


@dataclass(frozen=True)
class Found:
    """By one rank."""

    steps: Steps
    resumed: Steps
    masters: str
    """digest of what all ranks hold alike, at the end"""


def _go_on(run: Training, save_at: int | None = None) -> Steps:
    steps = []
    while run.run_state.step < STEPS:
        result = run.train_one().result
        steps.append((result.loss, result.aux_loss, result.grad_norm))
        if run.run_state.step == save_at:
            run.save()
    return steps


def _train(folder: Path, ranks: Ranks, *overrides: str) -> Found:
    run = Training(config_of(folder, *COMMON, *overrides), ranks)
    steps = _go_on(run, SAVED)
    digest = hashlib.sha256()
    for _, parameter in sorted(run.parts.moe.replicated_parameters().items()):
        digest.update(parameter.detach().numpy().tobytes())
    return Found(steps, _go_on(Training(config_of(folder, *COMMON, *overrides, "resume=true"), ranks)), digest.hexdigest())


def _two_ranks(rank: int, world: int, folder: str) -> dict[str, Found]:
    return {
        name: _train(Path(folder), tensor_ranks_of(rank, world, tensor), BFLOAT16, *settings, f"output_dir={folder}/{name}")
        for name, (tensor, settings) in CASES.items()
    }


def _one_rank(rank: int, world: int, folder: str) -> tuple[Steps, Steps]:
    """A run in float32; and the end of the one that two ranks with parts began."""
    ranks = tensor_ranks_of(rank, world, 1)
    wide = _train(Path(folder), ranks, "micro_batch_size=4", f"output_dir={folder}/wide").steps
    ended = config_of(Path(folder), *COMMON, BFLOAT16, "micro_batch_size=4", f"output_dir={folder}/tensor", "resume=true")
    return wide, _go_on(Training(ended, ranks))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bfloat16")
    write_parts(made)
    (made / "tiny.yaml").write_text(FOUR_HEADS)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Found]]:
    return run_ranks(2, _two_ranks, str(folder))


@pytest.fixture(scope="module")
def alone(folder: Path, found: list[dict[str, Found]]) -> tuple[Steps, Steps]:
    assert found
    (both,) = run_ranks(1, _one_rank, str(folder))
    return both


def _near(got: Steps, wanted: Steps, name: str) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one[0] == pytest.approx(other[0], rel=2e-3), name
        assert one == pytest.approx(other, rel=0.05), name


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_come_near_to_float32(found: list[dict[str, Found]], alone: tuple[Steps, Steps], name: str) -> None:
    first, second = (rank[name] for rank in found)
    assert first == second
    assert alone[0][-1][0] < alone[0][0][0] - 0.3
    _near(first.steps, alone[0], name)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_goes_on_bit_for_bit(found: list[dict[str, Found]], name: str) -> None:
    for rank in found:
        assert rank[name].resumed == rank[name].steps[SAVED:]


def test_a_checkpoint_of_parts_goes_on_without_them(found: list[dict[str, Found]], alone: tuple[Steps, Steps]) -> None:
    _near(alone[1], found[0]["tensor"].steps[SAVED:], "without parts")
