"""Runs of a GPT that Megatron builds, by the trainer that trains everything else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hecate.config import Config, ConfigError
from hecate.forecast.run_shape import run_shape
from hecate.parallel.cost_model import LayerCost
from hecate.train.evaluate import evaluate
from hecate.train.loop import Run
from hecate.train.ranks import Ranks
from tests.hecate.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.model.tiny import token_ids
from tests.ranks import run_ranks

Losses = list[tuple[float, ...]]
"""loss, aux loss and gradient norm of each step; at last the held-out loss"""
VARIANTS: dict[str, tuple[str, ...]] = {
    "checkpointed": ("fssdp.policy=static_ep", "gradient_checkpointing=true"),
    "rematerialized": ("fssdp.policy=full", "fssdp.rematerialize=true"),
}


@dataclass(frozen=True)
class Found:
    """What ranks found in one job: importing megatron takes longer than all the rest."""

    losses: dict[str, Losses]
    logits: torch.Tensor
    replicated: int
    """parameters outside experts"""
    cost: LayerCost
    """what the engine plans with"""


def _train(config: Config, ranks: Ranks, save_at: int | None = None) -> Losses:
    run = Run(config, ranks)
    losses: Losses = []
    while run.step < run.config.max_steps:
        result, _ = run.train_one()
        losses.append((result.loss, result.aux_loss, result.grad_norm))
        if run.step == save_at:
            run.save()
    (held_out,) = evaluate(run.config, run.ranks, run.base, run.moe, run.eval_sources).scores.values()
    return [*losses, (held_out.loss,)]


def _export(folder: Path, ranks: Ranks) -> tuple[torch.Tensor, int, LayerCost]:
    run = Run(config_of(folder), ranks)
    ((_, given),) = run.moe.engine.plan_inputs()
    for parameter in run.moe.replicated_parameters().values():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # far from linear, and from equal routing
    with torch.no_grad(), run.moe.engine.evaluating():
        logits = run.base.model(token_ids(), None, None)
        hidden = run.base.head.hidden(token_ids(), None, token_ids())
        assert torch.equal(run.base.head.logits(hidden.flatten(0, 1)), logits.flatten(0, 1))  # type: ignore[attr-defined]
    run.output.replace(folder, run.moe, ranks)
    return logits, sum(parameter.numel() for parameter in run.moe.replicated_parameters().values()), given.cost


def _two_ranks(rank: int, world: int, folder: str) -> Found:
    ranks = ranks_of(rank, world)
    losses = {name: _train(config_of(Path(folder), *overrides), ranks) for name, overrides in VARIANTS.items()}
    losses["whole"] = _train(config_of(Path(folder)), ranks, save_at=1)
    losses["resumed"] = _train(config_of(Path(folder), "resume=true"), ranks)
    return Found(losses, *_export(Path(folder), ranks))


def _one_rank(rank: int, world: int, folder: str) -> Losses:
    return _train(config_of(Path(folder), "micro_batch_size=4"), ranks_of(rank, world))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("megatron")
    write_parts(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    first, second = run_ranks(2, _two_ranks, str(folder))
    assert first.losses == second.losses
    return first


def test_the_losses_do_not_depend_on_ranks_policies_or_checkpointing(folder: Path, found: Found) -> None:
    (alone,) = run_ranks(1, _one_rank, str(folder))
    assert alone[-2][0] < alone[0][0] - 0.3
    for name in VARIANTS:
        for got, wanted in zip(found.losses[name], alone, strict=True):
            assert got == pytest.approx(wanted, rel=2e-4), name


def test_a_resumed_run_goes_on_bit_for_bit(found: Found) -> None:
    assert found.losses["resumed"] == found.losses["whole"][1:]


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
        torch.testing.assert_close(model(token_ids(), use_cache=False).logits, found.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name_or_path=gpt-moe-xxl", "no such preset"),
        ("model.tokenizer=null", "must be given with model.front_end=megatron"),
        ("moe.family=mixlora", "must be full"),
        ("model.dtype=bfloat16", "must be float32 or float64"),
        ("moe.top_k=5", "must be from 1 to 4"),
        ("moe.num_experts=[4,4]", "must be one number"),
        ("model.num_hidden_layers=3", "the model has only 2"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config_of(folder, override)
    assert [problem.key for problem in error.value.problems] == [override.partition("=")[0]]


@pytest.mark.parametrize("name", ["gpt-moe-s", "gpt-moe-l", "bert-moe", "bert-moe-deep"])
def test_the_papers_models_are_configured_by_name(folder: Path, name: str) -> None:
    """As many parameters as the paper's, whose FFNs have no gate."""
    from hecate.megatron.shape import gpt_shape
    from hecate.parallel.model_shapes import load_model_shape
    from hecate.presets import find_preset

    config = config_of(folder, f"model.name_or_path={name}")
    assert (config.moe.num_experts, config.moe.top_k) == (64, 2)
    gpt, paper = gpt_shape(name), load_model_shape(find_preset("models", "model", name))
    ours = gpt.layers * (gpt.attention_parameters + gpt.experts * 3 * gpt.hidden * gpt.ffn)
    assert ours == pytest.approx(paper.num_params(), rel=1e-3)
