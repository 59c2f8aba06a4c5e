"""Runs of a GPT that Megatron builds, with the same trainer as all other runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hecate.config import Config, ConfigError
from hecate.errors import UserError
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.cost.cost_model import LayerCost
from hecate.ranks.ranks import Ranks
from hecate.train.evaluate import evaluate
from hecate.train.training import Training
from testing.answering import answer, evaluate_trained
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.data.making import ids_of, write_index
from tests.hecate.model.tiny import token_ids

Losses = list[tuple[float, ...]]
"""loss, aux loss and gradient norm of each step; at last the held-out loss"""
MEGATRONS = "fssdp.policy=megatron_ep"
VARIANTS: dict[str, tuple[str, ...]] = {
    "checkpointed": ("fssdp.policy=static_ep", "gradient_checkpointing=true"),
    "Megatron's layers": (MEGATRONS,),
    "Megatron's layers, checkpointed": (MEGATRONS, "gradient_checkpointing=true"),
    "rematerialized": ("fssdp.policy=full", "fssdp.rematerialize=true"),
}


IN_TWO_PARTS = ("gradient_accumulation_steps=2", "micro_batch_size=1")
"""micro-steps have aux losses of their own, so this is another run"""


@dataclass(frozen=True)
class Found:
    """What ranks found in one job: importing megatron takes longer than all the rest."""

    losses: dict[str, Losses]
    logits: np.ndarray
    """no tensor: those travel through shared memory, which ends with the rank"""
    replicated: int
    """parameters outside experts"""
    token_bytes: tuple[int, int]
    """that a rank sends for tokens in a step with Megatron's layers: without checkpointing, and with it"""
    cost: LayerCost
    """what the engine plans with"""
    held_out: float
    """loss of the model whose logits those are"""


def _train(config: Config, ranks: Ranks, save_at: int | None = None) -> Losses:
    run = Training(config, ranks)
    losses: Losses = []
    while run.run_state.step < run.parts.config.max_steps:
        result = run.train_one().result
        losses.append((result.loss, result.aux_loss, result.grad_norm))
        if run.run_state.step == save_at:
            run.save()
    return [*losses, (_held_out(run),)]


def _token_bytes(config: Config, ranks: Ranks) -> int:
    run = Training(config, ranks)
    run.train_one()
    return int(run.parts.moe.engine.shards.token_bytes_to.sum())


def _held_out(run: Training) -> float:
    (score,) = evaluate(run.parts.config, run.ranks, run.parts.base, run.parts.moe, run.parts.eval_sources).scores.values()
    return score.loss


def _export(folder: Path, ranks: Ranks) -> tuple[np.ndarray, int, LayerCost, float]:
    run = Training(config_of(folder), ranks)
    ((_, given),) = run.parts.moe.engine.shards.plans.inputs()
    for parameter in run.parts.moe.replicated_parameters().values():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # far from linear, and from equal routing
    with torch.no_grad(), run.parts.moe.engine.evaluation():
        logits = run.parts.base.model(token_ids(), None, None)
        hidden = run.parts.base.head.hidden(token_ids(), None, token_ids())
        torch.testing.assert_close(run.parts.base.head.logits(hidden.flatten(0, 1)), logits.flatten(0, 1))  # type: ignore[attr-defined]
    run.parts.output.replace(folder, run.parts.moe, ranks)
    replicated = sum(parameter.numel() for parameter in run.parts.moe.replicated_parameters().values())
    return logits.numpy(), replicated, given.cost, _held_out(run)


def _two_ranks(rank: int, world: int, folder: str) -> Found:
    ranks = ranks_of(rank, world)
    losses = {name: _train(config_of(Path(folder), *overrides), ranks) for name, overrides in VARIANTS.items()}
    for policy in ("static_ep", "megatron_ep"):
        losses[f"{policy}, accumulating"] = _train(config_of(Path(folder), f"fssdp.policy={policy}", *IN_TWO_PARTS), ranks)
    losses["indexed"] = _train(config_of(Path(folder), f"data.train={folder}/corpus"), ranks)
    losses["whole"] = _train(config_of(Path(folder)), ranks, save_at=1)
    losses["resumed"] = _train(config_of(Path(folder), "resume=true"), ranks)
    megatrons = [f"output_dir={folder}/megatrons", MEGATRONS]
    losses["whole, Megatron's layers"] = _train(config_of(Path(folder), *megatrons), ranks, save_at=1)
    losses["resumed, Megatron's layers"] = _train(config_of(Path(folder), *megatrons, "resume=true"), ranks)
    token_bytes = [_token_bytes(config_of(Path(folder), *VARIANTS[name]), ranks) for name in VARIANTS if "Megatron" in name]
    logits, replicated, cost, held_out = _export(Path(folder), ranks)
    return Found(losses, logits, replicated, (token_bytes[0], token_bytes[1]), cost, held_out)


