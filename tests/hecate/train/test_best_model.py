"""Whole runs that hold data out, end early and leave their best model, also over a resume at another number of ranks and a lost rank."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.report.events import EvalScore, Evaluation
from hecate.train.best_model import metric_value
from hecate.train.loop import train
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group

STEADY = ("model.dtype=float64", "lr_scheduler_type=constant", "warmup_ratio=0", "lora.dropout=0", "eval.on_start=false")
ASKS = ("eval.generate=false", "eval_steps=1", "max_steps=9", "save_total_limit=1", "load_best_model_at_end=true")


def configured(workshop: str, name: str, *overrides: str) -> Config:
    """The configuration of a run; of a key that is given twice the last value holds. Two ranks share twelve sequences a step."""
    given = (*STEADY, "micro_batch_size=12", "gradient_accumulation_steps=1", *overrides, f"output_dir={workshop}/runs/{name}")
    named = dict(override.split("=", 1) for override in given)
    return load_config(f"{workshop}/config.yaml", [f"{key}={value}" for key, value in named.items()], claim_output=False)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


@contextmanager
def scripted(losses: list[float], stops_at: int | None, failing: Callable[[int], None] = lambda step: None) -> Iterator[None]:
    """Evaluations whose loss after step n is losses[n - 1]; and a signal in a step."""
    real = Training.train_one

    def evaluate(training: Training) -> Evaluation:
        step = training.run_state.step
        failing(step)
        return Evaluation({"up.eval": EvalScore(loss=losses[step - 1], accuracy=None, samples=1)}, {})

    def train_one(training: Training, *given: Any) -> Any:
        if training.run_state.step + 1 == stops_at:
            signal.raise_signal(signal.SIGTERM)
        return real(training, *given)

    with mock.patch.object(Training, "evaluate", evaluate), mock.patch.object(Training, "train_one", train_one):
        yield


def run_scripted(
    rank: int, world: int, workshop: str, name: str, losses: list[float], stops_at: int | None = None, overrides: tuple[str, ...] = ()
) -> bool:
    """Whether a run with these losses came to its end. A step has as many sequences at each number of ranks."""
    config = configured(workshop, name, *ASKS, f"micro_batch_size={12 // world}", *overrides)
    with scripted(losses, stops_at), mock.patch("hecate.report.pages.heatmap.write_heatmap"):
        return train(config, ranks_of_default_group(rank, world))


def events(workshop: str, name: str) -> list[str]:
    lines = Path(workshop, "runs", name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["text"] for record in map(json.loads, lines) if record["kind"] == "event"]


def kept(workshop: str, name: str) -> list[str]:
    return sorted(path.name for path in Path(workshop, "runs", name).glob("checkpoint-*"))


def adapter(workshop: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(f"{workshop}/runs/{name}/adapter/adapter_model.safetensors")


def steps_on_card(workshop: str, name: str) -> int:
    described = json.loads(Path(workshop, "runs", name, "adapter/adapter_config.json").read_text(encoding="utf-8"))
    return int(described["hecate"]["extra"]["training"]["steps"])


def plain_run(workshop: str, steps: int) -> str:
    """The name of a run of so many steps that knows nothing of a best model."""
    name = f"plain-{steps}"
    if not Path(workshop, "runs", name).exists():
        plain = (f"max_steps={steps}", "load_best_model_at_end=false", "save_total_limit=null", "eval_steps=null", "data.eval=[]")
        assert run_ranks(1, run_scripted, workshop, name, [], None, plain) == [True]
    return name


def same_adapter(workshop: str, name: str, other: str) -> bool:
    one, two = adapter(workshop, name), adapter(workshop, other)
    return all(torch.allclose(one[key].double(), two[key].double(), rtol=0, atol=1e-6) for key in one.keys() | two.keys())


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_ends_early_and_leaves_its_best_model(workshop: str, world: int) -> None:
    name = f"early-{world}"
    losses = [3.0, 1.0, 2.0, 1.5, 1.0, 0.5]
    assert run_ranks(world, run_scripted, workshop, name, losses, None, ("early_stopping_patience=3",)) == [True] * world
    assert kept(workshop, name) == ["checkpoint-2", "checkpoint-5"]
    assert steps_on_card(workshop, name) == 2
    assert same_adapter(workshop, name, plain_run(workshop, 2))
    assert not same_adapter(workshop, name, plain_run(workshop, 5))
    assert events(workshop, name)[-2:] == [
        "ended early after step 5 of 9: 3 evaluations did not improve loss",
        "loss 1 after step 2; the run leaves the model of step 2",
    ]


@pytest.mark.parametrize("worlds", [(2, 1), (1, 3), pytest.param((4, 2), marks=pytest.mark.slow)])
def test_a_resume_at_another_number_of_ranks_ends_at_the_same_step_with_the_same_model(workshop: str, worlds: tuple[int, int]) -> None:
    """The stop comes in step 3, whose evaluation is made up for: with those of 4 and 5 it is the third without an improvement."""
    name, losses = f"resumed-{worlds[0]}-{worlds[1]}", [3.0, 1.0, 2.0, 1.5, 1.0, 0.5]
    patience = "early_stopping_patience=3"
    assert run_ranks(worlds[0], run_scripted, workshop, name, losses, 3, (patience,)) == [False] * worlds[0]
    given = (patience, f"micro_batch_size={12 // worlds[0]}", "resume=true")
    assert run_ranks(worlds[1], run_scripted, workshop, name, losses, None, given) == [True] * worlds[1]
    assert kept(workshop, name) == ["checkpoint-2", "checkpoint-5"]
    assert same_adapter(workshop, name, plain_run(workshop, 2))
    assert events(workshop, name)[-2].startswith("ended early after step 5")


def notes_of(rank: int, world: int, workshop: str, name: str, overrides: tuple[str, ...]) -> list[str]:
    return Training(configured(workshop, name, *ASKS, "resume=true", *overrides), ranks_of_default_group(rank, world)).notes


def test_a_run_that_ended_early_is_finished_and_says_so_until_its_patience_is_taken_back(workshop: str) -> None:
    name, losses = "finished", [1.0, 2.0, 2.0, 2.0, 0.5, 0.75, 0.75, 0.75, 0.75]
    patience = "early_stopping_patience=2"
    assert run_ranks(1, run_scripted, workshop, name, losses, None, (patience,)) == [True]
    assert kept(workshop, name) == ["checkpoint-1", "checkpoint-3"]
    (notes,) = run_ranks(1, notes_of, workshop, name, (patience,))
    assert notes[-1] == "this run has ended early, after step 3; to train on, give a larger early_stopping_patience, or null"
    assert run_ranks(1, run_scripted, workshop, name, losses, None, (patience, "resume=true")) == [True]
    assert kept(workshop, name) == ["checkpoint-1", "checkpoint-3"], "no step more"
    assert events(workshop, name)[-2].startswith("ended early after step 3")
    assert run_ranks(1, run_scripted, workshop, name, losses, None, ("early_stopping_patience=4", "resume=true")) == [True]
    assert kept(workshop, name) == ["checkpoint-5", "checkpoint-9"]
    assert same_adapter(workshop, name, plain_run(workshop, 5))
    assert events(workshop, name)[-2].startswith("ended early after step 9 of 9")


def test_the_last_model_is_left_without_the_key_and_a_lost_best_checkpoint_is_named(workshop: str) -> None:
    name, losses = "last", [2.0, 1.0, 2.0]
    given = ("max_steps=3", "load_best_model_at_end=false", "metric_for_best_model=up.eval.loss")
    assert run_ranks(1, run_scripted, workshop, name, losses, None, given) == [True]
    assert kept(workshop, name) == ["checkpoint-2", "checkpoint-3"]
    assert same_adapter(workshop, name, plain_run(workshop, 3))
    assert events(workshop, name)[-1] == "up.eval.loss 1 after step 2; the run leaves the model of step 3"
    Path(workshop, "runs", name, "checkpoint-2/COMMIT").unlink()
    again = ("max_steps=3", "metric_for_best_model=up.eval.loss", "resume=true")
    with pytest.raises(AssertionError, match=r"checkpoint-2, of the best model, is no checkpoint that can be read(.|\n)*leaves the last"):
        run_ranks(1, run_scripted, workshop, name, losses, None, again)


def test_another_metric_on_a_resume_begins_anew(workshop: str) -> None:
    name, losses = "anew", [1.0, 2.0, 3.0, 2.5, 2.75]
    assert run_ranks(1, run_scripted, workshop, name, losses, 3, ("max_steps=5",)) == [False]
    more = ("max_steps=5", "resume=true", "metric_for_best_model=up.eval.loss")
    assert run_ranks(1, run_scripted, workshop, name, losses, None, more) == [True]
    assert events(workshop, name)[-1] == "up.eval.loss 2.5 after step 4; the run leaves the model of step 4"


def lose_the_word_of_an_evaluation(rank: int, world: int, workshop: str) -> list[tuple[float | None, int | None, int]]:
    """Rank 0 counts an evaluation, and rank 1 is interrupted before it; both do it again, from other numbers. What both know then."""
    training = Training(configured(workshop, "interrupted", *ASKS), ranks_of_default_group(rank, world))
    training.train_one()
    first = Evaluation({"up": EvalScore(1.0, None, 1)}, {})
    if rank == 0:
        with mock.patch.object(type(training.ranks), "broadcast_from", lambda ranks, source, data: data):
            training.judge(first)
    training.judge(Evaluation({"up": EvalScore(1.25, None, 1)}, {}))
    training.train_one()
    training.judge(Evaluation({"up": EvalScore(1.125, None, 1)}, {}))
    best = training.run_state.best
    return [(best.value, best.step, best.without)]


def test_after_a_loss_all_ranks_know_the_same(workshop: str) -> None:
    assert run_ranks(2, lose_the_word_of_an_evaluation, workshop) == [[(1.0, 1, 1)]] * 2


def trained_and_evaluated(rank: int, world: int, workshop: str, name: str, overrides: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The texts that a run has trained on, and those that it evaluates on."""
    config = configured(workshop, name, "data.eval=[]", "data.eval_share=0.2", "max_steps=30", *overrides)
    training = Training(config, ranks_of_default_group(rank, world))
    tokenizer, seen = training.parts.base.tokenizer, set()
    real = training.parts.stream.next_step

    def next_step() -> Any:
        sequences = real()
        for sequence in sequences:
            cuts = (sequence.segment_ids == segment for segment in range(1, len(sequence.samples) + 1))
            seen.update(tokenizer.decode(sequence.input_ids[cut]) for cut in cuts)
        return sequences

    with mock.patch.object(training.parts.stream, "next_step", next_step):
        while training.run_state.step < 30:
            training.train_one()
    held = {tokenizer.decode(sample.input_ids) for source in training.parts.eval_sources for sample in source}
    return sorted(seen), sorted(held)


