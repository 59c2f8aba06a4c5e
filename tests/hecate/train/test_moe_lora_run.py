"""Whole runs of LoRA on an MoE model's experts through the command line: checkpoints, and adapters that PEFT and hecate read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import hecate.model.files.memory_check
from hecate.adapters.formats.peft import FORMAT
from hecate.apps.answers.compare import Questions, compare
from hecate.apps.answers.opened import with_adapter
from hecate.config import load_config
from hecate.data.files.choices import read_choices
from hecate.engine import step_plans
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.model.sizes.run_shape import run_shape
from hecate.ranks.ranks import join_ranks
from hecate.train.training import Training
from testing.answering import answer, evaluate_trained
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from testing.tiny_run import write_samples
from tests.hecate.train.command_line import records, run
from tests.hecate.train.in_process import ranks_of_default_group
from tests.plain_moe_lora import KINDS, peft_model, save_tiny

STEPS, RANK, ALPHA = 4, 4, 8


def save_model(kind: str, folder: Path) -> None:
    """A tiny random model with a tokenizer."""
    tokenizer = build_byte_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    save_tiny(kind, folder, torch.float32, max_position_embeddings=128, **sizes)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE whose weights are in several files, data, and a configuration."""
    folder = tmp_path_factory.mktemp("moe_workshop")
    save_model("qwen3_moe", folder / "model")
    for split, first in (("train", 0), ("eval", 200)):
        write_samples(
            folder / f"up.{split}.jsonl", [f"w{n % 13}x{n}" for n in range(first, first + (80 if split == "train" else 7))], str.upper
        )
    config = {
        "model": {"name_or_path": f"{folder}/model", "dtype": "float32", "shard_non_experts": True},
        "data": {"train": f"{folder}/up.train.jsonl", "eval": f"{folder}/up.eval.jsonl", "seq_len": 64},
        "output_dir": f"{folder}/runs/unset",
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "lora": {"r": RANK, "alpha": float(ALPHA), "dropout": 0.1},
        "moe": {"family": "moe_lora", "train_router": True},
        "eval": {"on_start": True, "generate": True, "max_new_tokens": 4},
        "save_steps": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path) -> Path:
    """The adapter of a run on two ranks."""
    run("train", workshop / "config.yaml", f"output_dir={workshop}/runs/whole", "nproc=2")
    return workshop / "runs" / "whole" / "adapter"


