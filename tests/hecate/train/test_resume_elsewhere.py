"""A run that is resumed on another number of ranks ends with the same result as a run that never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hecate.config import load_config
from hecate.train.training import Training
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import Losses, ranks_of_default_group, settings_of, train_until
from tests.plain_lora import PlainAdapter
from tests.plain_moe_lora import save_tiny

KINDS: dict[str, tuple[str, ...]] = {
    "LoRA over a dense base": (),
    "full experts": ("moe.family=full", "moe.upcycle_noise=0.1", "model.train_non_experts=true", "learning_rate=3e-3"),
    "LoRA over linears": ("moe.unit=linear",),
    "a fixed A over linears": ("moe.unit=linear", "lora.pairs=fixed_a"),
    "coefficients of drawn matrices": ("lora.pairs=nola", "lora.nola.bases=16", "learning_rate=3e-2"),
    "a rule for gradients": ("lora.gradient_rule=row_norm", "lora.eta=2.0", "lora.alpha=null", "lora.dropout=0"),
    "shards of pools": ("moe.unit=linear", "lora.pairs=shards", "lora.r=5"),
    "LoRA over frozen experts": ("moe.family=moe_lora", "moe.train_router=true", "model.name_or_path={workshop}/moe"),
    "gate alone over chosen frozen experts": (
        *("moe.family=moe_lora", "lora.target_modules=[q_proj,gate_proj,down_proj]", "model.name_or_path={workshop}/moe"),
        *("lora.r=4", "lora.moe_rank_scaling=true", "lora.experts=[0,2,3]", "learning_rate=3e-2"),
    ),
    "shards over frozen experts": ("moe.family=moe_lora", "lora.pairs=shards", "lora.r=4", "model.name_or_path={workshop}/moe"),
}

PLACES = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a dense model and one that has experts."""
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    tokenizer = build_byte_tokenizer()
    ends = {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    save_tiny("qwen3_moe", made / "moe", vocab_size=len(tokenizer), **ends)
    tokenizer.save_pretrained(made / "moe")
    return str(made)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if number else ()) for number, kind in enumerate(KINDS)])
def test_four_then_two_then_three_ranks(workshop: str, kind: str) -> None:
    """Frozen parts and everything else travel with their owners, or are the same everywhere."""
    name, own = kind.replace(" ", "-"), KINDS[kind]
    whole = run_ranks(4, train_until, workshop, f"{name}-whole", 6, own)[0]
    parts = run_ranks(4, train_until, workshop, name, 2, own)[0]
    parts += run_ranks(2, train_until, workshop, name, 4, (*own, "resume=true"))[0]
    parts += run_ranks(3, train_until, workshop, name, 6, (*own, "resume=true"))[0]
    assert torch.tensor(parts).sub(torch.tensor(whole)).abs().max() <= 1e-10
    assert whole[0][0] - whole[-1][0] > 1e-3, "it must have learnt, or nothing was shown"
    assert (Path(workshop) / f"runs/{name}/checkpoint-6/rank-00002-of-00003.safetensors").is_file()


PLAIN = (
    "moe.unit=linear",
    "moe.num_experts=1",
    "moe.top_k=1",
    "lora.dropout=0",
    "lora.target_modules=[q_proj,down_proj]",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
    "weight_decay=0.1",
    "max_grad_norm=1e-3",
)
"""an ordinary LoRA, as `plain_steps` trains it"""


def samples_and_first_adapter(rank: int, world: int, workshop: str) -> list[list[tuple[list[int], list[int]]]]:
    """Token ids and targets of the samples of six steps, of a run that began on two ranks. The first adapter is left in runs/first."""
    as_two = (*PLAIN, "micro_batch_size=2")
    config = load_config(f"{workshop}/config.yaml", settings_of(workshop, "first", as_two), claim_output=False)
    run = Training(config, ranks_of_default_group(rank, world))
    run.parts.output.replace(Path(config.output_dir), run.parts.moe, run.ranks)
    sources, steps = run.parts.stream.sources, []
    for _ in range(6):
        encoded = [sources[source][sample] for sequence in run.parts.stream.next_step() for source, sample in sequence.samples]
        steps.append([(one.input_ids.tolist(), one.targets.tolist()) for one in encoded])
    return steps


def plain_lora(workshop: str, name: str) -> list[dict[str, Tensor]]:
    """A and B of each layer of the adapter that a run has left, as `PlainAdapter` names them."""
    tensors = load_file(f"{workshop}/runs/{name}/adapter/adapter_model.safetensors")
    names = [(place, letter) for place in PLACES for letter in "AB"]
    key = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    return [{f"{place.split('.')[1]}.{letter}": tensors[key.format(layer, place, letter)] for place, letter in names} for layer in range(2)]


def train_and_leave(rank: int, world: int, workshop: str, name: str, until: int, overrides: tuple[str, ...]) -> Losses:
    """`train_until`, and then the adapter is written."""
    steps = train_until(rank, world, workshop, name, until, overrides)
    config = load_config(f"{workshop}/config.yaml", settings_of(workshop, name, (*overrides, "resume=true")), claim_output=False)
    run = Training(config, ranks_of_default_group(rank, world))
    run.parts.output.replace(Path(config.output_dir), run.parts.moe, run.ranks)
    return steps


