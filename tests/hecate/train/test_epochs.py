"""A run of epochs has a number of steps, which every number of ranks agrees on when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hecate.config import load_config
from hecate.data.stream import TrainStream
from hecate.train.training import Training, data_in_words, few_steps, steps_of_epochs
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.data.making import source_of_lengths
from tests.hecate.train.in_process import ranks_of_default_group

# 240 samples, one in each sequence, and 32 of these in a step of one rank: 7.5 steps an epoch.
UNPACKED = ("data.packing=false", "gradient_accumulation_steps=16", "data.eval=[]", "eval.generate=false")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def build(
    rank: int, world: int, workshop: str, overrides: tuple[str, ...], until: int = 0, name: str = "epochs"
) -> tuple[int, float, list[str]]:
    """(steps, learning rate of the next step, notes) of a run that is built, trained to a step and saved."""
    given = [*UNPACKED, *overrides, f"output_dir={workshop}/runs/{name}"]
    run = Training(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
    found = run.parts.config.max_steps, run.parts.optimizer.learning_rate, run.notes
    while run.run_state.step < until:
        run.train_one()
    run.save()
    return found


def begin_and_go_on(rank: int, world: int, workshop: str) -> list[tuple[int, float, list[str]]]:
    begun = build(rank, world, workshop, ("num_train_epochs=0.2",))
    again = build(rank, world, workshop, ("max_steps=2", "resume=true"), until=2)
    return [begun, again, *(build(rank, world, workshop, (length, "resume=true")) for length in ("max_steps=2", "num_train_epochs=2"))]


def left_after(rank: int, world: int, workshop: str) -> tuple[int, dict[str, Any]]:
    """The steps of a run of epochs, and what its adapter says of its training."""
    given = (*UNPACKED, "num_train_epochs=0.1", f"output_dir={workshop}/runs/left")
    run = Training(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
    folder = run.parts.output.replace(Path(workshop, "runs/left"), run.parts.moe, run.ranks)
    described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return run.parts.config.max_steps, described["hecate"]["extra"]["training"]


def test_an_adapter_says_after_how_many_steps_of_its_epochs_it_was_written(workshop: str) -> None:
    ((steps, trained),) = run_ranks(1, left_after, workshop)
    assert steps == trained["steps"] == 1


def test_a_run_of_epochs_has_steps_and_says_how_to_go_on_when_they_are_done(workshop: str) -> None:
    (found,) = run_ranks(1, begin_and_go_on, workshop)
    begun, again, finished, longer = found
    counted, few = begun[2]
    assert (begun[0], counted) == (2, "0.2 epochs of 240 samples are 2 steps")
    assert few.startswith("few data: 2 steps are too few to learn much, because a step takes 32 sequences")
    assert again == (2, begun[1], []), "the learning rate is on the curve of two steps, however the length was given"
    assert finished[2] == ["all 2 steps of this run are done; to train on, resume it with more: max_steps=4, or num_train_epochs=..."]
    assert longer[2] == [
        "2 epochs of 240 samples are 15 steps",
        "max_steps was 2 and is 15: from step 2 on, the learning rate is on the curve of 15 steps",
    ]


@pytest.mark.slow
def test_epochs_are_counted_in_steps_of_the_size_that_the_run_began_with(workshop: str) -> None:
    run_ranks(1, build, workshop, ("num_train_epochs=2",), 0, "two")
    # Two ranks would begin with steps twice as large; the run that they continue keeps its own.
    resumed = run_ranks(2, build, workshop, ("num_train_epochs=4", "resume=true"), 0, "two")
    assert {steps for steps, _, _ in resumed} == {30}


def epochs_until(
    rank: int, world: int, workshop: str, name: str, until: int, overrides: tuple[str, ...]
) -> list[tuple[float, int | None, float]]:
    """Of each step of a run that is begun or continued: its epoch, the samples of one, and how many samples the stream has drawn."""
    given = [*overrides, f"output_dir={workshop}/runs/{name}"]
    run = Training(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
    found = []
    while run.run_state.step < until:
        event = run.train_one()
        state: Any = run.parts.stream.state_dict()
        found.append((event.epoch, event.epoch_samples, sum(state["mixture"]["drawn"]) - len(state["waiting"])))
    run.save()
    return found


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_steps_epoch_counts_its_samples_at_every_size_of_a_resumed_run(workshop: str, packing: str) -> None:
    own = (f"data.packing={packing}", *UNPACKED[1:])
    whole = run_ranks(1, epochs_until, workshop, f"whole-{packing}", 5, own)[0]
    parts = run_ranks(1, epochs_until, workshop, f"parts-{packing}", 2, own)[0]
    parts += run_ranks(3, epochs_until, workshop, f"parts-{packing}", 4, (*own, "resume=true"))[1]
    parts += run_ranks(2, epochs_until, workshop, f"parts-{packing}", 5, (*own, "resume=true"))[0]
    assert parts == whole
    for epoch, samples, drawn in whole:
        assert samples == 240
        assert epoch == (drawn / 240 if packing == "false" else pytest.approx(drawn / 240, rel=0.1))
    assert whole[-1][0] > 0.1


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 3), (0.11, 4), (1, 30), (0.001, 1)])
def test_a_part_of_a_step_is_a_step(epochs: float, steps: int) -> None:
    stream = SimpleNamespace(sequences_per_epoch=300, sequences_per_step=10)
    assert steps_of_epochs(epochs, stream) == steps  # type: ignore[arg-type]


def test_a_run_of_few_steps_is_said_with_what_makes_it_longer() -> None:
    """As of 300 short chats with a preset, of which two epochs are one step."""
    stream = SimpleNamespace(sequences_per_epoch=25, sequences_per_step=64)
    told = few_steps(2, stream)  # type: ignore[arg-type]
    assert told is not None
    what, mend = told.splitlines()
    assert "1 steps are too few to learn much, because a step takes 64 sequences and 2 epochs have about 50" in what
    assert (
        mend
        == "  for 10 steps let a step take at most 5 (micro_batch_size, gradient_accumulation_steps, ranks), or set num_train_epochs=26"
    )
    assert steps_of_epochs(2, SimpleNamespace(sequences_per_epoch=25, sequences_per_step=5)) == 10  # type: ignore[arg-type]
    assert steps_of_epochs(26, stream) >= 10  # type: ignore[arg-type]
    assert few_steps(23, stream) is not None  # type: ignore[arg-type]
    assert few_steps(26, stream) is None  # type: ignore[arg-type]
    tiny = SimpleNamespace(sequences_per_epoch=3, sequences_per_step=8)
    assert (few_steps(2, tiny) or "").endswith("\n  for 10 steps set num_train_epochs=27")  # type: ignore[arg-type]


def test_how_often_the_steps_go_through_the_samples() -> None:
    sources = [source_of_lengths([8] * samples, name) for name, samples in (("alpaca", 30), ("faq", 10))]
    stream = TrainStream(sources, seq_len=16, packing=False, sequences_per_step=4, seed=0)
    assert data_in_words(stream, 25) == "samples: alpaca 30, faq 10; 25 steps of 4 sequences go 2.5 times through them"
    many = TrainStream([source_of_lengths([8], f"s{n}") for n in range(11)], seq_len=16, packing=False, sequences_per_step=11, seed=0)
    assert data_in_words(many, 2000).endswith("s7 1 and 3 more; 2,000 steps of 11 sequences go 2,000 times through them")