def test_a_run_learns(workshop: Path, trained: Path) -> None:
    steps = records(workshop, "whole", "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    before, after = records(workshop, "whole", "eval")
    assert after["sources"]["up.eval"]["loss"] < before["sources"]["up.eval"]["loss"]
    assert yaml.safe_load((workshop / "runs" / "whole" / "config.yaml").read_text())["moe"]["num_experts"] == 5
    assert steps[0]["aux_loss"] > 1.9  # two assignments, nearly balanced or worse


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(workshop: Path, trained: Path) -> None:
    again = workshop / "runs" / "again"
    shutil.copytree(workshop / "runs" / "whole", again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / f"checkpoint-{STEPS}")
    run("train", again / "config.yaml", f"output_dir={again}", "nproc=2", "resume=true")
    wanted, got = (load_file(folder / "adapter_model.safetensors") for folder in (trained, again / "adapter"))
    assert got.keys() == wanted.keys()
    # Routing near a tie could differ by where frozen replicas are; here nothing does, so all is bit for bit.
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_evaluation_and_answers_come_from_the_adapter(workshop: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here in one process with every expert; the run had evaluated on two ranks, experts staying with their owners."""
    after = records(workshop, "whole", "eval")[-1]["sources"]["up.eval"]
    config = load_config(workshop / "config.yaml", [f"output_dir={workshop}/runs/whole"], claim_output=False)
    evaluate_trained(config, trained)
    shown = capsys.readouterr().out
    assert f"{after['loss']:.3f}" in shown
    assert f"{after['accuracy']:.3f}" in shown
    assert isinstance(answer(trained, "w1x1", system=None, model=None, max_new_tokens=4), str)


def _judged(rank: int, world: int, adapter: str, asked: str) -> dict[str, dict[str, float]]:
    """On several ranks frozen experts stay with their owners, and ranks with fewer choices go forward with none."""
    if world > 1:
        step_plans.everything_everywhere = None  # type: ignore[assignment]
    questions = {path.stem: read_choices(path) for path in sorted(Path(asked).iterdir())}
    (found,) = compare(None, [adapter], Questions(choices=questions), ranks_of_default_group(rank, world))
    return {name: dict(one.figures) for name, one in found.tasks.items()}


def test_ranks_share_questions_while_frozen_experts_stay_with_their_owners(trained: Path, tmp_path: Path) -> None:
    for name, count in (("many", 7), ("one", 1)):
        lines = [{"prompt": f"w{n}x? ", "choices": ["W", "long", "x y", "z" * n][: 2 + n % 3], "answer": n % 2} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone, shared = (run_ranks(world, _judged, str(trained), str(tmp_path)) for world in (1, 2))
    assert alone[0] == shared[0] == shared[1]
    assert set(alone[0]) == {"many", "one"}


def test_a_base_that_does_not_fit_is_not_loaded(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hecate.model.files.memory_check, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="the whole model in one process"):
        answer(trained, "w1x1", system=None, model=None, max_new_tokens=4)


def logits_of_peft(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 70)[None], use_cache=False).logits


def logits_of_ours(adapter: Path) -> torch.Tensor:
    with join_ranks() as ranks:
        base, moe = with_adapter(adapter, ranks, BaseChoice(dtype="float32", kernels="torch"))
        assert {family.site.kernels for family in moe.engine.shards.families.values()} == {"torch"}, "`kernels` was not honoured"
        with moe.engine.evaluation(), torch.no_grad():
            ids = torch.arange(40, 70)[None]
            return base.head.logits(base.head.hidden(ids, None, torch.arange(30)[None]))


def test_peft_reads_what_was_trained(workshop: Path, trained: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float32)
    plain = logits_of_peft(base)
    loaded = logits_of_peft(peft.PeftModel.from_pretrained(base, trained).eval())
    assert float((loaded - plain).abs().max()) > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(logits_of_ours(trained), loaded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [["q_proj", "o_proj"], []])
def test_what_peft_has_trained_is_read(workshop: Path, tmp_path: Path, modules: list[str]) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft_model(workshop / "model", 3, 5, modules, torch.float32)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    model.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits_of_ours(tmp_path / "theirs"), logits_of_peft(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"qwen3_moe"}))
def test_every_architecture_goes_to_peft_and_comes_back(tmp_path: Path, kind: str) -> None:
    """Qwen3-MoE's adapters do above, from a run."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from transformers import AutoModelForCausalLM

    save_model(kind, tmp_path / "model")
    model = peft_model(tmp_path / "model", 3, 5, ["q_proj"], torch.float32)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    model.save_pretrained(tmp_path / "theirs")
    wanted = logits_of_peft(model)
    torch.testing.assert_close(logits_of_ours(tmp_path / "theirs"), wanted, rtol=1e-4, atol=1e-4)
    with join_ranks() as ranks:
        base, moe = with_adapter(tmp_path / "theirs", ranks, BaseChoice(dtype="float32"))
        for parameter in (*moe.engine.shards.named_parameters().values(), *moe.replicated_parameters().values()):
            parameter.data.mul_(1.5)
        FORMAT.write(tmp_path / "ours", FORMAT.read(tmp_path / "theirs").description, base, moe, ranks)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = logits_of_peft(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval())
    assert float((loaded - wanted).abs().max()) > 1e-2, "the change was lost"
    torch.testing.assert_close(logits_of_ours(tmp_path / "ours"), loaded, rtol=1e-4, atol=1e-4)


def test_a_run_begins_with_what_peft_has_trained(workshop: Path, tmp_path: Path) -> None:
    """Written before the first step, it is the same, bit for bit."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft_model(workshop / "model", RANK, ALPHA, ["q_proj"], torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "theirs")
    targets = "lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]"
    begin = [targets, f"lora.init_from={tmp_path}/theirs", "moe.train_router=false"]
    with join_ranks(sharded_layers=True) as ranks:
        begun = Training(load_config(workshop / "config.yaml", [*begin, f"output_dir={tmp_path}/run"], claim_output=False), ranks)
        begun.parts.output.replace(tmp_path / "run", begun.parts.moe, ranks)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", tmp_path / "run" / "adapter"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    message = refusal(workshop, *begin, "lora.alpha=16")
    assert "lora.alpha, scaled 2.0, but the configuration has 4.0" in message


def test_training_goes_on_from_an_adapter_with_a_fixed_a_where_the_seed_draws_it(workshop: Path, tmp_path: Path) -> None:
    """It is written with an ordinary A for each expert, all alike, and read back where A is the same; a plain run takes any."""
    fixed = ["lora.pairs=fixed_a", "lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]", "moe.train_router=false"]
    begin = f"lora.init_from={tmp_path}/first/adapter"
    for name, more in (("first", []), ("second", [begin])):
        config = load_config(workshop / "config.yaml", [*fixed, *more, f"output_dir={tmp_path}/{name}"], claim_output=False)
        with join_ranks(sharded_layers=True) as ranks:
            begun = Training(config, ranks)
            if not more:
                for unit, chunk in begun.parts.moe.engine.shards.named_parameters().items():
                    chunk.data.fill_(unit[1] + 0.5)
            begun.parts.output.replace(tmp_path / name, begun.parts.moe, ranks)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    joined = next(tensor for name, tensor in first.items() if "experts.lora_A" in name).view(5, RANK, -1)
    assert torch.equal(joined, joined[:1].expand_as(joined))
    message = refusal(workshop, *fixed, begin, "seed=9")
    for text in (f"{tmp_path}/first/adapter: lora.pairs: fixed_a", "A of expert 0.0, gate_up_proj", "give the seed", "lora.pairs=plain"):
        assert text in message


def test_an_adapter_with_a_tensor_lost_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "lossy")
    tensors = load_file(trained / "adapter_model.safetensors")
    lost = next(name for name in tensors if "experts.lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "lossy" / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        answer(tmp_path / "lossy", "x", system=None, model=None, max_new_tokens=1)
    assert f"has no tensor {lost}" in str(caught.value)


def refusal(workshop: Path, *overrides: str) -> str:
    """What a run says that is refused before its first step."""
    config = load_config(workshop / "config.yaml", [f"output_dir={workshop}/runs/refused", *overrides], claim_output=False)
    with join_ranks(sharded_layers=True) as ranks, pytest.raises(UserError) as caught:
        Training(config, ranks)
    assert len(str(caught.value).splitlines()) <= 8
    return str(caught.value)


REFUSALS = {
    "experts in the place of experts": (
        ["moe.family=mixlora", "moe.train_router=false", "model.shard_non_experts=false"],
        "has experts already",
        "moe.family=moe_lora",
    ),
    "another number of experts": (["moe.num_experts=4"], "moe.num_experts: 4, but the model has 5", "leave moe.num_experts out"),
    "another top_k": (["moe.top_k=1"], "moe.top_k: 1, but the model has 2", "leave moe.top_k out"),
    "the router as a linear": (["lora.target_modules=[gate,down_proj]"], "lora.target_modules: gate matches no module", "it has down_proj"),
    "the output layer": (["lora.target_modules=[lm_head,down_proj]"], "lora.target_modules: lm_head matches no module", "q_proj"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(workshop: Path, name: str) -> None:
    overrides, *texts = REFUSALS[name]
    message = refusal(workshop, *overrides)
    assert all(text in message for text in texts), message


def test_a_dense_model_is_refused(workshop: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 258}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(workshop / "dense")
    override = f"model.name_or_path={workshop}/dense"
    assert "has no experts, but moe.family is moe_lora" in refusal(workshop, override)
    config = load_config(workshop / "config.yaml", [override], claim_output=False)
    with pytest.raises(UserError, match="has no experts, but"):
        run_shape(config, None, 2)


def test_the_dry_run_knows_the_recipe(workshop: Path) -> None:
    recipe = Path(__file__).parents[3] / "configs" / "moe-lora.yaml"
    given = [f"model.name_or_path={workshop}/model", f"data.train={workshop}/up.train.jsonl", f"output_dir={workshop}/runs/planned"]
    shown = run("plan", recipe, *given, "model.shard_non_experts=true", "--ranks", 2).stdout
    assert "frozen experts" in shown