def test_nothing_that_is_held_out_is_trained_on(workshop: str) -> None:
    found = [run_ranks(world, trained_and_evaluated, workshop, f"held-{world}", ("eval.generate=false",)) for world in (1, 2)]
    for ranks in found:
        seen, held = ranks[0]
        assert not set(seen) & set(held)
        assert len(seen) + len(held) == len(set(seen) | set(held)) == 240, "thirty steps go through all that is left"
        assert 24 <= len(held) <= 72
    assert found[0][0][1] == found[1][0][1]


def test_a_real_run_leaves_the_model_of_its_least_loss_and_hecate_eval_finds_that_loss(workshop: str, capsys: Any) -> None:
    """A learning rate that soon does harm."""
    from hecate.apps.answers.compare import Questions, compare
    from hecate.ranks.ranks import join_ranks

    given = ("data.eval=[]", "data.eval_share=0.2", "max_steps=3", "learning_rate=3", "metric_for_best_model=up.train.loss")
    config = configured(workshop, "real", *ASKS, *given)
    with join_ranks() as ranks:
        assert train(config, ranks)
        shown = capsys.readouterr()
        (figures,) = compare(config, [f"{workshop}/runs/real"], Questions(), ranks)
    lines = Path(workshop, "runs/real/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    losses = [record["sources"]["up.train"]["loss"] for record in evals]
    best = evals[losses.index(min(losses))]
    assert best["step"] < 3, "or nothing was shown"
    assert steps_on_card(workshop, "real") == best["step"]
    assert (
        f"up.train.loss {min(losses):.4g} after step {best['step']}; the run leaves the model of step {best['step']}"
        in shown.out + shown.err
    )
    for name, one in best["sources"].items():
        assert figures.tasks[name].figures["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert figures.tasks[name].samples == one["samples"] < 40


def test_a_number_of_an_evaluation_by_its_name() -> None:
    scores = {"a.b": EvalScore(1.0, 0.5, 3), "c": EvalScore(2.0, None, 3)}
    found = Evaluation(scores, {})
    assert [metric_value(name, found) for name in ("loss", "exact", "a.b.loss", "a.b.exact", "c.loss")] == [1.5, 0.5, 1.0, 0.5, 2.0]
    with pytest.raises(UserError, match=r"c\.exact is not known"):
        metric_value("c.exact", found)


def test_another_share_is_another_run(workshop: str) -> None:
    name = "share"
    given = ("data.eval=[]", "max_steps=4", "data.eval_share=0.2")
    assert run_ranks(1, run_scripted, workshop, name, [3.0, 2.0, 1.0, 0.5], 2, given) == [False]
    with pytest.raises(AssertionError, match=r"data\.eval_share: 0\.2 then, 0\.3 now"):
        run_ranks(1, run_scripted, workshop, name, [3.0, 2.0, 1.0, 0.5], None, (*given[:2], "data.eval_share=0.3", "resume=true"))
