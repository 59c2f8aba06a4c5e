"""A stop puts an evaluation off, and the resumed run makes up for it (`hecate.train.loop`)."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hecate.config import load_config
from hecate.errors import UserError
from hecate.train.loop import train
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group


def run_and_stop(rank: int, world: int, workshop: str) -> list[tuple[bool, list[int]]]:
    """Begin a run of one step, in which the last rank gets a signal, and resume it. Whether each came to its end, and
    the steps whose evaluations are recorded then."""
    settings = [f"output_dir={workshop}/runs/a", "max_steps=1", "eval.on_start=false", "eval.generate=false"]
    real = Training.train_one

    def train_one(training: Training, *given: Any) -> Any:
        if rank == world - 1:
            signal.raise_signal(signal.SIGTERM)
        return real(training, *given)

    found = []
    for more in ([], ["resume=true"]):
        config = load_config(f"{workshop}/config.yaml", [*settings, *more], claim_output=False)
        with mock.patch.object(Training, "train_one", train_one):
            ended = train(config, ranks_of_default_group(rank, world))
        records = map(json.loads, Path(workshop, "runs/a/metrics.jsonl").read_text().splitlines())
        found.append((ended, [record["step"] for record in records if record["kind"] == "eval"]))
    return found


def fail_and_go_on(rank: int, world: int, workshop: str) -> list[str]:
    """The checkpoints of a run whose only evaluation fails, and what is recorded once it was resumed."""
    settings = [f"output_dir={workshop}/runs/b", "max_steps=1", "eval.on_start=false", "eval.generate=false"]
    config = load_config(f"{workshop}/config.yaml", settings, claim_output=False)
    ranks, failing = ranks_of_default_group(rank, world), mock.patch.object(Training, "evaluate", side_effect=UserError("no answers"))
    with failing, pytest.raises(UserError, match="no answers"):
        train(config, ranks)
    found = [path.name for path in Path(config.output_dir).glob("checkpoint-*")]
    train(replace(config, resume=True), ranks)
    records = map(json.loads, Path(workshop, "runs/b/metrics.jsonl").read_text().splitlines())
    return [*found, *(f"{record['kind']} {record['step']}" for record in records if record["kind"] in ("step", "eval"))]


def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path) -> None:
    """The run has saved before it, and evaluates when it is resumed."""
    (found,) = run_ranks(1, fail_and_go_on, str(make_workshop(tmp_path)))
    assert found == ["checkpoint-1", "step 1", "eval 1"]


def test_a_resumed_run_evaluates_where_a_stop_came_first(tmp_path: Path) -> None:
    first, *_ = run_ranks(2, run_and_stop, str(make_workshop(tmp_path)))
    assert first == [(False, []), (True, [1])]
