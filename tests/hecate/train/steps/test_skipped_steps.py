"""Steps that change nothing: what was not finite on one rank, and spikes, are skipped on every rank alike."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hecate.config import DataSource, load_config
from hecate.errors import UserError
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.optim.optimizer import ExpertOptimizer
from hecate.report.events import StepResult
from hecate.train.loop import train
from hecate.train.steps import passes
from hecate.train.steps import step as step_module
from hecate.train.steps.replay_step import Replayed, _for_one_rank, replay_step
from hecate.train.steps.skipped_steps import STEP_FILE, _places_in
from hecate.train.steps.step_totals import Totals, exchange_totals
from hecate.train.training import Training
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import make_run, regroup
from tests.hecate.train.in_process import OVERRIDES, ranks_of_default_group

SIGMAS = "skip_step_sigma_factor=6"
CALM = tuple(1e-6 + 1e-8 * (step % 5) for step in range(40))
"""gradient norms next to which that of any step here is a spike"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def held(run: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.parts.optimizer.state_tensors().items()}


def assert_unchanged(run: Training, before: dict[str, Tensor]) -> None:
    after = run.parts.optimizer.state_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def bad_loss(real: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return real(*arguments) + math.nan  # every gradient stays finite


def bad_gradient(real: Callable[..., Tensor], *arguments: Any) -> Tensor:
    loss = real(*arguments)
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def not_finite(rank: int, world: int, workshop: str) -> None:
    """Each of them on the last rank only."""
    run = make_run(workshop, f"not-finite-{world}", rank, world)
    run.train_one()
    before = held(run)
    forward, logits = passes.forward_loss, TopKRouter.logits
    poisons: list[Any] = [
        mock.patch.object(passes, "forward_loss", lambda *given: bad_loss(forward, *given)),
        mock.patch.object(passes, "forward_loss", lambda *given: bad_gradient(forward, *given)),
        mock.patch.object(TopKRouter, "logits", lambda self, *given: logits(self, *given) * math.nan),
    ]
    for poison in poisons:
        if rank == world - 1:
            with poison:
                result = run.train_one().result
        else:
            result = run.train_one().result
        assert result.skipped
        assert math.isnan(result.grad_norm) or math.isinf(result.grad_norm)
        assert_unchanged(run, before)
    assert (run.run_state.skipped_in_a_row, len(run.run_state.grad_norms)) == (3, 1)
    assert not run.train_one().result.skipped


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(workshop: str, world: int) -> None:
    run_ranks(world, not_finite, workshop)


def spike(rank: int, world: int, workshop: str) -> tuple[float, ...]:
    run = make_run(workshop, f"spike-{world}", rank, world, SIGMAS)
    run.train_one()
    run.state = replace(run.run_state, grad_norms=CALM)
    before = held(run)
    result = run.train_one().result
    assert result.why_skipped.startswith(f"gradient norm {result.grad_norm:.4g} is a spike, above 1.1")
    assert_unchanged(run, before)
    run.save()
    resumed = make_run(workshop, f"spike-{world}", rank, world, SIGMAS, "resume=true")
    assert resumed.run_state.grad_norms == (*CALM, result.grad_norm)
    assert resumed.train_one().result.skipped, "a resumed run decides as the run that was saved"
    resumed.state = replace(resumed.run_state, grad_norms=resumed.run_state.grad_norms[-2:] * 20)
    assert not resumed.train_one().result.skipped
    return resumed.run_state.grad_norms


@pytest.mark.parametrize("world", [1, 2])
def test_a_spike_is_skipped_by_all_and_by_a_resumed_run(workshop: str, world: int) -> None:
    of_rank = run_ranks(world, spike, workshop)
    assert all(norms == of_rank[0] for norms in of_rank)


def damaged(rank: int, world: int, workshop: str) -> str:
    """The last rank's gradients of a router are others than those that all have summed to: the step is skipped, and the reason is said."""
    run = make_run(workshop, "damaged", rank, world)
    before = held(run)
    squares = ExpertOptimizer.squares

    def other(self: ExpertOptimizer, **given: Any) -> Tensor:
        found = squares(self, **given)
        return found * torch.tensor([1.0, 2.0 if rank == world - 1 else 1.0])

    with mock.patch.object(ExpertOptimizer, "squares", other):
        result = run.train_one().result
    assert_unchanged(run, before)
    return result.why_skipped


def test_gradients_that_differ_on_one_rank_after_their_sum_are_not_taken(workshop: str) -> None:
    said = "the gradients that all ranks have alike differ on rank 2: is its memory damaged?"
    assert run_ranks(3, damaged, workshop) == [said] * 3


def behind(rank: int, world: int, workshop: str) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[float, ...]]:
    """Rank 0 has skipped a step when the other fails with the norm in its hands: what the rank held before it, and after both have."""
    run = make_run(workshop, "behind", rank, world, SIGMAS)
    run.train_one()
    run.state = replace(run.run_state, grad_norms=CALM)
    before = held(run)

    def fail(*shares: Any) -> Totals:
        totals = exchange_totals(*shares)
        if rank:
            raise RuntimeError("a peer is lost")
        return totals

    with mock.patch.object(step_module, "exchange_totals", fail):
        if rank:
            with pytest.raises(RuntimeError, match="a peer is lost"):
                run.train_one()
        else:
            assert run.train_one().result.skipped
    regroup(run, f"{workshop}/behind-store", rank, world)
    assert run.run_state.step == 2
    assert run.run_state.skipped == 1
    return before, held(run), run.run_state.grad_norms


