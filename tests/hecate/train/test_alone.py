"""Whole trainings of several adapters at once: each adapter is that of a training on its task alone, with its dropout and first values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.config import load_config
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group

RECIPE = Path(__file__).parents[3] / "configs" / "adapters.yaml"
STEPS = 3
LINEARS = ("moe.unit=linear", "lora.target_modules=[q_proj,down_proj]")
SOURCES = {"up": "up.train.jsonl", "echo": "echo.train.jsonl", "few": "up.eval.jsonl"}


def train(rank: int, world: int, settings: tuple[str, ...]) -> None:
    config = load_config(RECIPE, settings, claim_output=False)
    run = Training(config, ranks_of_default_group(rank, world))
    while run.run_state.step < config.max_steps:
        run.train_one()
    run.parts.output.replace(Path(config.output_dir), run.parts.moe, run.ranks)


def adapters_of(folder: Path, world: int, names: tuple[str, ...], more: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """What a training of these sources leaves, by source. A step has as many sequences of each, whatever the sources and the ranks."""
    output = folder / "runs" / f"{'-'.join(names)}-{world}"
    settings = (
        f"model.name_or_path={folder}/model",
        "model.dtype=float64",
        f"data.train=[{','.join(f'{{path: {folder}/{SOURCES[name]}, name: {name}}}' for name in names)}]",
        "data.seq_len=64",
        "data.separate=true",
        f"moe.num_experts={len(names)}",
        f"max_steps={STEPS}",
        f"micro_batch_size={len(names)}",
        f"gradient_accumulation_steps={4 // world}",
        "learning_rate=1e-2",
        "lora.dropout=0.25",
        f"output_dir={output}",
        *more,
    )
    run_ranks(world, train, settings)
    return {name: load_file(output / "adapters" / name / "adapter_model.safetensors") for name in names}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def check(folder: Path, world: int, more: tuple[str, ...]) -> None:
    together = adapters_of(folder, world, ("up", "echo", "few"), more)
    for name, tensors in together.items():
        alone = adapters_of(folder, 1, (name,), more)[name]
        assert tensors.keys() == alone.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, alone[key], rtol=0, atol=1e-9, msg=lambda text, key=key, name=name: f"{name}: {key}: {text}")
        assert any(key.endswith("lora_B.weight") and tensor.abs().max() > 1e-3 for key, tensor in tensors.items()), "nothing was learned"


@pytest.mark.parametrize("more", [(), LINEARS], ids=["ffn", "linears"])
def test_each_adapter_is_that_of_a_training_alone(workshop: Path, more: tuple[str, ...]) -> None:
    check(workshop, 1, more)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_it_is_on_several_ranks(workshop: Path, world: int) -> None:
    check(workshop, world, ("fssdp.policy=hecate_paper",))
