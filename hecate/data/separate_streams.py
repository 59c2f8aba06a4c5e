"""The stream of a run whose sources are not mixed: each has a stream of its own, from which every step takes as many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hecate.data.sequences import PackedSequence
from hecate.data.sources import TokenSource
from hecate.data.stream import TrainStream
from hecate.errors import UserError


class SeparateStreams:
    """As `TrainStream`, which is each source's: its sequences are those of a run on that source alone, in the same order, packed alike."""

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        seq_len: int,
        packing: bool,
        sequences_per_step: int,
        seed: int,
        numbered_alone: bool = False,
    ) -> None:
        """Args:
        sequences_per_step: a multiple of the number of sources.
        numbered_alone: sequences have the numbers that they have in a run on their source alone, so that those of several sources have the
            same; otherwise no two sequences have the same number. What dropout drops goes by it.
        """
        self.sources = tuple(sources)
        self._numbered_alone = numbered_alone
        self._streams = [
            TrainStream([source], seq_len=seq_len, packing=packing, sequences_per_step=1, seed=seed) for source in self.sources
        ]
        self.sequences_per_step = sequences_per_step

    @property
    def sequences_per_step(self) -> int:
        """The number of sequences of a step, of all sources together."""
        return sum(stream.sequences_per_step for stream in self._streams)

    @sequences_per_step.setter
    def sequences_per_step(self, sequences: int) -> None:
        each, rest = divmod(sequences, len(self._streams))
        assert rest == 0, (sequences, len(self._streams))
        for stream in self._streams:
            stream.sequences_per_step = each

    def next_step(self) -> list[PackedSequence]:
        """Return the next global step, the same on every rank: one sequence of each source, then again one of each."""
        steps = [stream.next_step() for stream in self._streams]
        return [self._of_source(sequence, source) for round_ in zip(*steps, strict=True) for source, sequence in enumerate(round_)]

    def _of_source(self, sequence: PackedSequence, source: int) -> PackedSequence:
        """A sequence of the only source of its stream as one of source number `source`."""
        number = sequence.number if self._numbered_alone else sequence.number * len(self.sources) + source
        samples = tuple((source, sample) for _, sample in sequence.samples)
        return replace(sequence, number=number, task=sequence.task + source, samples=samples)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the following sequences depend on, as plain JSON values."""
        return {"separate": [stream.state_dict() for stream in self._streams]}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainStream.check_state_dict`; also raises UserError if there were more or fewer sources."""
        if (then := len(state["separate"])) != len(self._streams):
            raise UserError(
                f"data.train: the run has {then} sources with a stream each (data.separate), but {len(self._streams)} are given\n"
                "  give the same sources in the same order, or start a new run"
            )
        for stream, saved in zip(self._streams, state["separate"], strict=True):
            stream.check_state_dict(saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state` was saved. Raises as `check_state_dict`."""
        self.check_state_dict(state)
        for stream, saved in zip(self._streams, state["separate"], strict=True):
            stream.load_state_dict(saved)

    @property
    def sequences_per_epoch(self) -> float:
        """The number of sequences in which the source with the most of them has been gone through once."""
        return len(self._streams) * max(stream.sequences_per_epoch for stream in self._streams)

    def few_samples(self) -> str | None:
        """See `TrainStream.few_samples`; of the first source that has too few."""
        found = ((source.name, stream.few_samples()) for source, stream in zip(self.sources, self._streams, strict=True))
        return next((f"{name}: {few}" for name, few in found if few), None)


Stream = TrainStream | SeparateStreams
