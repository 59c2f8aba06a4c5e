"""Streams of sources that are not mixed: each is that of a run on the source alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hecate.data.separate_streams import SeparateStreams
from hecate.data.stream import TrainStream
from hecate.errors import UserError
from tests.hecate.data.making import source_of_lengths

SOURCES = [
    source_of_lengths(np.random.default_rng(seed).integers(3, 16, size).tolist(), name, weight)
    for seed, (name, size, weight) in enumerate([("a", 90, 3.0), ("b", 40, 1.0), ("c", 7, 1.0)])
]
SETTINGS: dict[str, Any] = {"seq_len": 32, "seed": 5}


def build(packing: bool = True, sequences: int = 6, numbered_alone: bool = True) -> SeparateStreams:
    return SeparateStreams(SOURCES, packing=packing, sequences_per_step=sequences, numbered_alone=numbered_alone, **SETTINGS)


@pytest.mark.parametrize("packing", [True, False])
def test_each_source_has_the_sequences_of_a_run_on_it_alone(packing: bool) -> None:
    together = build(packing)
    alone = [TrainStream([source], packing=packing, sequences_per_step=2, **SETTINGS) for source in SOURCES]
    for _ in range(30):
        step = together.next_step()
        for number, stream in enumerate(alone):
            own = [sequence for sequence in step if set(sequence.task.tolist()) == {number}]
            wanted = stream.next_step()
            assert [one.input_ids.tolist() for one in own] == [one.input_ids.tolist() for one in wanted]
            assert [one.number for one in own] == [one.number for one in wanted]
            assert [one.samples for one in own] == [tuple((number, sample) for _, sample in one.samples) for one in wanted]


def test_numbers_are_unique_where_they_are_not_those_of_a_run_alone() -> None:
    for numbered_alone in (True, False):
        stream = build(numbered_alone=numbered_alone)
        numbers = [sequence.number for _ in range(5) for sequence in stream.next_step()]
        assert sorted(numbers) == ([number for number in range(10) for _ in SOURCES] if numbered_alone else list(range(30)))


def test_they_go_on_where_they_were_saved() -> None:
    whole = build()
    for _ in range(11):
        whole.next_step()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = build(sequences=3)
    resumed.load_state_dict(state)
    resumed.sequences_per_step = 6
    assert [one.input_ids.tolist() for one in resumed.next_step()] == [one.input_ids.tolist() for one in whole.next_step()]
    state["separate"][1]["identity"]["seed"] = 6
    with pytest.raises(UserError, match="seed was 6, is 5"):
        resumed.load_state_dict(state)
    with pytest.raises(UserError, match=r"the run has 2 sources with a stream each .* but 3 are given"):
        resumed.load_state_dict({"separate": state["separate"][:2]})


def test_an_epoch_is_over_when_the_longest_source_is() -> None:
    assert build(packing=False).sequences_per_epoch == 3 * 90
    few = build(packing=False, sequences=24).few_samples()
    assert few is not None
    assert few.startswith("c: few data: 7 samples make 7 sequences")
    assert build(packing=False, sequences=21).few_samples() is None
