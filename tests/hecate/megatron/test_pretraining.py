"""Runs of a GPT that Megatron builds, by the trainer that trains everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hecate.config import ConfigError
from hecate.train.loop import Run
from tests.hecate.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.model.tiny import token_ids
from tests.ranks import run_ranks

Losses = list[tuple[float, float, float]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parts(tmp_path)
    return tmp_path


def _train(rank: int, world: int, folder: str, overrides: tuple[str, ...], save_at: int | None) -> Losses:
    run = Run(config_of(Path(folder), *overrides), ranks_of(rank, world))
    losses = []
    while run.step < run.config.max_steps:
        result, _ = run.train_one()
        losses.append((result.loss, result.aux_loss, result.grad_norm))
        if run.step == save_at:
            run.save()
    return losses


def train(folder: Path, world: int, *overrides: str, save_at: int | None = None) -> Losses:
    found = run_ranks(world, _train, str(folder), overrides, save_at)
    assert all(losses == found[0] for losses in found)
    return found[0]


def test_the_losses_do_not_depend_on_ranks_policies_or_checkpointing(folder: Path) -> None:
    alone = train(folder, 1, "micro_batch_size=4")
    assert alone[-1][0] < alone[0][0] - 0.3
    others = [
        ("fssdp.policy=static_ep", "gradient_checkpointing=true"),
        ("fssdp.policy=full", "fssdp.rematerialize=true"),
    ]
    for overrides in others:
        for got, wanted in zip(train(folder, 2, *overrides), alone, strict=True):
            assert got == pytest.approx(wanted, rel=2e-4), overrides


def test_a_resumed_run_goes_on_bit_for_bit(folder: Path) -> None:
    whole = train(folder, 2, save_at=1)
    assert train(folder, 2, "resume=true") == whole[1:]


def _export(rank: int, world: int, folder: str) -> torch.Tensor:
    ranks = ranks_of(rank, world)
    run = Run(config_of(Path(folder)), ranks)
    for parameter in run.moe.replicated_parameters().values():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # far from linear, and from equal routing
    with torch.no_grad(), run.moe.engine.evaluating():
        logits = run.base.model(token_ids(), None, None)
        hidden = run.base.head.hidden(token_ids(), None, token_ids())
        assert torch.equal(run.base.head.logits(hidden.flatten(0, 1)), logits.flatten(0, 1))  # type: ignore[attr-defined]
    run.output.replace(Path(folder), run.moe, ranks)
    return logits


def test_the_model_comes_out_as_a_mixtral(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    logits = run_ranks(2, _export, str(folder))
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(), use_cache=False).logits, logits[0], rtol=1e-4, atol=1e-4)


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