def test_a_rank_that_is_a_step_behind_skips_what_the_others_have_skipped(workshop: str) -> None:
    (before, after, norms), (other_before, other_after, other_norms) = run_ranks(2, behind, workshop)
    assert norms == other_norms
    assert len(norms) == len(CALM) + 1
    before, after = before | other_before, after | other_after  # experts may have moved from one rank to the other
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def used_up(rank: int, world: int, workshop: str, name: str) -> tuple[StepResult, str]:
    """A run stops at a spike, and then at parameters that are not finite: the result of the first, and the second error."""
    run = make_run(workshop, name, rank, world, SIGMAS, "max_skipped_steps=2")
    run.train_one()
    run.state = replace(run.run_state, grad_norms=CALM)
    run.train_one()
    assert not run.skipped_too_often
    spike = run.train_one().result
    assert run.skipped_too_often
    run.too_many_skipped(spike)
    if "1.2" in run.parts.optimizer.owned:
        with torch.no_grad():
            run.parts.optimizer.owned["1.2"].fill_(math.inf)
    before = held(run)
    diverged = run.train_one().result
    text = str(run.too_many_skipped(diverged))
    assert_unchanged(run, before)
    return spike, text


def replayed(rank: int, world: int, folder: str) -> Replayed:
    return replay_step(Path(folder), ranks_of_default_group(rank, world))


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_step_at_which_a_run_stops_can_be_done_again_in_one_process(workshop: str, world: int) -> None:
    folder = f"{workshop}/runs/used-up-{world}"
    spike, text = run_ranks(world, used_up, workshop, f"used-up-{world}")[0]
    lines = text.splitlines()
    assert len(lines) <= 8
    assert lines[0] == "the last 2 steps, up to step 4, were skipped, as many as max_skipped_steps allows"
    assert lines[1] == "  step 4: the loss or a gradient was not finite"
    file, _, number = lines[2].removeprefix("  its samples: ").split(", ")[0].rpartition(":")
    step = json.loads(Path(folder, "skipped-step-4", STEP_FILE).read_text())
    first = json.loads(Path(file).read_text().splitlines()[int(number) - 1])
    answer = first["messages"][-1]["content"]
    assert answer in build_byte_tokenizer().decode(step["sequences"][0]["input_ids"]), "the sample stands elsewhere"

    (again,) = run_ranks(1, replayed, f"{folder}/skipped-step-3")
    for name in ("loss", "aux_loss", "grad_norm"):
        torch.testing.assert_close(getattr(again.now, name), getattr(spike, name), rtol=1e-9, atol=1e-12)
    assert (again.now.skipped, again.now.norm_limit) == (True, spike.norm_limit)
    assert again.first_module is None
    assert not again.bad_gradients

    (again,) = run_ranks(1, replayed, f"{folder}/skipped-step-4")
    assert again.now.skipped
    assert not math.isfinite(again.now.grad_norm)
    assert again.first_module is not None
    assert ".layers.1." in f".{again.first_module}."
    assert any(name.startswith("layers.1.") for name in again.bad_gradients[:1])
    assert "loss              " in again.in_words()


def stopped(rank: int, world: int, workshop: str) -> tuple[str, int]:
    """The error, and the step from which the run goes on if it is resumed as the error says."""
    settings = (*OVERRIDES, f"output_dir={workshop}/runs/stopped", "max_skipped_steps=2")
    config = load_config(f"{workshop}/config.yaml", settings, claim_output=False)
    real = passes.forward_loss
    with mock.patch.object(passes, "forward_loss", lambda *given: bad_loss(real, *given)), pytest.raises(UserError) as caught:
        train(config, ranks_of_default_group(rank, world))
    advice = shlex.split(str(caught.value).splitlines()[-1])
    assert advice[:2] == ["hecate", "train"]
    resumed = load_config(advice[2], advice[3:], claim_output=False)
    return str(caught.value), Training(resumed, ranks_of_default_group(rank, world)).run_state.step


def test_a_run_stops_when_its_skipped_steps_are_used_up(workshop: str) -> None:
    (first, step), other = run_ranks(2, stopped, workshop)
    assert other == (first, step)
    assert step == 2
    assert f"hecate replay-step {workshop}/runs/stopped/skipped-step-2" in first
    records = [json.loads(line) for line in Path(workshop, "runs/stopped/metrics.jsonl").read_text().splitlines()]
    events = [record["text"] for record in records if record["kind"] == "event"]
    assert events == [f"step {step} was skipped: the loss or a gradient was not finite" for step in (1, 2)]
    assert [record["skipped"] for record in records if record["kind"] == "step"] == [True, True]


def test_a_step_of_sharded_layers_is_done_again_with_whole_ones(workshop: str) -> None:
    """One process has nothing to shard them over."""
    config = load_config(f"{workshop}/config.yaml", OVERRIDES, claim_output=False)
    alone = _for_one_rank(replace(config, model=replace(config.model, shard_non_experts=True)), Path(workshop))
    assert not alone.model.shard_non_experts


def test_a_sample_whose_file_has_gone_is_named_by_its_number() -> None:
    assert _places_in(DataSource(path="no/such.csv"), [3]) == {3: "record 3 of no/such.csv"}