def _one_rank(rank: int, world: int, folder: str) -> tuple[Losses, Losses]:
    """A whole run; and the end of one that two ranks with Megatron's layers began, a step of which keeps its rows."""
    ranks = ranks_of(rank, world)
    whole = _train(config_of(Path(folder), "micro_batch_size=4", f"output_dir={folder}/alone"), ranks)
    return whole, _train(config_of(Path(folder), f"output_dir={folder}/megatrons", MEGATRONS, "resume=true"), ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("megatron")
    write_parts(made)
    texts = [json.loads(line)["text"] for line in (made / "train.jsonl").read_text().splitlines()]
    write_index(made / "corpus", ids_of(texts, build_byte_tokenizer()))
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    first, second = run_ranks(2, _two_ranks, str(folder))
    assert first.losses == second.losses
    return first


def test_the_losses_do_not_depend_on_ranks_policies_or_checkpointing(folder: Path, found: Found) -> None:
    ((alone, resumed),) = run_ranks(1, _one_rank, str(folder))
    assert alone[-2][0] < alone[0][0] - 0.3
    for name in VARIANTS:
        for got, wanted in zip(found.losses[name], alone, strict=True):
            assert got == pytest.approx(wanted, rel=2e-4), name
    for got, wanted in zip(resumed, alone[1:], strict=True):
        assert got == pytest.approx(wanted, rel=2e-4), "Megatron's layers, on another number of ranks from a checkpoint on"


def test_the_losses_are_the_same_on_the_text_as_token_ids(found: Found) -> None:
    assert found.losses["indexed"] == found.losses["whole"]


def test_megatrons_layers_accumulate_as_ours_do(found: Found) -> None:
    for got, wanted in zip(found.losses["megatron_ep, accumulating"], found.losses["static_ep, accumulating"], strict=True):
        assert got == pytest.approx(wanted, rel=2e-4)


def test_a_layer_that_runs_again_sends_its_rows_once_more(found: Found) -> None:
    """Forward and backward, and with checkpointing forward again."""
    once, checkpointed = found.token_bytes
    assert checkpointed == pytest.approx(1.5 * once, rel=0.02)


@pytest.mark.parametrize("whose", ["", ", Megatron's layers"])
def test_a_resumed_run_goes_on_bit_for_bit(found: Found, whose: str) -> None:
    assert found.losses[f"resumed{whose}"] == found.losses[f"whole{whose}"][1:]


def test_the_model_comes_out_as_a_mixtral_of_the_sizes_planned(folder: Path, found: Found) -> None:
    from transformers import AutoModelForCausalLM

    planned = run_shape(config_of(folder), None, 2)
    assert planned.replicated_parameters == found.replicated
    assert [(group.experts, group.number, group.cost) for group in planned.groups] == [(4, 2, found.cost)]
    assert planned.frozen_parameters == 0
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(), use_cache=False).logits, torch.from_numpy(found.logits), rtol=1e-4, atol=1e-4)


def test_that_mixtral_is_evaluated_and_goes_on_with_a_text(folder: Path, found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evaluate_trained(config_of(folder), folder / "model")
    assert f"{found.held_out:.3f}" in capsys.readouterr().out
    (folder / "model" / "chat_template.jinja").unlink()  # as a tokenizer for pretraining
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("In the", add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer(folder / "model", "In the", system=None, model=None, max_new_tokens=4) == wanted.strip()
    with pytest.raises(UserError, match="no chat template"):
        answer(folder / "model", "In the", system="Be brief", model=None, max_new_tokens=4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name_or_path=gpt-moe-xxl", "no such preset"),
        ("model.tokenizer=null", "must be given with model.front_end=megatron"),
        ("moe.family=mixlora", "must be full"),
        ("moe.top_k=5", "must be from 1 to 4"),
        ("moe.num_experts=[4,4]", "must be one number"),
        ("model.num_hidden_layers=3", "the model has only 2"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config_of(folder, override)
    assert [problem.key for problem in error.value.problems] == [override.partition("=")[0]]


@pytest.mark.parametrize(
    "override",
    [
        "fssdp.plan=exact",
        "fssdp.rematerialize=true",
        "fssdp.prefetch=2",
        "fssdp.max_imbalance=1.5",
        "fssdp.memory_slots=1",
        "fssdp.redundancy=1",
        "fssdp.reshard_interval=2",
        "model.tensor_parallel=2",
        "kernels=torch",
    ],
)
def test_what_is_of_our_layers_is_refused_with_megatrons(folder: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="belongs to hecate's own layers") as error:
        config_of(folder, MEGATRONS, override)
    assert {problem.key for problem in error.value.problems} == {override.partition("=")[0]}


def _three_experts(rank: int, world: int, folder: str) -> None:
    with pytest.raises(UserError, match="3 experts are on 2 ranks"):
        Training(config_of(Path(folder), MEGATRONS, "moe.num_experts=3"), ranks_of(rank, world))


def test_megatrons_layers_need_equally_many_experts_on_each_rank(folder: Path) -> None:
    run_ranks(2, _three_experts, str(folder))


@pytest.mark.parametrize("name", ["gpt-moe-s", "gpt-moe-l", "bert-moe", "bert-moe-deep"])
def test_the_papers_models_are_configured_by_name(folder: Path, name: str) -> None:
    """As many parameters as the paper's, whose FFNs have no gate."""
    from hecate.config.files.presets import find_preset
    from hecate.config.gpt_shape import gpt_shape
    from hecate.parallel.cost.model_shapes import load_model_shape
    from testing.plan_cases import num_params

    config = config_of(folder, f"model.name_or_path={name}")
    assert (config.moe.num_experts, config.moe.top_k) == (64, 2)
    gpt, paper = gpt_shape(name), load_model_shape(find_preset("models", "model", name))
    ours = gpt.layers * (gpt.attention_parameters + gpt.experts * 3 * gpt.hidden * gpt.ffn)
    assert ours == pytest.approx(num_params(paper), rel=1e-3)
