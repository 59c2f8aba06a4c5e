import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hecate.data.stream
from hecate.data.sequences import PackedSequence
from hecate.data.stream import TrainStream
from hecate.errors import UserError
from tests.hecate.data.making import source_of_lengths

LENGTHS_A = np.random.default_rng(1).integers(3, 16, 90).tolist()
LENGTHS_B = np.random.default_rng(2).integers(3, 16, 40).tolist()


def build(**changes: Any) -> TrainStream:
    sources = changes.pop("sources", None) or [
        source_of_lengths(LENGTHS_A, "a", 3.0),
        source_of_lengths(LENGTHS_B, "b", 1.0),
    ]
    return TrainStream(sources, **{"seq_len": 32, "packing": True, "sequences_per_step": 4, "seed": 0} | changes)


def plain(sequences: list[PackedSequence]) -> list[Any]:
    return [
        (sequence.number, sequence.samples, sequence.input_ids.tolist(), sequence.targets.tolist(), sequence.position_ids.tolist())
        for sequence in sequences
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_resume_after_every_step(packing: bool) -> None:
    whole = build(packing=packing)
    states, steps = [], []
    for _ in range(40):
        states.append(json.dumps(whole.state_dict()))
        steps.append(plain(whole.next_step()))
    for done, state in enumerate(states):
        resumed = build(packing=packing)
        resumed.next_step()
        resumed.load_state_dict(json.loads(state))
        assert [plain(resumed.next_step()) for _ in steps[done : done + 5]] == steps[done : done + 5]
    assert max(map(len, states)) < 4000


def test_steps_have_exactly_their_rows_numbered_through() -> None:
    stream = build(sequences_per_step=7)
    numbers = [sequence.number for _ in range(5) for sequence in stream.next_step()]
    assert numbers == list(range(35))


def test_rows_do_not_depend_on_how_they_are_cut_into_steps() -> None:
    few, many = build(sequences_per_step=2), build(sequences_per_step=6)
    assert plain([sequence for _ in range(9) for sequence in few.next_step()]) == plain(
        [sequence for _ in range(3) for sequence in many.next_step()]
    )


@pytest.mark.parametrize("packing", [True, False])
@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_each_sample_once_an_epoch(packing: bool, seed: int) -> None:
    stream = build(sources=[source_of_lengths(LENGTHS_A)], packing=packing, seed=seed)
    seen: Counter[tuple[int, int]] = Counter()
    while sum(seen.values()) < 3 * len(LENGTHS_A):
        seen.update(sample for sequence in stream.next_step() for sample in sequence.samples)
    seen.update((source, sample) for source, sample in stream.state_dict()["waiting"])
    assert set(seen.values()) <= {min(seen.values()), min(seen.values()) + 1}


def test_packed_rows_are_full() -> None:
    stream = build()
    sequences = [sequence for _ in range(50) for sequence in stream.next_step()]
    assert np.mean([len(sequence.input_ids) for sequence in sequences]) > 0.97 * 32


def test_sources_follow_their_weights() -> None:
    stream = build()
    drawn = Counter(source for _ in range(100) for sequence in stream.next_step() for source, _ in sequence.samples)
    assert drawn[0] / drawn[1] == pytest.approx(3, rel=0.1)


def test_few_samples_are_repeated_and_said() -> None:
    sources = [source_of_lengths([30, 30]), source_of_lengths([30])]
    options = {"seq_len": 32, "packing": True, "seed": 0}
    assert TrainStream(sources, sequences_per_step=3, **options).few_samples() is None
    stream = TrainStream(sources, sequences_per_step=12, **options)
    said = stream.few_samples()
    assert said is not None
    assert "3 samples make 3 packed sequences of 32 tokens, and each step takes 12, so that it trains on a sample about 4.0 times" in said
    assert "smaller data.seq_len" in said
    drawn = Counter(sample for sequence in stream.next_step() for sample in sequence.samples)
    assert sorted(drawn.values()) == [3, 3, 6]  # sources have equal weights
    said = TrainStream(sources, sequences_per_step=4, **options | {"packing": False}).few_samples()
    assert said is not None
    assert "make 3 sequences" in said


@pytest.mark.parametrize(("packing", "counted"), [(True, 50_000), (True, 30), (False, 50_000)])
def test_an_epoch_is_as_many_sequences_as_its_samples_make(packing: bool, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hecate.data.stream, "_COUNTED_SAMPLES", counted)
    stream = build(sources=[source_of_lengths(LENGTHS_A)], packing=packing, sequences_per_step=1)
    expected, position = stream.sequences_per_epoch, stream.state_dict()
    assert stream.state_dict() == position
    sequences = 0
    while sum(stream.state_dict()["mixture"]["drawn"]) - len(stream.state_dict()["waiting"]) < 10 * len(LENGTHS_A):
        stream.next_step()
        sequences += 1
    assert sequences / 10 == pytest.approx(expected, rel=0.03 if counted > 90 else 0.2)
    assert packing or expected == len(LENGTHS_A)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"seq_len": 40}, "seq_len was 32, is 40"),
        ({"packing": False}, "packing was True, is False"),
        ({"sources": [source_of_lengths(LENGTHS_A, "a", 3.0)]}, "the sources were a, b, are a"),
        (
            {"sources": [source_of_lengths(LENGTHS_A, "a", 3.0), source_of_lengths(LENGTHS_B, "b", 2.0)]},
            "weight of source b was 1.0, is 2.0",
        ),
        (
            {"sources": [source_of_lengths(LENGTHS_A, "a", 3.0), source_of_lengths(LENGTHS_A, "b", 1.0)]},
            "samples of source b, or how they are tokenized, have changed",
        ),
    ],
)
def test_state_of_another_run_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(**changes).load_state_dict(json.loads(json.dumps(build().state_dict())))


def test_rows_per_step_may_change_at_a_resume() -> None:
    whole = build(sequences_per_step=4)
    whole.next_step()
    resumed = build(sequences_per_step=2)
    resumed.load_state_dict(whole.state_dict())
    assert plain(resumed.next_step() + resumed.next_step()) == plain(whole.next_step())


@pytest.mark.parametrize(
    "change",
    [
        {"mixture": {"drawn": [3]}},
        {"mixture": {"drawn": [3, -1]}},
        {"mixture": {"drawn": [3, 1.5]}},
        {"mixture": {}},
        {"mixture": 5},
        {"waiting": [[0, 90]]},
        {"waiting": [[2, 0]]},
        {"waiting": [[-1, 0]]},
        {"waiting": [[0]]},
        {"waiting": None},
        {"rows": "8"},
        {"identity": {}},
    ],
    ids=str,
)
def test_what_is_no_position_in_these_data_is_refused_and_nothing_has_changed(change: dict[str, Any]) -> None:
    stream = build()
    stream.next_step()
    before = json.dumps(stream.state_dict())
    for refuse in (stream.check_state_dict, stream.load_state_dict):
        with pytest.raises((KeyError, TypeError, ValueError)):
            refuse(json.loads(before) | change)
    assert json.dumps(stream.state_dict()) == before