def test_two_then_three_ranks_then_one_train_as_a_plain_loop_that_never_stops(workshop: str) -> None:
    """The plain one has no ranks: one sample after another through transformers' model, torch's AdamW."""
    (samples,) = run_ranks(1, samples_and_first_adapter, workshop)
    parts = run_ranks(2, train_until, workshop, "chain", 2, PLAIN)[0]
    parts += run_ranks(3, train_until, workshop, "chain", 4, (*PLAIN, "resume=true"))[0]
    parts += run_ranks(1, train_and_leave, workshop, "chain", 6, (*PLAIN, "resume=true"))[0]
    model = LlamaForCausalLM.from_pretrained(f"{workshop}/model", dtype=torch.float64)
    plain = PlainAdapter(model, plain_lora(workshop, "first"), scale=2.0, learning_rate=1e-2, weight_decay=0.1, places=PLACES)
    wanted = [plain.step([(torch.tensor(ids), torch.tensor(targets)) for ids, targets in step], max_norm=1e-3) for step in samples]
    assert all(norm > 1e-3 for _, norm in wanted), "nothing was clipped"
    found = [(loss, norm) for loss, _, norm in parts]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)
    for got, trained in zip(plain_lora(workshop, "chain"), plain.layers, strict=True):
        for key, tensor in trained.items():
            torch.testing.assert_close(got[key], tensor.detach(), rtol=0, atol=1e-10)


def resumed_over_frozen_experts(rank: int, world: int, workshop: str) -> tuple[list[Losses], list[dict[str, Any]]]:
    """Losses of the last two of four steps, and then who holds which frozen parts, of a run and of one that is resumed in between."""
    own = (*KINDS["LoRA over frozen experts"], "fssdp.policy=full")
    ranks, losses, held = ranks_of_default_group(rank, world), [], []
    for resumes in (False, True):
        config = load_config(f"{workshop}/config.yaml", settings_of(workshop, "frozen", (*own, f"resume={resumes}")), claim_output=False)
        run = Training(config, ranks)
        steps: Losses = []
        while run.run_state.step < 4:
            result = run.train_one().result
            steps.append((result.loss, result.aux_loss, result.grad_norm))
            if run.run_state.step == 2 and not resumes:
                run.save()
        losses.append(steps[-2:])
        layers = run.parts.moe.engine.shards.residency_to_json()
        held.append({name: ([row[:2] for row in one["held"]], one["uses"], one["fetches"]) for name, one in layers.items()})
    return losses, held


def test_ranks_hold_the_frozen_parts_again_that_they_held_at_the_save(workshop: str) -> None:
    """So that the next steps are planned as if the run had not stopped: their sums are made in the same order, and are the same bits."""
    for (whole, resumed), (before, after) in run_ranks(2, resumed_over_frozen_experts, workshop):
        assert resumed == whole
        assert after == before
        assert all(len(rows) == 2 * 5 for rows, _, _ in after.values()), "both ranks hold all experts"


@pytest.mark.slow
def test_more_ranks_than_rows(workshop: str) -> None:
    whole = run_ranks(2, train_until, workshop, "narrow", 3, ())[0]
    parts = run_ranks(2, train_until, workshop, "wide", 1, ())[0]
    parts += run_ranks(3, train_until, workshop, "wide", 3, ("resume=true",))[0]
    assert torch.tensor(parts).sub(torch.tensor(whole)).abs().max() <= 1e-10


@pytest.mark.slow
def test_sharding_groups_of_other_sizes(workshop: str) -> None:
    """The first group writes, all read; 4 ranks in twos, 2 in twos, 4 alone each, 4 together. Owners may change on the way."""
    whole = run_ranks(4, train_until, workshop, "one-group", 6, ())[0]
    jobs = [(4, 2, 2, False), (2, 2, 3, True), (4, 1, 4, True), (4, 4, 6, True)]
    parts: Losses = []
    for world, shard_size, until, resume in jobs:
        overrides = (f"fssdp.shard_size={shard_size}", f"resume={str(resume).lower()}")
        found = run_ranks(world, train_until, workshop, "groups", until, overrides)
        assert all(steps == found[0] for steps in found), "losses and norms are of the whole job, the same bits on every rank"
        parts += found[0]
    assert torch.tensor(parts).sub(torch.tensor(whole)).abs().max() <= 1e-10
    files = {step: len(list(Path(workshop).glob(f"runs/groups/checkpoint-{step}/*.safetensors"))) for step in (2, 3, 4, 6)}
    assert files == {2: 2, 3: 2, 4: 1, 6: 4}


def test_a_finished_run_is_extended_and_its_data_and_base_model_may_have_moved(workshop: str) -> None:
    """What does not change the past may differ: the number of steps, how far ahead experts travel, where and by which name files lie."""
    constant = ("lr_scheduler_type=constant", "warmup_ratio=0")
    whole = run_ranks(2, train_until, workshop, "long", 4, (*constant, "max_steps=4"))[0]
    parts = run_ranks(2, train_until, workshop, "extended", 2, (*constant, "max_steps=2"))[0]
    folder = Path(workshop)
    shutil.copytree(folder / "model", folder / "moved-model")
    for task in ("up", "echo"):
        shutil.copy(folder / f"{task}.train.jsonl", folder / f"moved-{task}.jsonl")
    data = f"data.train=[{{{{path: {folder}/moved-up.jsonl, weight: 2}}}}, {folder}/moved-echo.jsonl]"
    free = ("max_steps=4", "fssdp.prefetch=2", "fssdp.memory_slots=1", f"model.name_or_path={workshop}/moved-model", data)
    parts += run_ranks(2, train_until, workshop, "extended", 4, (*constant, *free, "resume=true"))[0]
    assert torch.tensor(parts).sub(torch.tensor(whole)).abs().max() <= 1e-10
