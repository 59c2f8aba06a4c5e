"""What the front end builds on one rank: kernels as they are chosen, and parameters in bfloat16 with masters in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hecate.experts import family as family_module
from hecate.kernels.backend import Backend, expert_kernels
from hecate.train.evaluate import evaluate
from hecate.train.training import Training
from tests.hecate.apps.megatron.making import config_of, ranks_of, require_megatron, write_parts

pytestmark = pytest.mark.usefixtures("one_rank")
BFLOAT16 = "model.dtype=bfloat16"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("front_end")
    write_parts(made)
    return made


def training(folder: Path, name: str, *overrides: str) -> Training:
    return Training(config_of(folder, f"max_steps={STEPS}", f"output_dir={folder}/{name}", *overrides), ranks_of(0, 1))


def go_on(run: Training) -> list[tuple[float, float, float]]:
    """Loss, aux loss and gradient norm of each step up to the last."""
    found = []
    while run.run_state.step < STEPS:
        result = run.train_one().result
        found.append((result.loss, result.aux_loss, result.grad_norm))
    return found


def test_experts_compute_by_the_kernels_that_are_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def watched(backend: Backend, *rest: object) -> object:
        asked.append(backend)
        return expert_kernels(backend, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(family_module, "expert_kernels", watched)
    training(folder, "kernels", "kernels=reference").train_one()
    assert asked == ["reference"] * 2, "of each of the two layers"


def test_a_run_in_bfloat16_goes_nearly_as_in_float32_and_resumes_bit_for_bit(folder: Path) -> None:
    wide, run = go_on(training(folder, "wide")), training(folder, "narrow", BFLOAT16)
    assert wide[-1][0] < wide[0][0] - 0.5
    first = run.train_one().result
    run.save()
    narrow = [(first.loss, first.aux_loss, first.grad_norm), *go_on(run)]
    for step, (got, wanted) in enumerate(zip(narrow, wide, strict=True)):
        assert got[0] == pytest.approx(wanted[0], rel=2e-3), step
        assert got == pytest.approx(wanted, rel=0.05), step
        assert got[0] != wanted[0], "nothing was rounded"
    again = training(folder, "narrow", BFLOAT16, "resume=true")
    assert go_on(again) == narrow[1:]
    for name, parameter in run.parts.moe.others.items():
        assert torch.equal(again.parts.moe.others[name], parameter), name
    held_out = [evaluate(one.parts.config, one.ranks, one.parts.base, one.parts.moe, one.parts.eval_sources) for one in (run, again)]
    assert held_out[0] == held_out[1]


def test_masters_begin_as_in_float32_and_are_what_is_trained_and_saved(folder: Path) -> None:
    wide, run = training(folder, "begins"), training(folder, "masters", BFLOAT16)
    model = {name: parameter for name, parameter in run.parts.base.model.named_parameters() if ".mlp." not in name}
    assert {parameter.dtype for parameter in model.values()} == {torch.bfloat16}
    assert model.keys() == run.parts.moe.others.keys() == wide.parts.moe.others.keys()
    for name, master in run.parts.moe.others.items():
        assert torch.equal(master, wide.parts.moe.others[name]), name
    run.train_one()
    saved = run.save()
    assert saved.folder is not None
    tensors = run.parts.optimizer.state_tensors()
    for name, master in run.parts.moe.others.items():
        assert not torch.equal(master, wide.parts.moe.others[name]), f"{name} has not moved"
        assert {tensors[f"replicated/{name}{key}"].dtype for key in ("", "/exp_avg", "/exp_avg_sq")} == {torch.float32}, name
    assert (
        run.parts.moe.others["embedding.word_embeddings.weight"]
        .bfloat16()
        .float()
        .ne(run.parts.moe.others["embedding.word_embeddings.weight"])
        .any()
    ), "the masters hold no more than bfloat16 can"


def test_the_model_that_is_left_is_the_masters_in_bfloat16(folder: Path) -> None:
    run = training(folder, "left", BFLOAT16)
    run.train_one()
    left = run.parts.output.replace(folder / "left", run.parts.moe, run.ranks)
    assert json.loads((left / "config.json").read_text())["dtype"] == "bfloat16"
    found = {}
    for file in left.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    master = run.parts.moe.others["embedding.word_embeddings.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], master.detach().bfloat16())


def test_gradients_of_megatrons_experts_are_added_up_in_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-step's leave Megatron's layers, which would add them up in bfloat16."""
    from hecate.apps.megatron import expert_parallel_engine as engine_module

    run = training(folder, "megatrons", BFLOAT16, "fssdp.policy=megatron_ep", "gradient_accumulation_steps=2", "micro_batch_size=1")
    plain, taken = engine_module.write_gradients, []

    def watched(layer: Any, grad_nC: torch.Tensor) -> None:
        taken.append({weight.grad.dtype for weight in layer.experts.parameters() if weight.grad is not None} | {grad_nC.dtype})
        plain(layer, grad_nC)
        assert all(weight.grad is None for weight in layer.experts.parameters())

    monkeypatch.setattr(engine_module, "write_gradients", watched)
    run.train_one()
    assert taken == [{torch.bfloat16, torch.float32}] * 4, "two layers, two micro-steps"


def test_the_type_is_float32_on_every_cpu_and_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    require_megatron()
    from hecate.apps.megatron.front_end import computed_dtype

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert computed_dtype("auto", cpu) == computed_dtype("float32", gpu) == torch.float32
    assert computed_dtype("auto", gpu) == computed_dtype("bfloat16", cpu) == torch.bfloat16
    assert computed_dtype("float64", gpu) == torch.float64
